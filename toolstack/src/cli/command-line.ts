import { Command, CommanderError, Option } from 'commander';
import { CONFIG_KEYS, defaultHome, libtpmsVersion, VERSION } from 'vtpm-common';
import { addBackupCommands } from './backup-commands.js';
import { auditCommands } from './commands/audit.js';
import { showConfig } from './commands/config.js';
import { type LogsFlags, logs } from './commands/logs.js';
import { upgradeSupervisor } from './commands/supervisor.js';
import type { Context } from './context.js';
import { EXIT } from './exit-status.js';
import { addImageCommands } from './image-commands.js';
import { addInstallationCommands } from './installation-commands.js';
import { addMigrateCommands } from './migrate-commands.js';
import { addPeerCommands } from './peer-commands.js';
import { addPlatformCommands } from './platform-commands.js';
import { addVmmCommands } from './vmm-commands.js';
import { addVtpmCommands } from './vtpm-commands.js';

/** The flags that every command takes, before or after its name. */
export interface GlobalFlags {
  readonly home?: string;
  readonly runDir?: string;
  readonly json?: boolean;
  readonly logLevel?: string;
  readonly logFormat?: string;
}

/** A command's work; a number is the exit status where it is not 0. */
export type Work = (context: Context) => Promise<number> | Promise<void> | void;
/** Makes a command with examples in its help. */
export type Add = (
  parent: Command,
  usage: string,
  description: string,
  examples: readonly string[],
) => Command;
/** Does the work with the context that the flags of `command` make. */
export type Run = (command: Command, work: Work) => Promise<void>;

const EXIT_STATUSES = `
Exit status:
  ${EXIT.ok}  done
  ${EXIT.failed}  refused or failed
  ${EXIT.usage}  wrong usage: a flag, an argument or the configuration file
  ${EXIT.notRunning}  not running or not reachable
  ${EXIT.locked}  locked: the platform is not in the state that releases the manager's keys
  exec ends with the status of the program it ran.`;

/** vtpmctl's commands, flags, arguments and help. Wrong usage is thrown as a CommanderError. */
export function createProgram(run: Run, isJson: boolean): Command {
  const program = new Command('vtpmctl')
    // With --json what is wrong is said once, as JSON, by the caller.
    .configureOutput(
      isJson
        ? { writeErr: () => {} }
        : { outputError: (text, write) => write(text.replace(/^error: /, 'vtpmctl: ')) },
    )
    .description('Makes, runs and inspects the virtual TPMs of this host.')
    .enablePositionalOptions()
    .exitOverride()
    .showHelpAfterError('(--help shows the usage)')
    .configureHelp({ showGlobalOptions: true })
    .option('-V, --version', 'versions of vtpmctl and of libtpms')
    .on('option:version', () => {
      process.stdout.write(`vtpmctl ${VERSION}\n${sayLibtpms()}\n`);
      throw new CommanderError(0, 'commander.version', '');
    })
    .addHelpText(
      'after',
      `
Examples:
  vtpmctl init --tpm auto                          once: enrol with the TPM of this machine
  vtpmctl up                                       start manager and supervisor in the background
  vtpmctl create web1 && vtpmctl start web1
  vtpmctl exec web1 -- tpm2_getrandom --hex 8      any TPM program, on web1
${EXIT_STATUSES}`,
    );
  for (const option of globalOptions()) program.addOption(option);

  const add: Add = (parent, usage, description, examples) => {
    const command = parent
      .command(usage)
      .description(description)
      .addHelpText('after', `\nExamples:\n${examples.map((example) => `  ${example}`).join('\n')}`);
    for (const option of globalOptions()) command.addOption(option.hideHelp());
    return command;
  };

  addInstallationCommands(program, add, run);
  addVtpmCommands(program, add, run);
  addVmmCommands(program, add, run);

  const logsCommand = add(program, 'logs', 'shows what the daemons logged, or what concerns one vTPM', [
    'vtpmctl logs',
    'vtpmctl logs web1 -f',
  ])
    .argument('[name]', 'name or id')
    .option('-f, --follow', 'go on until interrupted')
    .option('-n, --lines <count>', 'lines to begin with', '200');
  logsCommand.action((name: string | undefined, flags: LogsFlags) =>
    run(logsCommand, (context) => logs(name, flags, context)),
  );

  const images = group(program, 'image', 'the worker images to which the manager gives state');
  addImageCommands(images, add, run);

  const supervisorCommand = group(program, 'supervisor', 'the parent of all workers');
  const supervisorUpgrade = add(
    supervisorCommand,
    'upgrade',
    'lets the running supervisor go on as the program that is installed now; no guest notices',
    ['vtpmctl supervisor upgrade'],
  );
  supervisorUpgrade.action(() => run(supervisorUpgrade, upgradeSupervisor));

  const platformCommand = group(
    program,
    'platform',
    'the platform states in which the TPM releases the root key, and that key',
  );
  addPlatformCommands(program, platformCommand, add, run);
  addBackupCommands(program, add, run);
  addPeerCommands(program, add, run);
  addMigrateCommands(program, add, run);

  auditCommands(
    group(program, 'audit', 'the log of what was done with this installation, and by whom'),
    add,
    run,
  );

  const configCommand = group(program, 'config', 'the settings of this installation');
  const configShow = add(configCommand, 'show', 'shows every setting and where its value comes from', [
    'vtpmctl config show',
    'VTPM_LOG_LEVEL=debug vtpmctl config show --json',
  ]);
  configShow.action(() => run(configShow, showConfig));
  return program;
}

/** A command that only has commands. */
function group(program: Command, name: string, description: string): Command {
  const command = program.command(name).description(description);
  for (const option of globalOptions()) command.addOption(option.hideHelp());
  return command;
}

function globalOptions(): Option[] {
  return [
    new Option('--home <dir>', `directory of the installation (default: ${defaultHome()})`),
    new Option('--run-dir <dir>', 'directory of its sockets'),
    new Option('--json', 'results as JSON, errors as JSON on standard error'),
    new Option('--log-level <level>', 'of the daemons that up starts').choices([
      ...(CONFIG_KEYS['log-level'].values ?? []),
    ]),
    new Option('--log-format <format>', 'of the daemons that up starts').choices([
      ...(CONFIG_KEYS['log-format'].values ?? []),
    ]),
  ];
}

function sayLibtpms(): string {
  try {
    return `libtpms ${libtpmsVersion()}`;
  } catch (error) {
    return (error as Error).message;
  }
}
