import { swtpmCapabilities } from './capabilities.js';
import { SWTPM_HELP } from './help.js';
import { Report } from './report.js';
import { runSwtpm } from './swtpm.js';

const report = new Report('swtpm');
const [mode, ...args] = process.argv.slice(2);

if (mode === '--version' || args.includes('--version') || args.includes('-v')) {
  const { VERSION } = await import('vtpm-common/version');
  process.stdout.write(`TPM emulator version 0.8.0, of vtpm-manager ${VERSION}\n`);
} else if (
  mode === undefined ||
  mode === '--help' ||
  mode === '-h' ||
  args.includes('--help') ||
  args.includes('-h')
) {
  process.stdout.write(SWTPM_HELP);
} else if (mode !== 'socket') {
  const { DropinRefusal } = await import('./refusal.js');
  const instead = 'swtpm socket; for /dev/tpmN of a guest: vtpm-frontend proxy';
  process.exitCode = report.failed(new DropinRefusal(`swtpm ${mode} is not served here; use ${instead}`));
} else if (args.includes('--print-capabilities')) {
  process.stdout.write(`${swtpmCapabilities()}\n`);
} else {
  // Connections that nobody waits for may still be open.
  process.exit(await runSwtpm(args, report).catch((error: unknown) => report.failed(error)));
}
