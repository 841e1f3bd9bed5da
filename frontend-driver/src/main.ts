import { readFileSync } from 'node:fs';
import { Command, CommanderError } from 'commander';
import { FrontendClient } from './client.js';
import { FrontendError } from './error.js';
import { doorOf } from './location.js';
import { bridgeStdio } from './stdio.js';

const { version } = JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')) as {
  version: string;
};

const program = new Command('vtpm-frontend')
  .description('The guest side of a vTPM channel.')
  .version(version)
  .exitOverride()
  .showHelpAfterError('(vtpm-frontend --help shows the usage)');

program
  .command('stdio')
  .description("carries TPM commands from standard input to a vTPM, for tpm2-tss's cmd TCTI")
  .argument('<name-or-path>', "a vTPM's name, or the path of its tpm.sock")
  .option('--run-dir <dir>', 'where the sockets are (environment: VTPM_RUN_DIR)')
  .option('--home <dir>', 'home of the installation (environment: VTPM_HOME)')
  .addHelpText(
    'after',
    `
Examples:
  TPM2TOOLS_TCTI="cmd:vtpm-frontend stdio web1" tpm2_getrandom --hex 8
  TPM2TOOLS_TCTI="cmd:vtpm-frontend stdio /run/vtpm-manager/vtpms/web1/tpm.sock" tpm2_pcrread

Exit status: 0 the input ended, 1 failed, 2 wrong usage, 3 no vTPM answers.`,
  )
  .action(async (nameOrPath: string, options: { runDir?: string; home?: string }) => {
    const client = await FrontendClient.connect(doorOf(nameOrPath, options));
    try {
      await bridgeStdio(client, process.stdin, process.stdout);
    } finally {
      await client.close();
    }
  });

// tpm2-tss ends its program with SIGTERM when the context is closed; that is no failure.
process.on('SIGTERM', () => process.exit(0));

try {
  await program.parseAsync();
  process.exitCode = 0;
} catch (error) {
  process.exitCode = report(error);
}
// Standard input may still be open; nothing is read from it any more.
process.stdin.destroy();

function report(error: unknown): number {
  if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : 2;
  // Nobody reads the answers any more: the program that started us has gone.
  if ((error as NodeJS.ErrnoException).code === 'EPIPE') return 0;
  process.stderr.write(`vtpm-frontend: ${error instanceof Error ? error.message : String(error)}\n`);
  if (!(error instanceof FrontendError)) return 1;
  if (error.code === 'usage') return 2;
  if (error.code !== 'unreachable') return 1;
  process.stderr.write('  next: vtpmctl list shows the vTPMs, vtpmctl start NAME starts one\n');
  return 3;
}
