import { existsSync } from 'node:fs';
import { dirname } from 'node:path';
import { type Command, CommanderError } from 'commander';
import { ConfigError, loadConfiguration } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import { createProgram, type GlobalFlags } from './command-line.js';
import type { Context } from './context.js';
import { EXIT, exitStatus } from './exit-status.js';
import { ManagerApi } from './manager-api.js';
import { createOutput, printable } from './output.js';
import { SupervisorApi } from './supervisor-api.js';

/** @param args without node and the script @returns the exit status */
export async function runVtpmctl(args: readonly string[]): Promise<number> {
  let status: number = EXIT.ok;
  const isJson = wantsJson(args);
  const program = createProgram(async (command, work) => {
    const context = contextOf(flagsOf(command));
    try {
      status = (await work(context)) ?? EXIT.ok;
    } catch (error) {
      throw withMissingInit(error, context);
    }
  }, isJson);
  try {
    await program.parseAsync(args, { from: 'user' });
    return status;
  } catch (error) {
    if (!(error instanceof CommanderError)) return report(error, isJson);
    if (error.exitCode === 0) return EXIT.ok;
    // Otherwise commander has said it, or shown the help.
    if (isJson) return report(new ToolstackError('usage', error.message), true);
    return EXIT.usage;
  }
}

/** A flag may stand before or after the command; the last one counts. */
function flagsOf(command: Command): GlobalFlags {
  let flags: GlobalFlags = {};
  for (let level: Command | null = command; level; level = level.parent) {
    flags = { ...level.opts<GlobalFlags>(), ...flags };
  }
  return flags;
}

/** A forgotten init, and more often a forgotten --home, looks like daemons that do not run. */
function withMissingInit(error: unknown, { configuration: { paths } }: Context): unknown {
  if (!(error instanceof ToolstackError) || error.code !== 'not-running') return error;
  const { code } = (error.cause ?? {}) as NodeJS.ErrnoException;
  if (code !== 'ENOENT' || existsSync(paths.manager.enrolment)) return error;
  return new ToolstackError(
    error.code,
    `${error.message} (${paths.home} is not initialised: vtpmctl init comes first, or name another installation with --home)`,
    { cause: error },
  );
}

function contextOf(flags: GlobalFlags): Context {
  // An unset variable in a script; it would be the working directory.
  for (const [name, value] of [
    ['--home', flags.home],
    ['--run-dir', flags.runDir],
  ]) {
    if (value === '') throw new ToolstackError('usage', `${name} is empty; it takes a directory`);
  }
  const configuration = loadConfiguration({
    home: flags.home,
    'run-dir': flags.runDir,
    'log-level': flags.logLevel,
    'log-format': flags.logFormat,
  });
  return {
    configuration,
    output: createOutput(flags.json === true),
    manager: new ManagerApi(configuration.paths.manager.adminSocket),
    supervisor: new SupervisorApi(configuration.paths.supervisor.socket),
  };
}

function report(caught: unknown, isJson: boolean): number {
  const error =
    caught instanceof ConfigError
      ? new ToolstackError('usage', whyNotRead(caught) ?? caught.message, { cause: caught })
      : ToolstackError.from(caught);
  const { code, message } = error;
  process.stderr.write(
    isJson ? `${JSON.stringify({ error: { code, message } })}\n` : `vtpmctl: ${printable(message)}\n`,
  );
  return exitStatus(code);
}

/** The configuration file is the first that is read: what is wrong with it may be wrong with the directory. */
function whyNotRead({ cause }: ConfigError): string | undefined {
  const { code, path } = (cause ?? {}) as NodeJS.ErrnoException;
  if (path === undefined) return undefined;
  if (code === 'EACCES') {
    return `${path} may not be read by this user; run vtpmctl as the user that made the installation, or name your own with --home`;
  }
  if (code === 'ENOTDIR') return `${dirname(path)} is not a directory; name another with --home`;
  return undefined;
}

/** Asked before the arguments are understood: wrong ones are reported too. */
function wantsJson(args: readonly string[]): boolean {
  const end = args.indexOf('--');
  return args.slice(0, end < 0 ? undefined : end).includes('--json');
}
