import { resolve } from 'node:path';
import {
  fencingText,
  parseFencingText,
  signFencing,
  uuidToBytes,
  uuidToText,
  verifyFencing,
} from 'vtpm-proto';
import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import { EXIT } from '../exit-status.js';
import { sayGeneration } from '../generation.js';
import { readGivenFile } from '../given-files.js';
import { isUuid } from '../inventory.js';
import { runManagerCommand } from '../manager-command.js';
import { fields, time } from '../output.js';
import { readToolstackKey } from '../toolstack-key.js';
import { create } from './create.js';

export interface FenceFlags {
  readonly vtpm: string;
  readonly host: string;
  readonly lastGeneration: string;
  readonly method: string;
}

/** Signs the operator's word that a host is dead. The line is the result, what it says is said beside it. */
export async function fence(flags: FenceFlags, context: Context): Promise<void> {
  const { configuration, output } = context;
  const key = readToolstackKey(configuration.paths);
  if (!isUuid(flags.vtpm))
    throw new ToolstackError('usage', `--vtpm takes the id of a vTPM, not "${flags.vtpm}"`);
  if (!/^\d{1,16}$/.test(flags.lastGeneration) || !Number.isSafeInteger(Number(flags.lastGeneration))) {
    throw new ToolstackError(
      'usage',
      `--last-generation is the newest generation that is known, as vtpmctl list --json has it, not "${flags.lastGeneration}"`,
    );
  }
  if (flags.method.trim() === '' || flags.method.length > 500) {
    throw new ToolstackError(
      'usage',
      '--method says in 1 to 500 characters what keeps the host from running it',
    );
  }
  const host = await hostIdOf(flags.host, context);
  const vtpm = flags.vtpm.toLowerCase();
  const now = Date.now();
  const statement = fencingText(
    signFencing(key, {
      format: 1,
      toolstackKey: key.publicKey,
      vtpmUuid: uuidToBytes(vtpm),
      host: Buffer.from(host, 'hex'),
      lastGeneration: BigInt(flags.lastGeneration),
      method: flags.method,
      at: BigInt(now),
    }),
  );
  output.line(
    { statement, vtpm, host, lastGeneration: Number(flags.lastGeneration), method: flags.method },
    statement,
  );
  output.note(
    `it says: host ${host} does not run vTPM ${vtpm} and will not (${flags.method}); good for 24 hours. ` +
      'Where that is not true there will be two of it, and nothing here can notice',
  );
}

async function hostIdOf(text: string, { manager }: Context): Promise<string> {
  if (/^[0-9a-f]{64}$/i.test(text)) return text.toLowerCase();
  const peer = (await manager.peer.list()).find(({ name }) => name === text);
  if (peer) return peer.hostId;
  throw new ToolstackError(
    'unknown-peer',
    `--host takes the name of a peer, or a host id of 64 hex digits; "${text}" is neither. vtpmctl peer list shows them`,
  );
}

export interface RescueFlags {
  readonly fromBackup?: string;
  readonly operatorKey?: string;
  readonly fencing?: string;
  readonly acceptRollback?: boolean;
}

interface Rescued {
  readonly isDone: boolean;
  readonly id: string;
  readonly vmUuid: string;
  readonly from: string;
  readonly generation: number;
  readonly lastGeneration: number;
  readonly savedAt: number;
  readonly next: number | null;
  readonly epoch: number | null;
}

/**
 * Has a vTPM whose host is dead go on here. Without consent it only says what would be lost.
 * @returns the exit status: 0 only where it was done
 */
export async function rescue(name: string, flags: RescueFlags, context: Context): Promise<number> {
  const { configuration, output, supervisor, manager } = context;
  const { fromBackup, operatorKey, fencing } = flags;
  if (fencing === undefined) {
    throw new ToolstackError(
      'not-fenced',
      'a rescue takes --fencing, the statement that the host is dead, and nothing stands in for it; ' +
        'vtpmctl migrate fence makes one, when the host is off and stays so',
    );
  }
  if (fromBackup === undefined || operatorKey === undefined) {
    throw new ToolstackError(
      'usage',
      'a rescue takes --from-backup, a backup that the dead host made, and --operator-key, the private half of its key',
    );
  }
  const id = vtpmOf(readGivenFile('--fencing', fencing));
  await manager.health();
  // An entry from the time when it lived here before: its name is the vTPM's, and it is made anew.
  const known = (await supervisor.vtpms()).find((vtpm) => vtpm.id === id || vtpm.name === name);
  if (known && (known.id !== id || known.name !== name)) {
    throw new ToolstackError(
      'name-taken',
      known.id === id ? `vTPM ${id} is called ${known.name} here` : `${name} is another vTPM: ${known.id}`,
    );
  }
  const args = [
    ...['rescue', resolve(fromBackup), '--key-file', resolve(operatorKey), '--fencing', resolve(fencing)],
    ...(flags.acceptRollback === true ? ['--accept-rollback'] : []),
  ];
  const done = await runManagerCommand<Rescued>(configuration.paths, args);
  if (!done.isDone) {
    output.result(done, `${facts(name, done)}\nnothing was changed; to do it add --accept-rollback`);
    return EXIT.failed;
  }
  output.note(`rescued: ${name} bears the mark "rescued" for ever; its generation is ${say(done.next)}`);
  if (known) await supervisor.forget(known.id);
  await create(name, { adopt: id }, context).catch((caught) => {
    const error = ToolstackError.from(caught);
    throw new ToolstackError(
      error.code,
      `the manager has rescued it, the supervisor has no entry for it yet: ${error.message}; make it with: vtpmctl create ${name} --adopt ${id}`,
      { cause: error },
    );
  });
  return EXIT.ok;
}

function facts(name: string, { id, from, generation, lastGeneration, savedAt }: Rescued): string {
  return fields([
    ['rescue', name],
    ['id', id],
    ['from', from],
    ['backup', `generation ${say(generation)}, saved ${time(new Date(savedAt).toISOString())}`],
    [
      'lost',
      lastGeneration === generation
        ? 'nothing that is known'
        : `what came after, up to generation ${say(lastGeneration)}`,
    ],
  ]);
}

/** The vTPM of a statement. @throws ToolstackError `not-fenced` */
function vtpmOf(text: string): string {
  try {
    return uuidToText(verifyFencing(parseFencingText(text)).vtpmUuid);
  } catch (cause) {
    throw new ToolstackError('not-fenced', `--fencing: ${(cause as Error).message}`, { cause });
  }
}

function say(generation: number | null): string {
  return generation === null ? '-' : sayGeneration(generation);
}
