import { existsSync } from 'node:fs';
import type { Command } from 'commander';
import { type Logger, type Paths, writeFileDurably } from 'vtpm-common';
import { ManagerError } from '../error.js';
import { parseRecoveryKey } from '../recovery-key.js';
import { restoreFromFile } from './from-file.js';
import { inspect } from './inspect.js';
import { newBackupKey, parseBackupPublic, parseBackupSecret } from './operator-key.js';
import { rebuild } from './rebuild.js';
import { backupToFile } from './to-file.js';

/** What main.ts makes of the flags that every command takes. */
export interface CommandSetup {
  setUp(flags: object): {
    readonly paths: Paths;
    readonly log: Logger;
    readonly storeSandbox: boolean;
    readonly tpmDeadlineMs: number;
  };
  /** The file's content without a line end; the caller wipes it. */
  readSecret(path: string): Buffer;
  /** What `parse` makes of a file with a key; the text is wiped as far as it can be. */
  readKey(path: string, parse: (text: string) => Buffer): Buffer;
  /** Ed25519 public key. */
  key(text: string): Buffer;
}

interface BackupFlags {
  readonly to: string;
  readonly output: string;
}

interface RestoreFlags {
  readonly keyFile: string;
  readonly acceptRollback?: boolean;
}

interface RebuildFlags {
  readonly keyFile: string;
  readonly toolstackKey: string;
  readonly recoveryKeyFile?: string;
}

/** The commands that vtpmctl runs for backups. They print JSON. */
export function addBackupCommands(program: Command, { setUp, readKey, key }: CommandSetup): void {
  const add = (name: string, description: string): Command =>
    program
      .command(name)
      .description(`${description}; vtpmctl does this for you`)
      .option('--json', 'ignored');

  add('backup-keygen', 'makes a key to which backups are encrypted')
    .requiredOption('--output <file>', 'for the private half, mode 0600')
    .action(({ output }: { output: string }) => printResult(keygen(output)));

  add('backup', 'has the running manager write a backup')
    .requiredOption('--to <key>', 'public half of the backup key')
    .requiredOption('--output <file>', 'the backup')
    .argument('[ids...]', 'of vTPMs (default: all)')
    .action(async (ids: string[], _flags: object, command: Command) => {
      const flags = command.optsWithGlobals<BackupFlags>();
      const { paths } = setUp(flags);
      const recipient = parseBackupPublic(flags.to);
      const { output } = flags;
      printResult(
        await backupToFile({ adminSocket: paths.manager.adminSocket, output, recipient, vtpms: named(ids) }),
      );
    });

  add('restore', 'has the running manager take vTPMs back to a backup')
    .argument('<file>', 'the backup')
    .argument('[ids...]', 'of vTPMs (default: all of the backup)')
    .requiredOption('--key-file <file>', 'private half of the backup key')
    .option('--accept-rollback', 'do it')
    .action(async (file: string, ids: string[], _flags: object, command: Command) => {
      const flags = command.optsWithGlobals<RestoreFlags>();
      const { paths } = setUp(flags);
      printResult(
        await restoreFromFile({
          adminSocket: paths.manager.adminSocket,
          file,
          secretKey: readKey(flags.keyFile, parseBackupSecret),
          vtpms: named(ids),
          acceptRollback: flags.acceptRollback === true,
        }),
      );
    });

  add('rebuild', 'makes an installation again whose disk is lost')
    .argument('<file>', 'its backup')
    .requiredOption('--key-file <file>', 'private half of the backup key')
    .requiredOption('--toolstack-key <hex>', 'Ed25519 public key of the toolstack, 64 hex digits')
    .option(
      '--recovery-key-file <file>',
      'where its TPM is lost too, or was rotated since: recover comes next',
    )
    .action(async (file: string, _flags: object, command: Command) => {
      const flags = command.optsWithGlobals<RebuildFlags>();
      const { recoveryKeyFile } = flags;
      printResult(
        await rebuild({
          ...setUp(flags),
          file,
          secretKey: readKey(flags.keyFile, parseBackupSecret),
          toolstackKey: key(flags.toolstackKey),
          recoveryKey: recoveryKeyFile === undefined ? undefined : readKey(recoveryKeyFile, parseRecoveryKey),
        }),
      );
    });

  add('inspect', 'says what a backup, a store or a record is, without any key')
    .argument('<path>', 'a file or a directory')
    .action(async (path: string, _flags: object, command: Command) => {
      const { log, storeSandbox: sandbox } = setUp(command.optsWithGlobals());
      printResult(await inspect(path, { log, sandbox }));
    });
}

function keygen(output: string): { file: string; public: string } {
  if (existsSync(output)) throw new ManagerError('bad-request', `${output} exists; name another file`);
  const key = newBackupKey();
  writeFileDurably(output, `${key.secret}\n`, 0o600);
  return { file: output, public: key.public };
}

function named(ids: readonly string[]): readonly string[] | undefined {
  return ids.length === 0 ? undefined : ids;
}

/** Generations and times stay below 2^53. */
export function printResult(result: object): void {
  const text = JSON.stringify(result, (_key, value: unknown) =>
    typeof value === 'bigint' ? Number(value) : value,
  );
  process.stdout.write(`${text}\n`);
}
