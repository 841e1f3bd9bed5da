import assert from 'node:assert/strict';
import { X509Certificate } from 'node:crypto';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { run } from '../support/installation.js';
import type { Swtpm } from '../support/swtpm.js';

/** A maker of TPMs with authorities of its own: swtpm_setup and swtpm_localca as they are. */
export class Maker {
  readonly directory = mkdtempSync(join(tmpdir(), 'vtpm-maker-'));

  constructor() {
    mkdirSync(this.file('ca'));
    const names = { signingkey: 'signkey.pem', issuercert: 'issuercert.pem', certserial: 'certserial' };
    const ca = Object.entries(names).map(([key, name]) => `${key} = ${this.file('ca')}/${name}\n`);
    writeFileSync(this.file('localca.conf'), `statedir = ${this.file('ca')}\n${ca.join('')}`);
    writeFileSync(
      this.file('localca.options'),
      '--platform-manufacturer Maker\n--platform-version 1\n--platform-model Model\n',
    );
    writeFileSync(
      this.file('setup.conf'),
      `create_certs_tool = swtpm_localca\ncreate_certs_tool_config = ${this.file('localca.conf')}\n` +
        `create_certs_tool_options = ${this.file('localca.options')}\nactive_pcr_banks = sha256\n`,
    );
  }

  /** Gives a running TPM a new state with endorsement keys and certificates. No client may be connected. */
  async manufacture(swtpm: Swtpm, ...options: string[]): Promise<void> {
    await swtpm.kill();
    await this.tool(
      'swtpm_setup',
      ...['--tpm2', '--overwrite', '--tpm-state', swtpm.directory, '--config', this.file('setup.conf')],
      ...['--create-ek-cert', '--create-platform-cert', ...options],
    );
    await swtpm.restart();
  }

  file(name: string): string {
    return join(this.directory, name);
  }

  certificate(name: string): X509Certificate {
    return new X509Certificate(readFileSync(this.file(name)));
  }

  get root(): X509Certificate {
    return this.certificate('ca/swtpm-localca-rootca-cert.pem');
  }

  /** What signs the certificates of endorsement keys. */
  get issuer(): X509Certificate {
    return this.certificate('ca/issuercert.pem');
  }

  /** Makes a certificate that swtpm_localca would not. @param by file names of the issuer's certificate and key */
  async issue(
    name: string,
    template: string,
    key: readonly string[],
    by: { readonly certificate: string; readonly key: string },
  ): Promise<X509Certificate> {
    writeFileSync(this.file(`${name}.template`), template);
    await this.tool(
      'certtool',
      ...['--generate-certificate', '--outfile', this.file(`${name}.pem`), ...key],
      ...['--template', this.file(`${name}.template`)],
      ...['--load-ca-certificate', this.file(by.certificate), '--load-ca-privkey', this.file(by.key)],
    );
    return this.certificate(`${name}.pem`);
  }

  async tool(program: string, ...args: string[]): Promise<void> {
    const { code, stdout, stderr } = await run(program, args);
    assert.equal(code, 0, `${program}: ${stdout}${stderr}`);
  }

  remove(): void {
    rmSync(this.directory, { recursive: true, force: true });
  }
}
