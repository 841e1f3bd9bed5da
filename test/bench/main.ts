import { writeFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { anchorSuite } from './anchor-rows.js';
import { busySuite } from './busy-rows.js';
import { chart } from './chart.js';
import { checkpointSuite } from './checkpoint-rows.js';
import { clientSuite } from './client-rows.js';
import { commandSuite } from './command-rows.js';
import { hostileSuite } from './hostile-rows.js';
import { manySuite } from './many-rows.js';
import { crowdSuite, memorySuite } from './memory-rows.js';
import { migrationSuite } from './migration-rows.js';
import { poolSuite } from './pool-rows.js';
import { heading, machine, tableLine } from './report.js';
import { ringSuite } from './ring-rows.js';
import type { Effort, Row } from './row.js';
import { saveSuite } from './save-rows.js';
import { startSuite } from './start-rows.js';
import { vmmSuite } from './vmm-rows.js';

const USAGE = `Usage: npm run bench -- [--only PATTERN] [--json FILE] [--svg FILE] [--full]

Measures this service beside Debian's swtpm and prints a table. Takes about three minutes.

  --only PATTERN  only rows whose name matches the regular expression, in any case
  --json FILE     also writes {machine, rows: [{name, unit, ours: {p50, p99}, peer: {name, p50, p99}, ratio, note}]}
  --svg FILE      also draws the ratios
  --full          more rounds and starts, 500 vTPMs at once; 5 s of warm-up and a window of 20 s for Saves a second
`;

const SUITES = [
  commandSuite,
  ringSuite,
  vmmSuite,
  checkpointSuite,
  startSuite,
  poolSuite,
  saveSuite,
  anchorSuite,
  hostileSuite,
  manySuite,
  busySuite,
  memorySuite,
  crowdSuite,
  clientSuite,
  migrationSuite,
];
const SHORT: Effort = { rounds: 9, starts: 9, crowd: 50, warmUpSeconds: 2, windowSeconds: 5 };
const FULL: Effort = { rounds: 15, starts: 15, crowd: 500, warmUpSeconds: 5, windowSeconds: 20 };

const { values } = parseArgs({
  options: {
    only: { type: 'string', default: '' },
    json: { type: 'string' },
    svg: { type: 'string' },
    full: { type: 'boolean', default: false },
    help: { type: 'boolean', default: false },
  },
});
if (values.help) {
  process.stdout.write(USAGE);
  process.exit(0);
}
const pattern = new RegExp(values.only, 'i');
const wanted = (name: string): boolean => pattern.test(name);
if (!SUITES.some((suite) => suite.names.some(wanted))) {
  const names = SUITES.flatMap((suite) => suite.names).join('\n  ');
  process.stderr.write(`No row matches "${values.only}". The rows are:\n  ${names}\n`);
  process.exit(64);
}

// What was started ends with this process.
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => process.exit(1));

const host = machine();
const rows: Row[] = [];
console.log(heading());
for (const suite of SUITES) {
  if (!suite.names.some(wanted)) continue;
  await suite.run({
    effort: values.full ? FULL : SHORT,
    wanted,
    report: (row) => {
      if (!wanted(row.name)) return;
      rows.push(row);
      console.log(tableLine(row));
    },
  });
}
if (values.json !== undefined) {
  writeFileSync(values.json, `${JSON.stringify({ machine: host, rows }, null, 2)}\n`);
}
if (values.svg !== undefined) {
  const where = `${host.cpu}, ${host.cores} cores, Node ${host.node}, ${host.date.slice(0, 10)}`;
  writeFileSync(values.svg, chart(rows, where));
}
