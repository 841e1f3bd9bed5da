import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { Command, CommanderError } from 'commander';
import type { TpmChannel } from './channel.js';
import { FrontendClient } from './client.js';
import { isDevice, openDevice } from './device-stream.js';
import { FrontendError } from './error.js';
import { doorOf } from './location.js';
import { forKernel, newKernelTpm } from './proxy.js';
import { ReconnectingChannel } from './reconnect.js';
import { RingClient } from './ring/client.js';
import { SwtpmSockets } from './serve.js';
import { bridgeStdio } from './stdio.js';

const { version } = JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')) as {
  version: string;
};

interface DoorOptions {
  readonly ring?: boolean;
  readonly runDir?: string;
  readonly home?: string;
}

const program = new Command('vtpm-frontend')
  .description('The guest side of a vTPM channel.')
  .version(version)
  .exitOverride()
  .showHelpAfterError('(vtpm-frontend --help shows the usage)');

command('stdio', "carries TPM commands from standard input to a vTPM, for tpm2-tss's cmd TCTI")
  .addHelpText(
    'after',
    `
Examples:
  TPM2TOOLS_TCTI="cmd:vtpm-frontend stdio web1" tpm2_getrandom --hex 8
  TPM2TOOLS_TCTI="cmd:vtpm-frontend stdio --ring web1" tpm2_getrandom --hex 8
  TPM2TOOLS_TCTI="cmd:vtpm-frontend stdio /run/vtpm-manager/vtpms/web1/tpm.sock" tpm2_pcrread

Exit status: 0 the input ended, 1 failed, 2 wrong usage, 3 no vTPM answers.`,
  )
  .action(async (nameOrPath: string, options: DoorOptions) => {
    const channel = await connect(nameOrPath, options);
    try {
      await bridgeStdio(channel, process.stdin, process.stdout);
    } finally {
      await channel.close();
    }
  });

command('serve', "makes a pair of sockets for tpm2-tss's swtpm TCTI in front of a vTPM")
  .requiredOption('--socket <path>', 'of the commands; control requests are at <path>.ctrl')
  .addHelpText(
    'after',
    `
Connects again where the vTPM or its service was restarted. Runs until SIGTERM or SIGINT.

Example, in a container that has nothing but a ring:
  vtpm-frontend serve --ring /vtpm/ring.sock --socket /run/tpm.sock &
  TPM2TOOLS_TCTI=swtpm:path=/run/tpm.sock tpm2_getrandom --hex 8`,
  )
  .action(async (nameOrPath: string, options: DoorOptions & { socket: string }) => {
    const channel = await ReconnectingChannel.open(() => connect(nameOrPath, options));
    try {
      const sockets = await SwtpmSockets.open(channel, options.socket);
      process.stdout.write(`${options.socket}\n`);
      await ending();
      await sockets.close();
    } finally {
      await channel.close();
    }
  });

command('proxy', 'makes a TPM of this kernel, /dev/tpmN, that a vTPM answers for (tpm_vtpm_proxy)')
  .addHelpText(
    'after',
    `
Prints the device. It is gone when this program ends: with SIGTERM or SIGINT. Needs the right to open /dev/vtpmx. <name-or-path>
may be a character device, a port of virtio-serial for example.`,
  )
  .action(async (nameOrPath: string, options: DoorOptions) => {
    const channel = await ReconnectingChannel.open(() => connect(nameOrPath, options));
    try {
      const { number, stream } = newKernelTpm();
      process.stdout.write(`/dev/tpm${number}\n`);
      await Promise.race([bridgeStdio(forKernel(channel), stream, stream), ending()]);
      stream.destroy();
    } finally {
      await channel.close();
    }
  });

function command(name: string, description: string): Command {
  return program
    .command(name)
    .description(description)
    .argument('<name-or-path>', "a vTPM's name, or the path of its socket")
    .option('--ring', 'through its ring: pages that are shared with it')
    .option('--run-dir <dir>', 'where the sockets are (environment: VTPM_RUN_DIR)')
    .option('--home <dir>', 'home of the installation (environment: VTPM_HOME)');
}

async function connect(nameOrPath: string, options: DoorOptions): Promise<TpmChannel> {
  const path = doorOf(nameOrPath, { ...options, door: options.ring ? 'ring' : 'tpm' });
  if (options.ring) return await RingClient.connect(path);
  return isDevice(path) ? new FrontendClient(openDevice(path)) : await FrontendClient.connect(path);
}

async function ending(): Promise<void> {
  process.removeListener('SIGTERM', endAtOnce);
  await Promise.race([once(process, 'SIGTERM'), once(process, 'SIGINT')]);
}

/** tpm2-tss ends its program with SIGTERM when the context is closed; that is no failure. */
function endAtOnce(): void {
  process.exit(0);
}
process.on('SIGTERM', endAtOnce);

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
