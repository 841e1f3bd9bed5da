import type { Command } from 'commander';
import type { CommandSetup } from './backup/commands.js';
import { ManagerError } from './error.js';
import { type RecoverResult, recover } from './recover.js';
import { parseRecoveryKey } from './recovery-key.js';

type RecoverSetup = Pick<CommandSetup, 'setUp' | 'readKey' | 'readSecret'>;

interface RecoverFlags {
  readonly acceptRollback?: boolean;
  readonly recoveryKeyFile?: string;
  readonly tpm?: string;
  readonly pcrs?: string;
  readonly ownerAuthFile?: string;
  readonly json?: boolean;
}

/** `recover`, which vtpmctl runs. */
export function addRecoverCommand(program: Command, setup: RecoverSetup): void {
  program
    .command('recover')
    .description(
      'where a start refuses an old store, or the TPM is lost: says what would go back, and does it; vtpmctl recover does this for you',
    )
    .option(
      '--accept-rollback',
      'do it: what is on the disk is the newest from now on, and every vTPM is marked',
    )
    .option(
      '--recovery-key-file <file>',
      'file with the recovery key: enrols a TPM anew, without the old one',
    )
    .option(
      '--tpm <tpm>',
      'with a recovery key: device:PATH, unix:PATH or embedded; the old one unless given',
    )
    .option('--pcrs <selection>', 'with a recovery key: platform state that releases the root key')
    .option('--owner-auth-file <file>', "file with the TPM's owner password, where it has one")
    .option('--json', 'print the result as JSON')
    .action((_flags: object, command: Command) => run(command.optsWithGlobals<RecoverFlags>(), setup));
}

async function run(flags: RecoverFlags, { setUp, readKey, readSecret }: RecoverSetup): Promise<void> {
  const { paths, log, storeSandbox, tpmDeadlineMs } = setUp(flags);
  const { recoveryKeyFile, ownerAuthFile } = flags;
  if (recoveryKeyFile === undefined && (flags.tpm !== undefined || flags.pcrs !== undefined)) {
    throw new ManagerError('bad-request', '--tpm and --pcrs go with --recovery-key-file');
  }
  const result = await recover({
    ...{ paths, log, storeSandbox, tpmDeadlineMs },
    acceptRollback: flags.acceptRollback === true,
    recoveryKey: recoveryKeyFile === undefined ? undefined : readKey(recoveryKeyFile, parseRecoveryKey),
    ownerAuth: ownerAuthFile === undefined ? undefined : readSecret(ownerAuthFile),
    tpm: flags.tpm,
    pcrSelection: flags.pcrs,
  });
  process.stdout.write(
    `${flags.json ? JSON.stringify(result, numbers) : describeRecovery(result).join('\n')}\n`,
  );
}

/** As `vtpmctl show` says it. */
function sayGeneration(generation: bigint): string {
  return `${generation % 2n ** 32n}, accepted at count ${generation / 2n ** 32n} of the TPM`;
}

function describeRecovery({ isDone, refusal, vtpms, recoveryKey, needsAuthority }: RecoverResult): string[] {
  if (refusal === undefined) return ['nothing to recover: the store is the newest one, start the manager'];
  const time = (ms: bigint): string => (ms === 0n ? 'never' : new Date(Number(ms)).toISOString());
  return [
    `refused   ${refusal}`,
    ...vtpms.map(
      ({ id, generation, nextGeneration, epoch, savedAt, lostAtLeast }) =>
        `${isDone ? 'went back' : 'goes back'} ${id} to generation ${generation} of ${time(savedAt)}, epoch ${epoch}` +
        `${lostAtLeast === undefined ? '' : `; the audit log knows of generation ${lostAtLeast}`}${nextGeneration === undefined ? '' : `; goes on with ${sayGeneration(nextGeneration)}`}`,
    ),
    ...(isDone
      ? ['done      every vTPM bears the mark for ever; start the manager']
      : [
          '           nothing was changed. Put the newest store back where there is one; if not, add --accept-rollback',
        ]),
    ...(isDone && needsAuthority
      ? ['authority  it does not count any more; adopt it again: vtpmctl platform adopt --authority FILE']
      : []),
    ...(recoveryKey === undefined
      ? []
      : [
          `recovery  ${recoveryKey}`,
          '          the new recovery key, shown once: write it down and keep it away from this host. The old one is void',
        ]),
  ];
}

/** Generations and times stay below 2^53. */
function numbers(_key: string, value: unknown): unknown {
  return typeof value === 'bigint' ? Number(value) : value;
}
