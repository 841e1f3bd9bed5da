import { IOCTL_HELP } from './help.js';
import { runIoctl } from './ioctl.js';
import { Report } from './report.js';

const report = new Report('swtpm_ioctl');
const args = process.argv.slice(2);

if (args.includes('--version')) {
  const { VERSION } = await import('vtpm-common/version');
  process.stdout.write(`TPM emulator control tool version 0.8.0, of vtpm-manager ${VERSION}\n`);
} else if (args.length === 0 || args.includes('--help')) {
  process.stdout.write(IOCTL_HELP);
} else {
  await runIoctl(args).then(
    (text) => process.stdout.write(text),
    (error: unknown) => {
      process.exitCode = report.failed(error);
    },
  );
}
