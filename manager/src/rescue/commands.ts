import { readFileSync } from 'node:fs';
import type { Command } from 'commander';
import { ProtoError, parseFencingText, type SignedFencing } from 'vtpm-proto';
import { type CommandSetup, printResult } from '../backup/commands.js';
import { parseBackupSecret } from '../backup/operator-key.js';
import { ManagerError } from '../error.js';
import { rescueFromFile } from './from-file.js';

interface RescueFlags {
  readonly keyFile: string;
  readonly fencing: string;
  readonly acceptRollback?: boolean;
}

/** The command that vtpmctl runs to rescue a vTPM. It prints JSON. */
export function addRescueCommand(program: Command, { setUp, readKey }: CommandSetup): void {
  program
    .command('rescue')
    .description('has the running manager take over a vTPM of a dead host; vtpmctl does this for you')
    .option('--json', 'ignored')
    .argument('<file>', 'a backup that the dead host made')
    .requiredOption('--key-file <file>', 'private half of the backup key')
    .requiredOption('--fencing <file>', 'the statement that the host is dead')
    .option('--accept-rollback', 'do it')
    .action(async (file: string, _flags: object, command: Command) => {
      const flags = command.optsWithGlobals<RescueFlags>();
      const { paths } = setUp(flags);
      const fencing = readFencing(flags.fencing);
      printResult(
        await rescueFromFile({
          adminSocket: paths.manager.adminSocket,
          file,
          secretKey: readKey(flags.keyFile, parseBackupSecret),
          fencing,
          acceptRollback: flags.acceptRollback === true,
        }),
      );
    });
}

/** @throws ManagerError `bad-request`, `not-fenced` */
function readFencing(path: string): SignedFencing {
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch (cause) {
    throw new ManagerError('bad-request', `${path} cannot be read: ${(cause as Error).message}`, { cause });
  }
  try {
    return parseFencingText(text);
  } catch (cause) {
    if (!(cause instanceof ProtoError)) throw cause;
    throw new ManagerError('not-fenced', `${path}: ${cause.message}`, { cause });
  }
}
