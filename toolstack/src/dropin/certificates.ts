import { spawnSync } from 'node:child_process';
import { accessSync, constants, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Alg, type Public } from 'tpm2-ts-bindings';
import { DropinRefusal } from './refusal.js';
import type { SetupConfig } from './setup-config.js';

/** What a certificate says of the TPM beside its key, as the TPM itself says it. */
export interface TpmDescription {
  readonly specificationLevel: number;
  readonly specificationRevision: number;
  readonly firmwareVersion: number;
}

/** libtpms's own name for who makes it and what it is (TPMLIB_GetInfo, TPMAttributes). */
const MANUFACTURER = 'id:00001014';
const MODEL = 'swtpm';

const LIMIT_MS = 60_000;

/**
 * The authority for endorsement and platform certificates: the program that swtpm_setup's configuration names, which is
 * swtpm_localca of the package swtpm-tools, with keys and files of its own. It gets public keys only.
 */
export class CertificateTool {
  readonly #tool: string;
  readonly #config: SetupConfig;
  readonly #vmid: string | undefined;

  /** @throws DropinRefusal where there is none: certificates were asked for, and a TPM without them is another one */
  constructor(config: SetupConfig, vmid: string | undefined) {
    const { certificateTool = 'swtpm_localca' } = config;
    this.#tool = certificateTool;
    this.#config = config;
    this.#vmid = vmid;
    try {
      if (certificateTool.includes('/')) accessSync(certificateTool, constants.X_OK);
      else if (config.certificateTool === undefined) throw new Error('nothing is configured');
    } catch {
      throw new DropinRefusal(
        `no certificate of the endorsement key can be made: there is no ${certificateTool}; install swtpm-tools, or leave out --create-ek-cert and --create-platform-cert`,
      );
    }
  }

  /** @returns the certificate, DER @throws DropinRefusal with what the program says */
  issue(type: 'ek' | 'platform', key: Public, tpm: TpmDescription): Buffer {
    const directory = mkdtempSync(join(tmpdir(), 'vtpm-certificate-'));
    try {
      const { status, stderr, stdout, error } = spawnSync(
        this.#tool,
        this.#arguments(type, key, tpm, directory),
        {
          encoding: 'utf8',
          timeout: LIMIT_MS,
        },
      );
      if (status !== 0) {
        const said = `${stderr}${stdout}`.trim().split('\n').slice(-3).join('; ') || error?.message;
        throw new DropinRefusal(`${this.#tool} made no ${type} certificate (${said})`);
      }
      return readFileSync(join(directory, `${type}.cert`));
    } finally {
      rmSync(directory, { recursive: true, force: true });
    }
  }

  #arguments(type: string, key: Public, tpm: TpmDescription, directory: string): string[] {
    const { certificateToolConfig: config, certificateToolOptions: options } = this.#config;
    return [
      ...['--type', type, '--ek', keyText(key), '--dir', directory],
      ...(this.#vmid === undefined ? [] : ['--vmid', this.#vmid]),
      ...['--tpm-spec-family', '2.0', '--tpm-spec-level', String(tpm.specificationLevel)],
      ...['--tpm-spec-revision', String(tpm.specificationRevision)],
      ...['--tpm-manufacturer', MANUFACTURER, '--tpm-model', MODEL],
      ...['--tpm-version', `id:${tpm.firmwareVersion.toString(16)}`, '--tpm2'],
      ...(config === undefined ? [] : ['--configfile', config]),
      ...(options === undefined ? [] : ['--optsfile', options]),
    ];
  }
}

/** The modulus of an RSA key in hex, or the point of one on P-384. */
function keyText(key: Public): string {
  if (key.type === Alg.RSA) return key.unique.toString('hex');
  if (key.type !== Alg.ECC) throw new DropinRefusal('certificates are for RSA and ECC keys only');
  const { x, y } = key.unique;
  return `x=${x.toString('hex')},y=${y.toString('hex')},id=secp384r1`;
}
