import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { REPOSITORY, run } from '../support/installation.js';
import { startRecordingProxy } from '../support/recording-proxy.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { assertNothingLeaked, connectTpm } from '../support/tpm-fixture.js';

const PACKAGE = join(REPOSITORY, 'tpm2-ts-bindings');
const NAMES = ['random', 'seal', 'quote', 'credential', 'counter', 'duplicate'];

describe('tpm2-ts-bindings: examples', () => {
  let swtpm: Swtpm;
  let other: Swtpm;
  before(async () => {
    swtpm = await startSwtpm();
    other = await startSwtpm();
  });
  afterEach(async () => {
    for (const { socket } of [swtpm, other]) {
      const tpm = await connectTpm(socket);
      await assertNothingLeaked(tpm);
      await tpm.close();
    }
  });
  after(async () => {
    await swtpm?.stop();
    await other?.stop();
  });

  const attempt = (name: string, ...args: string[]) =>
    run(process.execPath, [join(PACKAGE, 'examples/dist', `${name}.js`), ...args]);
  async function example(name: string, ...args: string[]): Promise<string> {
    const { code, stdout, stderr } = await attempt(name, ...args);
    assert.equal(stderr, '');
    assert.equal(code, 0);
    return stdout;
  }

  it('are short, and the README shows all of them as they are', () => {
    const files = readdirSync(join(PACKAGE, 'examples')).filter((name) => name.endsWith('.ts'));
    assert.deepEqual(files.sort(), NAMES.map((name) => `${name}.ts`).sort());
    const readme = readFileSync(join(PACKAGE, 'README.md'), 'utf8');
    for (const name of NAMES) {
      const text = readFileSync(join(PACKAGE, 'examples', `${name}.ts`), 'utf8');
      assert.ok(text.split('\n').length <= 61, `${name} is longer than 60 lines`);
      const [, block] = readme.split(`](examples/${name}.ts)`)[1]?.split(/^```(?:ts)?\n/m) ?? [];
      assert.equal(block, text, `the README shows another ${name}.ts`);
    }
  });

  it('random: who made the TPM, and other bytes each time', async () => {
    const shape = /^manufacturer: IBM\nrandom: ([0-9a-f]{64})\n$/;
    const first = shape.exec(await example('random', swtpm.socket))?.[1];
    const second = shape.exec(await example('random', swtpm.socket))?.[1];
    assert.ok(first !== undefined && second !== undefined && first !== second);
  });

  it('seal: opens in the same state only, readable nowhere on the bus, under the trusted key alone', async () => {
    const bus = await startRecordingProxy(swtpm.socket);
    try {
      const out = await example('seal', bus.path);
      const [, name] =
        /^storage key: (000b[0-9a-f]{64})\nunsealed: a secret\nPCR 16 extended: .*POLICY_FAIL.*\n$/.exec(
          out,
        ) ?? [];
      assert.ok(name !== undefined, out);
      assert.equal(bus.saw(Buffer.from('a secret')), false);
      assert.match(await example('seal', bus.path, name), /unsealed: a secret/);

      bus.forget();
      const other = await attempt(
        'seal',
        bus.path,
        name.replace(/.$/, (last) => (last === '0' ? '1' : '0')),
      );
      assert.equal(other.code, 1);
      assert.match(other.stderr, /another key than the trusted one/);
    } finally {
      await bus.close();
    }
  });

  it('quote: verifies for its nonce, and for no other', async () => {
    const out = await example('quote', swtpm.socket);
    assert.match(out, /^verified: PCR digest [0-9a-f]{64}\nrefused: quote: made for another nonce\n$/);
  });

  it('credential: of the endorsement key that tpm2-tools make, which gives the challenge out', async () => {
    const file = join(swtpm.directory, 'ek.pub');
    const env = { TPM2TOOLS_TCTI: `swtpm:path=${swtpm.socket}` };
    const made = await run('tpm2_createek', ['-G', 'ecc', '-c', '-', '-f', 'tss', '-u', file], env);
    assert.equal(made.code, 0, made.stderr);
    // TPM2B_PUBLIC: without its size it is what the Name is over.
    const name = createHash('sha256').update(readFileSync(file).subarray(2)).digest('hex');
    assert.equal(
      await example('credential', swtpm.socket),
      `endorsement key: 000b${name}\nit holds the attestation key\n`,
    );
  });

  it('counter: made once, one more each time, and not with another password', async () => {
    const first = /^made\ncounter: (\d+)\n$/.exec(await example('counter', swtpm.socket))?.[1];
    assert.ok(first !== undefined);
    assert.equal(await example('counter', swtpm.socket), `counter: ${BigInt(first) + 1n}\n`);
    const wrong = await attempt('counter', swtpm.socket, 'wrong');
    assert.equal(wrong.code, 1);
    assert.match(wrong.stderr, /TPM_RC_(BAD_AUTH|AUTH_FAIL)/);
    assert.equal(await example('counter', swtpm.socket), `counter: ${BigInt(first) + 2n}\n`);
  });

  it('duplicate: the key signs in the second TPM', async () => {
    assert.equal(await example('duplicate', swtpm.socket, other.socket), 'verifies: true\n');
  });
});
