import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Finished, Installation, run } from '../support/installation.js';

/** Unmodified tpm2-tools 5.4 against a vTPM, over the door made for the TSS's swtpm TCTI. */
describe('tpm2-tools against a vTPM', () => {
  let installation: Installation;
  let work: string;
  let tcti: string;

  before(async () => {
    work = mkdtempSync(join(tmpdir(), 'vtpm-tools-'));
    installation = await Installation.create();
    await installation.start();
    await installation.vtpm('web1');
    tcti = `swtpm:path=${installation.door('web1', 'tcti')}`;
  });
  after(async () => {
    await installation?.destroy();
    rmSync(work, { recursive: true, force: true });
  });

  const file = (name: string) => join(work, name);
  async function tool(name: string, ...args: string[]): Promise<string> {
    const result = await attempt(name, ...args);
    assert.equal(result.code, 0, `${name} ${args.join(' ')}: ${result.stderr}`);
    return result.stdout;
  }
  const attempt = (name: string, ...args: string[]): Promise<Finished> =>
    run(name, args, { TPM2TOOLS_TCTI: tcti, TSS2_LOG: 'all+none' });

  it('getrandom gives other bytes each time', async () => {
    const first = await tool('tpm2_getrandom', '--hex', '16');
    assert.match(first, /^[0-9a-f]{32}$/);
    assert.notEqual(await tool('tpm2_getrandom', '--hex', '16'), first);
  });

  it('createprimary, create, load, sign, verifysignature', async () => {
    writeFileSync(file('message'), 'hello');
    await tool('tpm2_createprimary', '-C', 'o', '-G', 'ecc', '-c', file('primary.ctx'));
    await tool(
      'tpm2_create',
      '-C',
      file('primary.ctx'),
      '-G',
      'ecc256:ecdsa',
      '-u',
      file('key.pub'),
      '-r',
      file('key.priv'),
    );
    await tool(
      'tpm2_load',
      '-C',
      file('primary.ctx'),
      '-u',
      file('key.pub'),
      '-r',
      file('key.priv'),
      '-c',
      file('key.ctx'),
    );
    await tool('tpm2_sign', '-c', file('key.ctx'), '-g', 'sha256', '-o', file('signature'), file('message'));
    const verify = () =>
      attempt(
        'tpm2_verifysignature',
        '-c',
        file('key.ctx'),
        '-g',
        'sha256',
        '-m',
        file('message'),
        '-s',
        file('signature'),
      );
    assert.equal((await verify()).code, 0);
    writeFileSync(file('message'), 'other');
    assert.notEqual((await verify()).code, 0, 'a signature over another message must not verify');
  });

  it('RSA-2048: createprimary, create, load, sign, verifysignature', async () => {
    writeFileSync(file('message'), 'hello');
    await tool('tpm2_createprimary', '-C', 'o', '-G', 'rsa2048', '-c', file('rsa-primary.ctx'));
    await tool(
      'tpm2_create',
      '-C',
      file('rsa-primary.ctx'),
      '-G',
      'rsa2048',
      '-u',
      file('rsa.pub'),
      '-r',
      file('rsa.priv'),
    );
    await tool(
      'tpm2_load',
      '-C',
      file('rsa-primary.ctx'),
      '-u',
      file('rsa.pub'),
      '-r',
      file('rsa.priv'),
      '-c',
      file('rsa.ctx'),
    );
    await tool('tpm2_sign', '-c', file('rsa.ctx'), '-g', 'sha256', '-o', file('signature'), file('message'));
    await tool(
      'tpm2_verifysignature',
      '-c',
      file('rsa.ctx'),
      '-g',
      'sha256',
      '-m',
      file('message'),
      '-s',
      file('signature'),
    );
  });

  it('nvdefine, nvincrement, nvread', async () => {
    await tool(
      'tpm2_nvdefine',
      '0x1500016',
      '-C',
      'o',
      '-s',
      '8',
      '-a',
      'nt=counter|ownerread|ownerwrite|authread|authwrite',
    );
    await tool('tpm2_nvincrement', '0x1500016', '-C', 'o');
    const read = async () => {
      await tool('tpm2_nvread', '0x1500016', '-C', 'o', '-s', '8', '-o', file('counter'));
      return readFileSync(file('counter')).readBigUInt64BE();
    };
    const first = await read();
    await tool('tpm2_nvincrement', '0x1500016', '-C', 'o');
    assert.equal(await read(), first + 1n);
  });

  it('evictcontrol makes a key persistent, and away again', async () => {
    await tool('tpm2_evictcontrol', '-C', 'o', '-c', file('key.ctx'), '0x81000005');
    assert.match(await tool('tpm2_getcap', 'handles-persistent'), /0x81000005/);
    await tool('tpm2_readpublic', '-c', '0x81000005');
    await tool('tpm2_evictcontrol', '-C', 'o', '-c', '0x81000005');
    assert.doesNotMatch(await tool('tpm2_getcap', 'handles-persistent'), /0x81000005/);
  });

  it('pcrextend and pcrread', async () => {
    const read = () => tool('tpm2_pcrread', 'sha256:16');
    const before = await read();
    await tool('tpm2_pcrextend', `16:sha256=${'ab'.repeat(32)}`);
    assert.notEqual(await read(), before);
    assert.match(before, /0x0{64}/);
  });

  it('quote and checkquote', async () => {
    await tool('tpm2_createek', '-c', file('ek.ctx'), '-G', 'rsa', '-u', file('ek.pub'));
    await tool(
      'tpm2_createak',
      '-C',
      file('ek.ctx'),
      '-c',
      file('ak.ctx'),
      '-G',
      'ecc',
      '-g',
      'sha256',
      '-s',
      'ecdsa',
      '-u',
      file('ak.pub'),
      '-f',
      'pem',
    );
    await tool(
      'tpm2_quote',
      '-c',
      file('ak.ctx'),
      '-l',
      'sha256:16',
      '-q',
      'abcd',
      '-m',
      file('quote'),
      '-s',
      file('quote.sig'),
      '-o',
      file('pcrs'),
      '-g',
      'sha256',
    );
    const check = (nonce: string) =>
      attempt(
        'tpm2_checkquote',
        '-u',
        file('ak.pub'),
        '-m',
        file('quote'),
        '-s',
        file('quote.sig'),
        '-f',
        file('pcrs'),
        '-g',
        'sha256',
        '-q',
        nonce,
      );
    assert.equal((await check('abcd')).code, 0);
    assert.notEqual((await check('abce')).code, 0, 'a quote with another nonce must not check');
  });

  it('unseal gives the secret back under its PCR policy, and not after the PCR changed', async () => {
    await tool('tpm2_pcrread', 'sha256:16', '-o', file('pcr16'));
    await tool(
      'tpm2_createpolicy',
      '--policy-pcr',
      '-l',
      'sha256:16',
      '-f',
      file('pcr16'),
      '-L',
      file('policy'),
    );
    writeFileSync(file('secret'), 'sealed secret');
    await tool(
      'tpm2_create',
      '-C',
      file('primary.ctx'),
      '-i',
      file('secret'),
      '-L',
      file('policy'),
      '-u',
      file('s.pub'),
      '-r',
      file('s.priv'),
    );
    await tool(
      'tpm2_load',
      '-C',
      file('primary.ctx'),
      '-u',
      file('s.pub'),
      '-r',
      file('s.priv'),
      '-c',
      file('s.ctx'),
    );
    assert.equal(await tool('tpm2_unseal', '-c', file('s.ctx'), '-p', 'pcr:sha256:16'), 'sealed secret');
    await tool('tpm2_pcrextend', `16:sha256=${'cd'.repeat(32)}`);
    assert.notEqual((await attempt('tpm2_unseal', '-c', file('s.ctx'), '-p', 'pcr:sha256:16')).code, 0);
  });

  it('leaves no transient object or session behind when a client goes away', async () => {
    for (let i = 0; i < 8; i++)
      await tool('tpm2_createprimary', '-C', 'o', '-G', 'ecc', '-c', file(`again${i}.ctx`));
    assert.equal((await tool('tpm2_getcap', 'handles-transient')).trim(), '');
    assert.equal((await tool('tpm2_getcap', 'handles-loaded-session')).trim(), '');
  });

  it('lets two clients at once keep what each has loaded', async () => {
    const chain = async (client: string) => {
      for (let i = 0; i < 4; i++) {
        await tool('tpm2_createprimary', '-C', 'o', '-G', 'ecc', '-c', file(`${client}.ctx`));
        await tool('tpm2_readpublic', '-c', file(`${client}.ctx`));
      }
    };
    await Promise.all([chain('first'), chain('second')]);
  });

  it('works the same through vtpmctl exec, which passes the exit code on', async () => {
    const random = await installation.ctl('exec', 'web1', '--', 'tpm2_getrandom', '--hex', '8');
    assert.equal(random.code, 0, random.stderr);
    assert.match(random.stdout, /^[0-9a-f]{16}$/);
    assert.equal((await installation.ctl('exec', 'web1', '--', 'sh', '-c', 'exit 7')).code, 7);
  });

  it('works the same through the stdio bridge for the cmd TCTI', async () => {
    const bridge = `cmd:${process.execPath} ${new URL('../../../frontend-driver/bin/vtpm-frontend.js', import.meta.url).pathname} stdio ${installation.door('web1')}`;
    const read = await run('tpm2_pcrread', ['sha256:16', '-o', file('over-cmd')], {
      TPM2TOOLS_TCTI: bridge,
      TSS2_LOG: 'all+none',
    });
    assert.equal(read.code, 0, read.stderr);
    await tool('tpm2_pcrread', 'sha256:16', '-o', file('over-swtpm'));
    assert.deepEqual(readFileSync(file('over-cmd')), readFileSync(file('over-swtpm')));
  });
});
