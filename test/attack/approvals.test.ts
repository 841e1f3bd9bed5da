import assert from 'node:assert/strict';
import { createHash, generateKeyPairSync } from 'node:crypto';
import { type ApprovalRequest, signApproval } from 'tpm2-ts-bindings';
import { Target } from './target.js';

const PCR = 'sha256:7';
const NEXT = 'ab'.repeat(32);

/** The chip counts revocations, so that no disk gives an approval back. */
describe('attack: approvals that were revoked are put back', () => {
  const keys = generateKeyPairSync('ec', { namedCurve: 'P-256' });
  const authority = keys.publicKey.export({ type: 'spki', format: 'pem' }) as string;
  const privateKey = keys.privateKey.export({ type: 'pkcs8', format: 'pem' }) as string;
  let target: Target;
  let [old, newest]: string[] = [];

  /** Other software is booted: extends the register, which a reset of the TPM takes back. */
  const boot = () => target.tool('tpm2_pcrextend', `7:sha256=${NEXT}`);

  /** What the authority is to sign. */
  async function request(label: string, more: object = {}): Promise<ApprovalRequest> {
    return (await target.platform('requests', { label, ...more })) as unknown as ApprovalRequest;
  }

  before(async () => {
    target = await Target.create();
    await target.starts();
    const now = await request('firmware 1');
    await target.platform('approvals', { approval: signApproval(now, privateKey), authority });
    await target.platform('policy', { authority });
    const before = Buffer.from(now.pcrs[PCR] ?? '', 'hex');
    const after = createHash('sha256').update(before).update(Buffer.from(NEXT, 'hex')).digest('hex');
    const lost = await request('lost laptop', { pcrs: { [PCR]: after } });
    await target.platform('approvals', { approval: signApproval(lost, privateKey) });
    assert.equal(await target.manager.stop(), 0);
    await boot();
    await target.starts();
    assert.equal(await target.manager.stop(), 0);
    await target.tpm?.restart();
    await target.starts();
    assert.equal(await target.manager.stop(), 0);
    old = target.keep();
    await target.starts();
    const survivor = signApproval(await request('firmware 1', { next: true }), privateKey);
    const { revoked } = await target.platform('revocations', { survivors: [survivor] });
    assert.deepEqual(revoked, ['lost laptop']);
    assert.equal(await target.manager.stop(), 0);
    newest = target.keep();
  });
  afterEach(async () => {
    await target.manager.stop('SIGKILL');
    await target.tpm?.restart();
    target.putBack(newest!);
  });
  after(async () => {
    await target?.destroy();
    await target?.tpm?.stop();
  });

  async function staysLocked(message: RegExp): Promise<void> {
    const health = await target.manager.start();
    assert.equal(health.status, 'locked');
    assert.equal(health.reason, 'platform-policy');
    assert.match(String(health.message), message);
    assert.equal((await target.manager.admin('GET', '/vtpms')).status, 503);
    assert.equal(await target.manager.stop(), 0);
  }

  it('I-6 with the whole old disk', async () => {
    target.putBack(old!);
    await staysLocked(/every approval of these PCR values was revoked, the last one "firmware 1"/);
    target.putBack(newest!);
    await target.starts();
  });

  it('I-6 with the file alone, for who boots what was approved once', async () => {
    target.putBack(old!, 'approvals');
    await boot();
    await staysLocked(/every approval of these PCR values was revoked, the last one "lost laptop"/);
    await target.tpm?.restart();
    target.putBack(newest!);
    await target.starts();
  });
});
