// Writes test/fixtures/formats/<version>: an installation with a software TPM as this version leaves it on the disk, a
// backup, and what a guest saw in it. Run it once for each release, after `npm run build`, and commit what it made:
//
//     node test/dist/formats/make-fixture.js
import { cpSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { gzipSync } from 'node:zlib';
import { VERSION } from 'vtpm-common';
import { connectGuest } from 'vtpm-quickstart/guest';
import { Installation } from '../support/installation.js';
import { FIXTURES, type Seen, STORE_DATA } from './fixture.js';

const place = join(FIXTURES, VERSION);
const installation = await Installation.create({ tpm: 'embedded' });
try {
  await installation.start();
  const key = join(installation.directory, 'backup.key');
  const { public: to } = await installation.ctlJson('backup', 'keygen', '-o', key);
  const guest = await connectGuest(await installation.vtpm('web1'));
  await guest.defineCounter();
  const seen: Seen = { endorsement: await guest.endorsement(), key: await guest.makeKey(), counter: 0 };
  for (let step = 0; step < 3; step++) await guest.increment();
  await guest.close();
  const backup = join(installation.directory, 'web1.vtpm');
  await installation.ctlJson('backup', '--to', String(to), '-o', backup);
  const last = await connectGuest(installation.door('web1'));
  await last.increment();
  const counter = Number(await last.counter());
  await last.close();
  await installation.ctlJson('stop', 'web1');
  await installation.stopDaemons();

  rmSync(place, { recursive: true, force: true });
  mkdirSync(place, { recursive: true });
  const home = join(place, 'home');
  const kept = ['manager/enrolment.json', 'manager/audit.log', 'manager/softtpm', 'manager/store'];
  kept.push('toolstack', 'supervisor/vtpms.json', 'supervisor/delegate.key');
  for (const name of kept) cpSync(join(installation.home, name), join(home, name), { recursive: true });
  for (const name of ['manager/store/lock', 'manager/store/lock.mdb', 'manager/softtpm/lock'])
    rmSync(join(home, name), { force: true });
  // Mostly zeros.
  const data = join(home, STORE_DATA);
  writeFileSync(`${data}.gz`, gzipSync(readFileSync(data), { level: 9 }));
  rmSync(data);
  cpSync(backup, join(place, 'web1.vtpm'));
  cpSync(key, join(place, 'backup.key'));
  writeFileSync(join(place, 'seen.json'), `${JSON.stringify({ ...seen, counter }, null, 2)}\n`);
} finally {
  await installation.destroy();
}
