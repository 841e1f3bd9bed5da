import { closeSync } from 'node:fs';
import type { Socket } from 'node:net';
import { setImmediate as turn } from 'node:timers/promises';
import { bootId, type Logger, sealedMemory, VERSION } from 'vtpm-common';
import { ToolstackError } from '../../error.js';
import type { ApiServer } from '../api-server.js';
import type { DropinServer } from '../dropin/server.js';
import type { Supervisor } from '../supervisor.js';
import { KeptDescriptors } from './descriptors.js';
import { HANDOVER_FORMAT, type HandOverState } from './state.js';
import { becomeSuccessor, checkSuccessor } from './successor.js';

export interface Upgraded {
  readonly supervisor: Supervisor;
  readonly server: ApiServer;
  readonly dropin: DropinServer;
  readonly log: Logger;
}

let isUnderWay = false;

/**
 * This process becomes the program that is installed now, with every worker, door, connection and lock that it has. Does
 * not return where it works: the next program answers `caller`.
 * @throws ToolstackError `upgrade-refused` | `busy`; then everything is as before
 */
export async function upgrade({ supervisor, server, dropin, log }: Upgraded, caller: Socket): Promise<never> {
  if (isUnderWay) throw new ToolstackError('busy', 'the supervisor is being upgraded already; wait for that');
  isUnderWay = true;
  try {
    // First of all: what is under way there goes through the API and the supervisor.
    await dropin.hold();
    await supervisor.hold();
    await server.hold(caller);
    await withMemory(describe(), (memory) => checkSuccessor(memory));
    await supervisor.rest();
    log.info(
      { version: VERSION, upgrades: supervisor.upgrades },
      'goes on as the program that is installed now',
    );
    // A signal that came is handled when the event loop polls, which it surely does between two of its turns. One that stops
    // all ends the upgrade: the next program would not hear of it.
    await turn();
    await turn();
    // Guests have come and gone since. From here to the end nothing else runs in this process.
    const state = describe();
    return await withMemory(state, (memory) => becomeSuccessor(memory, state.descriptors));
  } finally {
    isUnderWay = false;
    supervisor.release();
    server.release();
    dropin.release();
  }

  function describe(): HandOverState {
    const kept = new KeptDescriptors();
    const content = { ...supervisor.handOver(kept), api: server.handOver(kept, caller) };
    return {
      format: HANDOVER_FORMAT,
      version: VERSION,
      pid: process.pid,
      boot: bootId().toString('hex'),
      descriptors: [...kept.all],
      ...content,
    };
  }
}

async function withMemory<T>(state: HandOverState, run: (memory: number) => T | Promise<T>): Promise<T> {
  const memory = sealedMemory('vtpm-handover', Buffer.from(JSON.stringify(state)));
  try {
    return await run(memory);
  } finally {
    closeSync(memory);
  }
}
