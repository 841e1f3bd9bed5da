import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { createConnection } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Installation } from '../support/installation.js';
import { EXTENDS, extendedWith, ProxyGuest } from '../support/proxy-guest.js';
import { TpmClient } from '../support/tpm-client.js';
import { pcrRead } from '../support/tpm-commands.js';

describe("a kernel's own TPM that a vTPM answers for (test:long)", function () {
  this.timeout(600_000);
  let installation: Installation;
  let directory: string;
  let guest: ProxyGuest | undefined;

  before(async () => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-vtpmx-'));
    installation = await Installation.create({ tpm: 'embedded' });
    await installation.start();
  });
  after(async () => {
    await guest?.stop();
    await installation.destroy();
    rmSync(directory, { recursive: true, force: true });
  });

  it('is /dev/tpm0 of a Linux guest, for programs and for tpm2-tools, over a kill -9 of the worker', async () => {
    const door = await installation.vtpm('web1');
    guest = ProxyGuest.start(directory, door);
    await guest.says(/PROXY \/dev\/tpm0/);
    await guest.says(/EXTENDED 1 /);
    process.kill(await installation.workerPid('web1'), 'SIGKILL');
    await guest.says(/EXTENDED 5 /);
    for (const [, code] of guest.console.matchAll(/EXTENDED \d ....(?:.{8})(.{8})/g))
      assert.equal(code, '00000000');
    await guest.says(/RANDOM 8001.{8}000000000008[0-9a-f]{16}/);
    await guest.says(/TOOL [0-9a-f]{16}/);
    await guest.says(/GONE/);
    await guest.ended;
    let expected = Buffer.alloc(32);
    for (let count = 1; count <= EXTENDS; count++) {
      const digest = Buffer.from(extendedWith(count), 'hex');
      expected = createHash('sha256').update(expected).update(digest).digest();
    }
    const client = new TpmClient(createConnection(door));
    const answer = await client.transmit(pcrRead(16));
    assert.equal(answer.toString('hex', answer.length - 32), expected.toString('hex'), 'each extend once');
    client.close();
  });
});
