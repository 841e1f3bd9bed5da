import { type Command, CommanderError } from 'commander';
import { ConfigError, loadConfiguration } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import { createProgram, type GlobalFlags } from './command-line.js';
import type { Context } from './context.js';
import { EXIT, exitStatus } from './exit-status.js';
import { ManagerApi } from './manager-api.js';
import { createOutput } from './output.js';
import { SupervisorApi } from './supervisor-api.js';

/** @param args without node and the script @returns the exit status */
export async function runVtpmctl(args: readonly string[]): Promise<number> {
  let status: number = EXIT.ok;
  const isJson = wantsJson(args);
  const program = createProgram(async (command, work) => {
    status = (await work(contextOf(flagsOf(command)))) ?? EXIT.ok;
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

function contextOf(flags: GlobalFlags): Context {
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
      ? new ToolstackError('usage', caught.message, { cause: caught })
      : ToolstackError.from(caught);
  const { code, message } = error;
  process.stderr.write(
    isJson ? `${JSON.stringify({ error: { code, message } })}\n` : `vtpmctl: ${message}\n`,
  );
  return exitStatus(code);
}

/** Asked before the arguments are understood: wrong ones are reported too. */
function wantsJson(args: readonly string[]): boolean {
  const end = args.indexOf('--');
  return args.slice(0, end < 0 ? undefined : end).includes('--json');
}
