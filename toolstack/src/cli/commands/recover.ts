import { resolve } from 'node:path';
import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import { sayGeneration } from '../generation.js';
import { readGivenFile, reserveSecretFile } from '../given-files.js';
import { runManagerCommand } from '../manager-command.js';
import { time } from '../output.js';

export interface RecoverFlags {
  readonly acceptRollback?: boolean;
  readonly recoveryKeyFile?: string;
  readonly newRecoveryKeyFile?: string;
  readonly tpm?: string;
  readonly pcrs?: string;
  readonly ownerAuthFile?: string;
}

interface Recovered {
  readonly isDone: boolean;
  readonly refusal?: string;
  readonly vtpms: readonly {
    readonly id: string;
    readonly generation: number;
    /** Absent before it is done. */
    readonly nextGeneration?: number;
    readonly epoch: number;
    /** Unix milliseconds, 0 for never. */
    readonly savedAt: number;
    readonly lostAtLeast?: number;
  }[];
  readonly recoveryKey?: string;
  readonly needsAuthority: boolean;
}

/** Runs `vtpm-managerd recover`, with the manager stopped. Without --accept-rollback nothing is changed. */
export async function recover(flags: RecoverFlags, { configuration, output }: Context): Promise<void> {
  const { recoveryKeyFile, newRecoveryKeyFile, ownerAuthFile } = flags;
  if (recoveryKeyFile === undefined && (flags.tpm ?? flags.pcrs ?? newRecoveryKeyFile) !== undefined) {
    throw new ToolstackError(
      'usage',
      '--tpm, --pcrs and --new-recovery-key-file go with --recovery-key-file',
    );
  }
  if (recoveryKeyFile !== undefined) readGivenFile('--recovery-key-file', recoveryKeyFile);
  if (ownerAuthFile !== undefined) readGivenFile('--owner-auth-file', ownerAuthFile);
  const keyFile =
    newRecoveryKeyFile === undefined
      ? undefined
      : reserveSecretFile('--new-recovery-key-file', newRecoveryKeyFile);
  let result: Recovered;
  try {
    result = await runManagerCommand<Recovered>(configuration.paths, argumentsOf(flags));
  } catch (error) {
    keyFile?.discard();
    throw error;
  }
  const { recoveryKey, ...shown } = result;
  if (recoveryKey !== undefined && keyFile) keyFile.write(recoveryKey);
  else keyFile?.discard();
  const isKept = keyFile !== undefined && recoveryKey !== undefined;
  output.result(
    isKept ? { ...shown, recoveryKeyFile: newRecoveryKeyFile } : result,
    describe(result, isKept ? newRecoveryKeyFile : undefined).join('\n'),
  );
}

function argumentsOf(flags: RecoverFlags): string[] {
  const { acceptRollback, recoveryKeyFile, tpm, pcrs, ownerAuthFile } = flags;
  return [
    'recover',
    ...(acceptRollback === true ? ['--accept-rollback'] : []),
    ...(recoveryKeyFile === undefined ? [] : ['--recovery-key-file', resolve(recoveryKeyFile)]),
    ...(tpm === undefined ? [] : ['--tpm', tpm]),
    ...(pcrs === undefined ? [] : ['--pcrs', pcrs]),
    ...(ownerAuthFile === undefined ? [] : ['--owner-auth-file', resolve(ownerAuthFile)]),
  ];
}

function describe(result: Recovered, keyFile: string | undefined): string[] {
  const { isDone, refusal, vtpms, recoveryKey } = result;
  if (refusal === undefined) {
    return ['nothing to recover: the store is the newest one; next: vtpmctl up'];
  }
  const lines = [`refused: ${refusal}`];
  for (const { id, generation, nextGeneration, epoch, savedAt, lostAtLeast } of vtpms) {
    const saved = savedAt === 0 ? 'never' : time(new Date(savedAt).toISOString());
    const from = lostAtLeast === undefined ? 'an unknown generation' : `generation ${lostAtLeast} or later`;
    lines.push(
      `${id} ${isDone ? 'went' : 'goes'} back from ${from} to generation ${generation} (epoch ${epoch}, saved ${saved})${nextGeneration === undefined ? '' : `, and on with ${sayGeneration(nextGeneration)}`}`,
    );
  }
  if (!isDone) {
    lines.push(
      'nothing was changed. Where the newest store is somewhere, put it back; if it is lost, say the same with --accept-rollback',
    );
    return lines;
  }
  lines.push('done: every vTPM bears the mark for ever (vtpmctl show NAME); next: vtpmctl up');
  if (result.needsAuthority) {
    lines.push(
      'the policy authority does not count any more: adopt it again with vtpmctl platform adopt --authority FILE',
    );
  }
  if (keyFile !== undefined) lines.push(`the new recovery key is in ${keyFile}: take it away from this host`);
  else if (recoveryKey !== undefined) lines.push(...recoveryKeyLines(recoveryKey));
  if (recoveryKey !== undefined) lines.push('the old recovery key is void');
  return lines;
}

/** The one time that it is shown. */
export function recoveryKeyLines(key: string): string[] {
  return [
    `recovery key: ${key}`,
    'It is shown this once, and is the only way back where the TPM is lost: write it down and keep it away from this host',
  ];
}
