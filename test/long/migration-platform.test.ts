import assert from 'node:assert/strict';
import { join } from 'node:path';
import { type MigrateOptions, migrate, NotMigrated } from '../support/migrate.js';
import { MovingVtpm } from '../support/moving-vtpm.js';
import { TwoHosts } from '../support/two-hosts.js';

/** With managers and chips as they are installed. `migration-attestation` has what can be shown of a host, case by case. */
describe('I-3 I-6 a destination that the source does not trust as it is', () => {
  let hosts: TwoHosts;
  let vtpm: MovingVtpm;

  before(async () => {
    hosts = await TwoHosts.create({ isLocal: true });
    vtpm = await MovingVtpm.create(hosts, 'web1');
  });
  after(async () => {
    await vtpm?.destroy();
    await hosts?.destroy();
  });
  /** How it is refused: before the freeze, while the guest is served, which has lost nothing. */
  const refusal = async (options: MigrateOptions = {}): Promise<string> => {
    const { a, b } = hosts;
    vtpm.load();
    try {
      const lines = await migrate(a, b, vtpm.name, options);
      assert.ok(!lines.some(({ phase }) => phase === 'FREEZING'));
      assert.equal(lines.at(-1)?.phase, 'ABORTED');
      return lines.at(-1)?.reason ?? '';
    } catch (error) {
      assert.ok(error instanceof NotMigrated, String(error));
      return error.code;
    } finally {
      await vtpm.moreRounds();
      await vtpm.pause();
      await vtpm.check();
    }
  };
  const atA = (...args: string[]) => hosts.a.installation.ctlJson('peer', ...args);

  it('whose platform is not approved any more: peer-platform', async () => {
    const { platforms } = (await atA('show', 'b')) as {
      platforms: { pcrSelection: string; pcrDigest: string }[];
    };
    const named = platforms.map(({ pcrSelection, pcrDigest }) => `${pcrSelection}=${pcrDigest}`);
    assert.equal(named.length, 1);
    await atA('approve', 'b', '--withdraw', named[0]!);
    assert.equal(await refusal(), 'peer-platform');
    assert.equal(await refusal({ dryRun: true }), 'peer-platform');
    await atA('approve', 'b', '--pcrs', named[0]!);
  });

  it('with another TPM than the one whose fingerprint was given: peer-ek, and it is no peer', async () => {
    const { a, b } = hosts;
    await atA('remove', 'b');
    const { endorsement } = await a.identify();
    // As it was carried here, when it was made a peer.
    const file = join(a.installation.directory, 'b.peer');
    const how = ['--address', b.address(), '--ek-fingerprint', endorsement.fingerprint, '--approve-current'];
    await assert.rejects(atA('add', 'b', file, ...how), /peer-ek/);
    assert.equal(await refusal(), 'unknown-peer');
    await a.know(b);
  });

  it('that has forgotten the source: peer-closed', async () => {
    await hosts.b.installation.ctlJson('peer', 'remove', 'a');
    assert.equal(await refusal(), 'peer-closed');
    await hosts.b.know(hosts.a);
  });

  it('that is started anew between what it showed and the state', async () => {
    const { b } = hosts;
    b.manager.stopAt('migrate.destination.unwrapped', 'wait');
    const refused = refusal();
    await b.manager.reached('migrate.destination.unwrapped');
    await Promise.all([b.installation.killManager(), b.installation.killSupervisor()]);
    await b.installation.tpm?.restart();
    b.manager.release();
    assert.equal(await refused, 'peer-closed');
    await b.start();
  });

  it('and goes there once it is trusted', async () => {
    await vtpm.move();
  });
});
