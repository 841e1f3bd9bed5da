import assert from 'node:assert/strict';
import { once } from 'node:events';
import { cpSync, mkdtempSync, renameSync, rmSync } from 'node:fs';
import { type IncomingMessage, request } from 'node:http';
import { type AddressInfo, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ManagerError } from 'vtpm-manager';
import { createAnchoredStore, openAnchoredStore } from 'vtpm-manager/store/index';
import { ManagerInstallation } from '../support/manager-process.js';
import { MemoryStore, storeFull } from '../support/memory-store.js';
import { storeProcesses } from '../support/store-processes.js';
import { anchorOptions, testKeys } from '../support/test-keys.js';
import { until } from '../support/until.js';
import { testVtpm } from '../support/worker-client.js';
import { identityOf, LyingTpm } from './peer-fixture.js';

describe('the store after its process ended', () => {
  let manager: ManagerInstallation;
  let aside: string;

  beforeEach(() => {
    manager = new ManagerInstallation();
    aside = mkdtempSync(join(tmpdir(), 'vtpm-aside-'));
  });
  afterEach(async () => {
    await manager.remove();
    rmSync(aside, { recursive: true });
  });

  /** A vTPM at generation 2; `aside` has the store's file as it was at generation 1. */
  async function withOldCopy() {
    const managerId = String((await manager.init('embedded')).managerId);
    await manager.start();
    const image = { digest: manager.toolstack.imageDigest.toString('hex'), note: '' };
    await manager.admin('POST', '/images', image);
    const vtpm = testVtpm();
    const worker = manager.worker(managerId);
    const grant = await worker.load(manager.toolstack.ticket(worker.managerId, vtpm, worker.keys.publicKey));
    const session = await worker.session(vtpm, grant);
    await session.save({ permanent: Buffer.from('P1') });
    cpSync(join(manager.paths.store, 'data.mdb'), join(aside, 'data.mdb'));
    await session.save({ permanent: Buffer.from('P2') });
    worker.close();
  }

  function endStoreProcess(): void {
    const pids = storeProcesses(manager.paths.store);
    assert.ok(pids.length > 0, 'there is a store process');
    for (const pid of pids) {
      try {
        process.kill(pid, 'SIGKILL');
      } catch {
        // bubblewrap takes along what it runs.
      }
    }
  }

  it('I-5 an older store that was put in place meanwhile is refused by name', async () => {
    await withOldCopy();
    renameSync(join(aside, 'data.mdb'), join(manager.paths.store, 'data.mdb'));
    endStoreProcess();
    const said = /rollback-detected|the store was verified and is open again/;
    await until('the manager has looked at the store', () => said.test(manager.stderr));
    const { body } = await manager.admin('GET', '/health');
    assert.equal(body.status, 'locked');
    assert.equal(body.reason, 'rollback-detected');
  });

  it('the same store is served again', async () => {
    await withOldCopy();
    endStoreProcess();
    await until('the store is open again', () => manager.stderr.includes('is open again'));
    const { body } = await manager.admin('GET', '/vtpms');
    assert.equal((body.vtpms as { generation: number }[])[0]?.generation, 2);
  });

  it('who follows the events is told that none come from there any more', async () => {
    await withOldCopy();
    const call = request({ socketPath: manager.paths.adminSocket, path: '/events' }).end();
    const [stream] = (await once(call, 'response')) as [IncomingMessage];
    const ended = once(stream.resume(), 'end');
    endStoreProcess();
    await ended;
    await until('the store is open again', () => manager.stderr.includes('is open again'));
  });

  it('is noticed while the start asks other hosts, which are asked again before a worker is let in', async () => {
    await manager.init('embedded');
    await manager.start();
    const own = (await manager.admin('GET', '/identity')).body.identity as string;
    const [identity, ekFingerprint] = identityOf(own, new LyingTpm());
    // It says nothing, then it hangs up. Each of its addresses is given up after five seconds.
    const sockets: Socket[] = [];
    let isSilent = true;
    const servers = [1, 2, 3, 4].map((host) =>
      createServer((socket) => (isSilent ? sockets.push(socket) : socket.destroy())).listen(
        0,
        `127.0.0.${host}`,
      ),
    );
    const asked = () => once(servers[0]!, 'connection');
    const hangUp = () => {
      isSilent = false;
      for (const socket of sockets.splice(0)) socket.destroy();
    };
    const opened = () => manager.stderr.split('is open again').length - 1;
    try {
      await Promise.all(servers.map((server) => once(server, 'listening')));
      const addresses = servers.map((server) => {
        const { address, port } = server.address() as AddressInfo;
        return `${address}:${port}`;
      });
      const peer = { name: 'b', identity, ekFingerprint, addresses };
      assert.equal((await manager.admin('POST', '/peers', peer)).status, 201);
      await manager.stop();
      const first = asked();
      const started = manager.start({ args: ['--ask-peers-at-start', '60'] });
      await first;
      // Had the start not waited, it would be over by now.
      await once(servers[1]!, 'connection');
      const again = asked();
      endStoreProcess();
      assert.equal((await started).status, 'locked');
      await again;
      assert.equal((await manager.admin('GET', '/vtpms')).status, 503);
      hangUp();
      await until('the store is open again', () => opened() === 1);
      assert.equal((await manager.admin('GET', '/vtpms')).status, 200);
      endStoreProcess();
      await until('the store is open again', () => opened() === 2);
      await asked();
    } finally {
      for (const server of servers) server.close();
      hangUp();
    }
  });

  it('a commit of which nobody knows whether it happened may be there or not', async () => {
    const keys = testKeys();
    for (const isThere of [true, false]) {
      const disk = new MemoryStore();
      const anchor = anchorOptions(keys);
      const store = await createAnchoredStore(disk, anchor);
      await store.write('vtpm/a', 0, Buffer.from('1'));
      const commit = disk.commit.bind(disk);
      disk.commit = async (writes) => {
        if (isThere) await commit(writes);
        throw new ManagerError('internal', 'the store process ended');
      };
      await assert.rejects(store.write('vtpm/a', 1, Buffer.from('2')));
      disk.commit = commit;
      const again = await openAnchoredStore(disk, anchor, store.roots);
      assert.equal((await again.read('vtpm/a'))?.value.toString(), isThere ? '2' : '1');
    }
  });

  it('a full disk leaves one state only', async () => {
    const keys = testKeys();
    const disk = new MemoryStore();
    const store = await createAnchoredStore(disk, anchorOptions(keys));
    disk.beforeCommit = storeFull;
    await assert.rejects(store.write('vtpm/a', 0, Buffer.from('1')));
    assert.equal(store.roots.length, 1);
  });
});
