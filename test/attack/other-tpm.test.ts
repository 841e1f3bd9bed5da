import assert from 'node:assert/strict';
import { cpSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Enrolment } from 'vtpm-manager/enrolment';
import { startSwtpm } from '../support/swtpm.js';
import type { TestVtpm } from '../support/worker-client.js';
import { Target } from './target.js';

const SRK_GONE = /the storage root key at 0x81000001 is gone: this is another TPM, or it was cleared/;
const SRK_CHANGED = /the storage root key at 0x81000001 is not the enrolled one/;

/** A disk, all of it, in front of a TPM that is not as the one was that it was written with. */
describe('attack: the disk without its TPM', () => {
  let target: Target;
  let web: TestVtpm;
  let disk: string;
  /** The memory of the TPM that belongs to the disk. */
  let memory: string;
  let files: string;

  before(async () => {
    target = await Target.create({ tpm: await startSwtpm() });
    await target.starts();
    web = await target.vtpm('web 1');
    assert.equal(await target.manager.stop(), 0);
    disk = target.keep();
    memory = mkdtempSync(join(tmpdir(), 'vtpm-memory-'));
    files = mkdtempSync(join(tmpdir(), 'vtpm-tools-'));
    await withMemory((directory) => cpSync(directory, memory, { recursive: true, filter: isMemory }));
  });
  afterEach(() => target.manager.stop('SIGKILL'));
  after(async () => {
    await target?.destroy();
    await target?.tpm?.stop();
    for (const directory of [memory, files]) rmSync(directory, { recursive: true, force: true });
  });

  /** Between two runs of the TPM. */
  async function withMemory(change: (directory: string) => void): Promise<void> {
    const { tpm } = target;
    assert.ok(tpm);
    await tpm.kill();
    change(tpm.directory);
    await tpm.restart();
  }

  function isMemory(path: string): boolean {
    return !/\.(sock|ctrl|lock)$/.test(path);
  }

  const forget = (directory: string): void => {
    for (const name of readdirSync(directory)) if (isMemory(name)) rmSync(join(directory, name));
  };

  /** The positive control: the same disk, and its own TPM in the same place. */
  async function startsWithItsOwn(): Promise<void> {
    target.putBack(disk);
    await withMemory((directory) => {
      forget(directory);
      cpSync(memory, directory, { recursive: true });
    });
    await target.starts();
    assert.equal((await target.view(web)).generation, 1);
    await target.manager.stop('SIGKILL');
    target.putBack(disk);
  }

  const enrolment = (): Enrolment =>
    JSON.parse(readFileSync(target.manager.paths.enrolment, 'utf8')).enrolment;

  it('I-6 a stolen disk in front of another TPM is refused, also when that one is set up alike', async () => {
    await withMemory(forget);
    await target.refuses('tpm-emptied', SRK_GONE);
    const thief = await Target.create({ tpm: target.tpm! });
    await target.refuses('tpm-changed', SRK_CHANGED);
    // The thief names his own key in the enrolment, and puts his own sealed secret there too.
    const { enrolment: own } = JSON.parse(readFileSync(thief.manager.paths.enrolment, 'utf8'));
    const path = target.manager.paths.enrolment;
    const file = JSON.parse(readFileSync(path, 'utf8'));
    file.enrolment.tpm.srkName = own.tpm.srkName;
    writeFileSync(path, JSON.stringify(file));
    await target.refuses('tpm-emptied', /which holds a half of the root key, is gone/);
    file.enrolment.tpm.root = own.tpm.root;
    writeFileSync(path, JSON.stringify(file));
    await target.refuses('store-corrupt', /enrolment.json was changed since it was written/);
    // With all of his own it opens, and none of it opens the stolen store.
    cpSync(thief.manager.paths.enrolment, path);
    await target.refuses('store-corrupt', /its anchor was not written by this installation's TPM key/);
    await thief.destroy();
    await startsWithItsOwn();
  });

  it('I-6 a TPM that was cleared is refused, also when another installation was made with it then', async () => {
    await target.tool('tpm2_clear');
    await target.refuses('tpm-emptied', SRK_GONE);
    const other = await Target.create({ tpm: target.tpm! });
    await target.refuses('tpm-changed', SRK_CHANGED);
    await other.starts();
    await other.destroy();
    await startsWithItsOwn();
  });

  it('I-5 the counter taken out of the TPM by its owner is refused, and never made anew by itself', async () => {
    const { handle } = enrolment().tpm.anchor;
    const index = `0x${handle.toString(16)}`;
    await target.tool('tpm2_nvundefine', '-C', 'o', index);
    await target.refuses('anchor-removed', /vtpmctl recover --accept-rollback/);
    await target.refuses('anchor-removed', /is gone: it was removed or the TPM was cleared/);
    const attributes = 'authwrite|authread|no_da|nt=1';
    await target.tool('tpm2_nvdefine', index, '-C', 'o', '-s', '8', '-a', attributes, '-p', 'guess');
    await target.tool('tpm2_nvincrement', index, '-C', index, '-P', 'guess');
    await target.refuses('tpm-changed', /was made anew with another secret/);
    await startsWithItsOwn();
  });

  it('I-5 a TPM whose memory was put back is refused: its counter is behind the anchor', async () => {
    // Two steps: one could be the step that a crash has left out.
    for (const note of [1, 2]) {
      await target.starts();
      await target.allowImage(Buffer.alloc(32, note));
      assert.equal(await target.manager.stop(), 0);
    }
    await withMemory((directory) => cpSync(memory, directory, { recursive: true }));
    await target.refuses('rollback-detected', /the TPM's memory was put back, or it is another TPM/);
    await startsWithItsOwn();
  });

  /** Unseals the secret of the enrolment with tpm2-tools. @param auth of the unsealing @throws with what the tool says */
  async function unseal(...auth: string[]): Promise<Buffer> {
    const { root, srkHandle } = enrolment().tpm;
    const file = (name: string): string => join(files, name);
    for (const [name, base64] of [
      ['sealed.pub', root.sealedPublic],
      ['sealed.priv', root.sealedPrivate],
    ] as const) {
      const bytes = Buffer.from(base64, 'base64');
      // TPM2B: the size is in front.
      writeFileSync(file(name), Buffer.concat([Buffer.of(bytes.length >> 8, bytes.length & 0xff), bytes]));
    }
    const parent = `0x${srkHandle.toString(16)}`;
    const blobs = ['-u', file('sealed.pub'), '-r', file('sealed.priv'), '-c', file('sealed.ctx')];
    await target.tool('tpm2_load', '-C', parent, ...blobs);
    await target.tool('tpm2_flushcontext', '-t');
    try {
      await target.tool('tpm2_unseal', '-c', file('sealed.ctx'), ...auth, '-o', file('out'));
      return readFileSync(file('out'));
    } finally {
      await target.tool('tpm2_flushcontext', '-t');
    }
  }

  /** Reads the other half of the root key. @param auth of the reading */
  async function readHalf(...auth: string[]): Promise<Buffer> {
    const index = `0x${enrolment().tpm.root.nvHandle.toString(16)}`;
    await target.tool(
      'tpm2_nvread',
      index,
      ...(auth.length > 0 ? auth : ['-C', index]),
      '-o',
      join(files, 'half'),
    );
    return readFileSync(join(files, 'half'));
  }

  /** In a policy session on the selected registers as they are now. */
  async function underPolicy(body: (auth: string) => Promise<Buffer>): Promise<Buffer> {
    const session = join(files, 'session');
    await target.tool('tpm2_startauthsession', '--policy-session', '-S', session);
    try {
      await target.tool('tpm2_policypcr', '-S', session, '-l', enrolment().tpm.root.pcrSelection);
      return await body(`session:${session}`);
    } finally {
      await target.tool('tpm2_flushcontext', session);
    }
  }

  it('I-6 an independent program with the blobs and the TPM, but other PCRs, is refused by the chip', async function () {
    this.timeout(120_000);
    const index = `0x${enrolment().tpm.root.nvHandle.toString(16)}`;
    const secret = () => underPolicy((auth) => unseal('-p', auth));
    const half = () => underPolicy((auth) => readHalf('-C', index, '-P', auth));
    const refused = /policy check failed|0x99d/i;
    assert.equal((await secret()).length, 32, 'positive control: the enrolled PCRs open it');
    assert.equal((await half()).length, 32);

    await target.tool('tpm2_pcrextend', `7:sha256=${'5a'.repeat(32)}`);
    await assert.rejects(secret(), refused);
    await assert.rejects(half(), refused);
    const health = await target.manager.start();
    assert.equal(health.reason, 'platform-policy');
    assert.match(String(health.message), /sha256:7/);
    await target.manager.stop();

    // A reset of the TPM brings the enrolled values back.
    await withMemory(() => undefined);
    assert.equal((await secret()).length, 32);
    await target.starts();
  });

  it('I-6 the empty authorisation opens neither half', async () => {
    // TPM_RC_AUTH_UNAVAILABLE, and TPM_RC_NV_AUTHORIZATION: the owner writes the half and does not read it.
    await assert.rejects(unseal(), /\(0x0000012f\)/i);
    await assert.rejects(readHalf(), /\(0x0000012f\)/i);
    await assert.rejects(readHalf('-C', 'o'), /\(0x00000149\)/i);
    // Positive control: so is opened what the empty authorisation does open.
    const [input, pub, priv] = ['in', 'open.pub', 'open.priv'].map((name) => join(files, name));
    writeFileSync(input!, 'not much of a secret');
    await target.tool('tpm2_create', '-C', '0x81000001', '-i', input!, '-u', pub!, '-r', priv!);
    await target.tool('tpm2_flushcontext', '-t');
    const context = join(files, 'open.ctx');
    await target.tool('tpm2_load', '-C', '0x81000001', '-u', pub!, '-r', priv!, '-c', context);
    await target.tool('tpm2_flushcontext', '-t');
    assert.equal(await target.tool('tpm2_unseal', '-c', context), 'not much of a secret');
    await target.tool('tpm2_flushcontext', '-t');
  });
});
