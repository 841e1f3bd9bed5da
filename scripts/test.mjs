// `npm test`: lint, then mocha over every test. `--long` runs what takes longer (test/dist/long) instead. Other arguments go to mocha.
import { spawnSync } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const args = process.argv.slice(2);
const isLong = args.includes('--long');
// It makes every Node process 140 ms slower to start, and no test needs it.
const { NODE_EXTRA_CA_CERTS: _, ...env } = process.env;

// Where a machine lacks a layer of the sandbox, a container for example, the tests run without it and say so.
const { missingLayers } = await import('../toolstack/dist/supervisor/confinement.js');
const waived = (env.VTPM_WAIVE_LAYERS ?? '').split(',').filter(Boolean);
for (const [layer, reason] of await missingLayers()) {
  if (waived.includes(layer)) continue;
  waived.push(layer);
  console.log(`This machine does not give the sandbox ${layer} (${reason}): waived for the tests.`);
}
if (waived.length > 0) env.VTPM_WAIVE_LAYERS = waived.join(',');

function run(script, scriptArgs) {
  const result = spawnSync(process.execPath, [script, ...scriptArgs], {
    cwd: root,
    env,
    stdio: ['ignore', 'inherit', 'inherit'],
  });
  if (result.status !== 0) process.exit(result.status ?? 1);
}

/** The longest first, so that none of them is left over at the end. Each once: mocha runs a file as often as it is named. */
function longFiles() {
  const longest = [
    'mutants',
    'migration',
    'migration-crash',
    'manager-crash',
    'current-node',
    'migration-model',
  ];
  const rank = (name) => longest.indexOf(name) + 1 || longest.length + 1;
  return readdirSync(`${root}/test/dist/long`)
    .filter((file) => file.endsWith('.test.js'))
    .map((file) => file.slice(0, -'.test.js'.length))
    .sort((a, b) => rank(a) - rank(b))
    .map((name) => `test/dist/long/${name}.test.js`);
}

if (!isLong) run('node_modules/@biomejs/biome/bin/biome', ['check', '--error-on-warnings', '.']);
run('node_modules/mocha/bin/mocha.js', [
  '--reporter',
  'scripts/mocha-reporter.cjs',
  ...(isLong ? ['--no-config', '--timeout', '3600000', ...longFiles()] : []),
  // Files side by side, one more than there are processors: each has installations, sockets and directories of its own, and
  // a quarter of its time it waits.
  ...['--parallel', '--jobs', String(Math.min(availableParallelism() + 1, 8))],
  ...args.filter((arg) => arg !== '--long'),
]);
