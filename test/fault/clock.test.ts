import assert from 'node:assert/strict';
import { connectGuest } from 'vtpm-quickstart/guest';
import { Installation } from '../support/installation.js';
import { until } from '../support/until.js';

const YEAR_MS = 365 * 24 * 60 * 60 * 1000;

/**
 * The wall clock as a daemon sees it (its JavaScript: Date has no other source), one year on with each SIGUSR2 and four
 * years back with SIGWINCH. The host's own clock is not this test's to set.
 */
const STEPPING = `data:text/javascript,${encodeURIComponent(`
  let offset = 0;
  const Real = Date;
  const now = () => Real.now() + offset;
  globalThis.Date = class extends Real {
    constructor(...args) { if (args.length === 0) super(now()); else super(...args); }
    static now() { return now(); }
  };
  process.on('SIGUSR2', () => { offset += ${YEAR_MS}; });
  process.on('SIGWINCH', () => { offset -= ${4 * YEAR_MS}; });
`)}`;

describe('I-10 a wall clock that is stepped', function () {
  this.timeout(120_000);
  let installation: Installation;
  before(async () => {
    installation = await Installation.create({ tpm: 'embedded' });
    const nodeArgs = ['--import', STEPPING];
    await installation.startManager({ nodeArgs });
    await installation.startSupervisor({ nodeArgs });
  });
  after(() => installation?.destroy());

  const savedYear = async (name: string): Promise<number> =>
    new Date(String((await installation.ctlJson('show', name)).savedAt)).getUTCFullYear();

  it('I-10 by a year either way: tickets, saves, restarts and neighbours go on', async () => {
    const thisYear = new Date().getUTCFullYear();
    const guest = await connectGuest(await installation.vtpm('web1'));
    const neighbour = await connectGuest(await installation.vtpm('web2'));
    await guest.defineCounter();
    await neighbour.defineCounter();
    let count = await guest.counter();
    assert.ok(Math.abs((await savedYear('web1')) - thisYear) <= 1);
    for (const [signal, year] of [
      ['SIGUSR2', thisYear + 1],
      ['SIGWINCH', thisYear - 3],
    ] as const) {
      installation.manager?.kill(signal);
      installation.supervisor?.kill(signal);
      // Positive control: the step has arrived, saves carry the other year.
      await until('the manager writes the other year', async () => {
        await guest.increment();
        count += 1n;
        return Math.abs((await savedYear('web1')) - year) <= 1 && (await savedYear('web1')) !== thisYear;
      });
      assert.equal(await guest.counter(), count);
      await neighbour.increment();
      // A ticket is signed and honoured, whichever of the two clocks had run ahead.
      const name = `after-${year}`;
      await installation.ctlJson('create', name);
      await installation.ctlJson('start', name);
      await installation.ctlJson('stop', name);
      await installation.ctlJson('start', name);
    }
    await guest.close();
    await neighbour.close();
    assert.doesNotMatch(installation.logs(), /ticket-expired/);
  });

  it('I-10 between supervisor and manager: a ticket lives by the monotonic clock', async () => {
    // Only the manager's wall clock goes on: by it, every ticket would be years old.
    for (let years = 0; years < 6; years++) installation.manager?.kill('SIGUSR2');
    await installation.ctlJson('create', 'late');
    await installation.ctlJson('start', 'late');
    assert.equal((await installation.supervisord('GET', '/vtpms/late')).body.state, 'running');
  });
});
