import { createInterface } from 'node:readline/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import { findEntry } from '../inventory.js';
import { fields } from '../output.js';

/** Returns when the doors are open. */
export async function start(nameOrId: string, { supervisor, output }: Context): Promise<void> {
  const vtpm = await supervisor.start(nameOrId);
  if (vtpm.worker?.isolation === 'none') {
    output.note(`warning: ${vtpm.name} runs without isolation, which is for development only`);
  }
  output.result(
    vtpm,
    fields([
      ['started', vtpm.name],
      ['epoch', vtpm.epoch],
      ['worker', vtpm.worker ? `process ${vtpm.worker.pid}, isolation ${vtpm.worker.isolation}` : null],
      ['tpm', vtpm.sockets.tpm],
      ['tcti', vtpm.sockets.tcti],
      ['control', vtpm.sockets.control],
    ]),
  );
}

/** Returns when the last save is durable and the worker is gone. */
export async function stop(nameOrId: string, { supervisor, output }: Context): Promise<void> {
  const vtpm = await supervisor.stop(nameOrId);
  output.result(vtpm, fields([['stopped', vtpm.name]]));
}

/** Stops, forgets and retires: a retired vTPM never starts again and its state is gone. */
export async function remove(
  nameOrId: string,
  flags: { readonly yes?: boolean },
  { supervisor, manager, output }: Context,
): Promise<void> {
  // Without the manager only half of it could be done.
  const health = await manager.health();
  if (health.status !== 'ready') {
    throw new ToolstackError(
      health.status === 'locked' ? 'locked' : 'manager-unreachable',
      `the manager is ${health.status} and can retire nothing now; ${health.message ?? 'try again when vtpmctl up says it is ready'}`,
    );
  }
  const { entry } = await findEntry(nameOrId, supervisor, manager);
  const shown = entry.name ?? entry.id;
  if (entry.name === null && entry.kind === 'moved') {
    throw new ToolstackError(
      'bad-request',
      `${entry.id} lives on ${entry.movedTo ?? 'another host'}; it is deleted there, and stays known here as moved`,
    );
  }
  if (entry.name === null && entry.kind === 'retired') {
    throw new ToolstackError(
      'unknown-vtpm',
      `${entry.id} is deleted already; vtpmctl list shows what there is`,
    );
  }
  if (entry.state === 'moved') {
    // Its keys and state are elsewhere: there is nothing to destroy, and nothing to ask.
    const { state } = await supervisor.vtpm(shown);
    // It crashed here before it was rescued elsewhere.
    if (state !== 'moved' && state !== 'stopped') await supervisor.stop(entry.id);
    await supervisor.forget(entry.id);
    output.result(
      { id: entry.id, name: entry.name, retired: false, movedTo: entry.movedTo },
      fields([
        ['forgotten', shown],
        ['state', `untouched: it lives on ${entry.movedTo ?? 'another host'}`],
      ]),
    );
    return;
  }
  await confirm(shown, flags.yes === true);
  if (entry.name !== null) {
    if (entry.state !== 'stopped') await supervisor.stop(entry.id);
    await supervisor.forget(entry.id);
  }
  const isRetired = await retire(entry.id, manager);
  output.result(
    { id: entry.id, name: entry.name, retired: isRetired },
    fields([
      ['deleted', shown],
      ['state', isRetired ? 'retired for good' : 'it never had any'],
    ]),
  );
}

/** @returns false where the manager never had state of it */
async function retire(id: string, manager: Context['manager']): Promise<boolean> {
  // The manager hears of the worker's end by its connection, which may take a moment longer.
  for (let attempt = 0; ; attempt++) {
    try {
      await manager.retire(id);
      return true;
    } catch (caught) {
      const error = ToolstackError.from(caught);
      if (error.code === 'unknown-vtpm') return false;
      if (error.code !== 'busy' || attempt >= 50) {
        throw new ToolstackError(
          error.code,
          `the supervisor has forgotten it, the manager has not retired it yet: ${error.message}; repeat: vtpmctl delete ${id}`,
          { cause: error },
        );
      }
      await sleep(100);
    }
  }
}

async function confirm(shown: string, isConfirmed: boolean): Promise<void> {
  if (isConfirmed) return;
  if (!process.stdin.isTTY || !process.stderr.isTTY) {
    throw new ToolstackError(
      'usage',
      `deleting ${shown} destroys its keys and state for good; to do it without a question add --yes`,
    );
  }
  const ask = createInterface({ input: process.stdin, output: process.stderr });
  try {
    const answer = await ask.question(
      `Delete ${shown} with all its keys and state, for good? Type its name: `,
    );
    if (answer.trim() !== shown) throw new ToolstackError('usage', 'nothing was deleted');
  } finally {
    ask.close();
  }
}
