import assert from 'node:assert/strict';
import { copyFileSync, cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { VERSION } from 'vtpm-common';
import { connectGuest } from 'vtpm-quickstart/guest';
import { Installation, REPOSITORY, run } from '../support/installation.js';
import { copyHome, FIXTURES, seenIn, versions } from './fixture.js';

/** In a JSON file, the first number of that name. */
const json = (path: string): void => {
  const text = readFileSync(path, 'utf8');
  assert.match(text, /"format": ?\d+/);
  writeFileSync(path, text.replace(/"format": ?\d+/, '"format": 99'));
};
/** A u32 at each of the offsets. */
const binary =
  (isLittle: boolean, ...offsets: number[]) =>
  (path: string): void => {
    const bytes = readFileSync(path);
    for (const at of offsets) {
      if (isLittle) bytes.writeUInt32LE(99, at);
      else bytes.writeUInt32BE(99, at);
    }
    writeFileSync(path, bytes);
  };

/** Each file that says its format before anything else in it can be authenticated, and how its number is raised. */
const NEWER: [string, (path: string) => void][] = [
  ['manager/enrolment.json', json],
  ['manager/softtpm/state', binary(false, 8)],
  // LMDB's own: the version in both of its meta pages, behind a page header of 24 bytes and the magic.
  ['manager/store/data.mdb', binary(true, 28, 4096 + 28)],
  ['manager/approvals.json', (path) => writeFileSync(path, '{"format": 99, "approvals": []}')],
  ['supervisor/vtpms.json', json],
];

describe('formats of released versions', function () {
  this.timeout(120_000);

  it('are kept for this version, too', () => assert.ok(versions().includes(VERSION)));

  for (const version of versions()) {
    describe(version, () => {
      let installation: Installation;

      beforeEach(() => {
        installation = Installation.of(mkdtempSync(join(tmpdir(), 'vtpm-')));
        copyHome(version, installation.home);
      });
      afterEach(() => installation.destroy());

      async function checkGuest(counter: number): Promise<void> {
        const seen = seenIn(version);
        const guest = await connectGuest(await started());
        try {
          assert.equal(await guest.endorsement(), seen.endorsement);
          assert.equal(await guest.keyFingerprint(), seen.key);
          assert.equal(Number(await guest.counter()), counter);
          await guest.increment();
          assert.equal(Number(await guest.counter()), counter + 1);
        } finally {
          await guest.close();
        }
      }
      async function started(): Promise<string> {
        await installation.ctlJson('start', 'web1');
        return installation.door('web1');
      }

      it('starts today, and the guest finds the TPM that it had', async () => {
        await installation.start();
        await checkGuest(seenIn(version).counter);
        const { isWhole } = await installation.ctlJson('audit', 'verify');
        assert.equal(isWhole, true);
        await installation.ctlJson('stop', 'web1');
        await installation.stopDaemons();
        await installation.start();
        await checkGuest(seenIn(version).counter + 1);
      });

      it('its backup is restored today', async () => {
        await installation.start();
        const place = (name: string) => join(installation.directory, name);
        for (const name of ['web1.vtpm', 'backup.key'])
          copyFileSync(join(FIXTURES, version, name), place(name));
        const restore = [
          'restore',
          place('web1.vtpm'),
          '--key',
          place('backup.key'),
          '--accept-rollback',
          'web1',
        ];
        await installation.ctlJson(...restore);
        // The backup is of one step before the end.
        await checkGuest(seenIn(version).counter - 1);
      });

      for (const [file, raise] of NEWER) {
        it(`a newer ${file} is refused by name`, async () => {
          raise(join(installation.home, file));
          const daemon = file.startsWith('manager')
            ? 'manager/bin/vtpm-managerd'
            : 'toolstack/bin/vtpm-supervisord';
          const before = readFileSync(join(installation.home, file));
          const program = join(REPOSITORY, `${daemon}.js`);
          const { code, stderr } = await run(process.execPath, [program, '--home', installation.home]);
          assert.equal(code, 1, stderr);
          assert.match(stderr, /newer-format/);
          assert.deepEqual(readFileSync(join(installation.home, file)), before, 'nothing was written');
        });
      }

      it('a newer backup is refused by name', async () => {
        const file = join(installation.directory, 'newer.vtpm');
        cpSync(join(FIXTURES, version, 'web1.vtpm'), file);
        // Behind the magic of 15 bytes.
        binary(false, 15)(file);
        const { code, stdout } = await installation.ctl('inspect', file);
        assert.equal(code, 1);
        assert.match(
          stdout,
          /this backup has format 99, this version reads \d+; use the version that made it/,
        );
        rmSync(file);
      });
    });
  }
});
