import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { Talk } from 'vtpm-manager/migration/talk';
import { uuidToBytes } from 'vtpm-proto';
import { HostileHost } from '../support/hostile-host.js';
import { migrate } from '../support/migrate.js';
import { MovingVtpm } from '../support/moving-vtpm.js';
import { Host, TwoHosts } from '../support/two-hosts.js';
import { loopbackPlace } from '../support/two-networks.js';

const LIMIT_MS = 30_000;

describe('I-3 a third host that both others know', () => {
  let hosts: TwoHosts;
  let third: Host;
  let hostile: HostileHost;
  let vtpm: MovingVtpm;

  before(async () => {
    hosts = await TwoHosts.create({ isLocal: true });
    third = await Host.create('c', await loopbackPlace('127.0.0.4'));
    await third.start();
    await hosts.b.know(third);
    await third.know(hosts.b);
    vtpm = await MovingVtpm.create(hosts, 'web1');
    hostile = await HostileHost.takeOver(third);
  });

  after(async () => {
    await vtpm?.destroy();
    await hostile?.close();
    await third?.installation.destroy();
    await hosts?.destroy();
  });

  const ask = async (migrationId: Uint8Array): Promise<string> => {
    const talk = new Talk(await hostile.dial(hosts.b), 'source');
    const vtpmUuid = uuidToBytes(vtpm.id);
    await talk.send('INQUIRE', { migrationId, vtpmUuid, epoch: 1n, generation: 1n });
    try {
      const { value } = await talk.receive('DECISION', LIMIT_MS);
      return `told ${value.decision.length} bytes`;
    } catch (error) {
      return (error as { code: string }).code;
    } finally {
      talk.channel.close();
    }
  };

  it('ends nobody else’s migration by asking what came of it', async () => {
    const migrationId = randomBytes(16);
    vtpm.load();
    hosts.a.manager.stopAt('migrate.source.depart', 'wait');
    const migration = migrate(hosts.a, hosts.b, 'web1', { changes: { migrationId } });
    await hosts.a.manager.reached('migrate.source.depart');
    assert.equal(await ask(migrationId), 'unknown-migration');
    hosts.a.manager.release();
    assert.equal((await migration).at(-1)?.phase, 'COMMITTED');
    vtpm.host = hosts.b;
    await vtpm.goOn(false);
    assert.equal(await ask(migrationId), 'unknown-migration');
  });
});
