import assert from 'node:assert/strict';
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { type AuditHead, EMPTY_HEAD } from 'vtpm-manager/audit/index';
import { AuditFixture, load } from './audit-fixture.js';

const WRITER = fileURLToPath(new URL('./audit-writer.js', import.meta.url));
const SEGMENT_BYTES = 20_000;

describe('I-4 an audit log whose manager is killed', () => {
  let fixture: AuditFixture;
  let child: ChildProcess | undefined;
  beforeEach(() => {
    fixture = new AuditFixture();
  });
  afterEach(async () => {
    if (child && child.exitCode === null && child.signalCode === null) {
      child.kill('SIGKILL');
      await once(child, 'exit');
    }
    await fixture.destroy();
  });

  /** @returns the last acknowledged head of a writer that is killed after `acknowledgements` of them */
  async function killedAfter(acknowledgements: number, program: readonly string[] = []): Promise<AuditHead> {
    const args = [process.execPath, ...program, WRITER, fixture.path];
    const [command = '', ...rest] = [...args, fixture.key.key.toString('hex'), `${SEGMENT_BYTES}`, '1000000'];
    child = spawn(command, rest, { stdio: ['ignore', 'pipe', 'inherit'] });
    let last = EMPTY_HEAD;
    let count = 0;
    for await (const line of createInterface({ input: child.stdout! })) {
      const [length = '', digest = ''] = line.split(' ');
      last = { length: BigInt(length), digest: Buffer.from(digest, 'hex') };
      if (++count === acknowledgements) child.kill('SIGKILL');
    }
    return last;
  }

  async function assertWhole(acknowledged: AuditHead): Promise<void> {
    // An anchor from anywhere before.
    for (const anchored of [EMPTY_HEAD, acknowledged]) {
      const { log, unanchored } = await fixture.open(anchored);
      assert.ok(log.head.length >= acknowledged.length, 'every acknowledged entry is there');
      assert.equal(unanchored, log.head.length - anchored.length);
      const numbers = (await log.tail(1_000_000)).map(({ n, generation }) => n - (generation ?? 0n));
      assert.equal(numbers.length, Number(log.head.length));
      assert.ok(numbers.every((difference) => difference === 1n));
      await log.append(load(log.head.length));
      assert.equal((await log.verify()).flaw, undefined);
      await log.close();
    }
  }

  for (const acknowledgements of [1, 3, 20, 60, 150, 400]) {
    it(`after ${acknowledgements} acknowledgements has every entry that was acknowledged`, async () => {
      const acknowledged = await killedAfter(acknowledgements);
      assert.ok(acknowledged.length >= 4n * BigInt(acknowledgements));
      await assertWhole(acknowledged);
    });
  }

  for (const barrier of ['audit.write', 'audit.written', 'audit.synced', 'audit.rotated']) {
    it(`at ${barrier} has every entry that was acknowledged`, async () => {
      const { killAt } = await import('../support/faulty-worker.js');
      const prelude = `data:text/javascript,${encodeURIComponent(killAt(barrier, 5))}`;
      const acknowledged = await killedAfter(Number.POSITIVE_INFINITY, ['--import', prelude]);
      assert.ok(acknowledged.length >= 16n);
      assert.equal(
        readdirSync(fixture.directory).includes('audit.log'),
        barrier !== 'audit.rotated',
        'it ended where it should',
      );
      await assertWhole(acknowledged);
    });
  }

  it('has synced before each acknowledgement', () => {
    const trace = join(fixture.directory, 'trace');
    const writer = [process.execPath, WRITER, fixture.path, fixture.key.key.toString('hex'), '3000', '40'];
    const calls = 'write,writev,pwrite64,fdatasync,fsync';
    const { error, status } = spawnSync(
      'strace',
      ['-f', '-y', '-s', '0', '-e', calls, '-o', trace, ...writer],
      { stdio: ['ignore', 'pipe', 'inherit'] },
    );
    assert.equal(error, undefined, 'strace is needed: apt-get install strace');
    assert.equal(status, 0);
    const steps = readFileSync(trace, 'utf8')
      .split('\n')
      // The end of a call that another thread interrupted counts, its beginning does not.
      .map((line) =>
        /write[^ ]*\(\d+<[^>]*audit\.log>/.test(line)
          ? 'write'
          : /fdatasync(\(\d+<[^>]*audit\.log>\) +=| resumed>\) +=)/.test(line)
            ? 'sync'
            : /write\(1</.test(line)
              ? 'acknowledge'
              : '',
      )
      .filter(Boolean)
      .join(' ');
    assert.match(steps, /^(write sync acknowledge ?){10}$/);
  });
});
