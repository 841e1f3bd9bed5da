import { setupCapabilities } from './capabilities.js';
import { SETUP_HELP } from './help.js';
import { Report } from './report.js';

const report = new Report('swtpm_setup');
const args = process.argv.slice(2);

if (args.includes('--version')) {
  const { VERSION } = await import('vtpm-common/version');
  process.stdout.write(`TPM emulator setup tool version 0.8.0, of vtpm-manager ${VERSION}\n`);
} else if (args.length === 0 || args.includes('--help') || args.includes('-h')) {
  process.stdout.write(SETUP_HELP);
} else if (args.includes('--print-capabilities')) {
  process.stdout.write(`${setupCapabilities()}\n`);
} else {
  const { runSetup } = await import('./setup.js');
  process.exit(
    await runSetup(args, report).then(
      () => 0,
      (error: unknown) => report.failed(error),
    ),
  );
}
