import { closeSync } from 'node:fs';
import type { Visitor } from '../channels/doors.js';
import { peekMessage } from '../channels/passed-message.js';
import { sendNow } from '../channels/socket-io.js';
import type { CheckpointMemory } from '../checkpoint/memory.js';
import type { Unit } from '../checkpoint/unit.js';
import { MAX_COMMAND_BYTES } from '../engine/command.js';
import { isAfterClaim, RingPage, STATE } from './page.js';
import { MappedPages } from './page-memory.js';
import { takeSetup } from './setup.js';

const NOTE = Buffer.of(0);

/**
 * Ends what the worker before was at with rings: where it had an answer for a request, that goes into the page, before the
 * TPM does anything. A page's mark says which request it took and after what; an answer that came after that is the answer to
 * it, and there is at most one: the one that was being put into the page, or the one of the checkpoint. A request without
 * either did not run, and is run by the ring's next backend.
 */
export function endRingAnswers(unit: Unit, visitors: readonly Visitor[], memory: CheckpointMemory): void {
  const kept = memory.ringAnswer();
  const { answered, sequence } = unit;
  for (const { kind, id, fd } of visitors) {
    if (kind !== 'ring') continue;
    if (kept?.connection === id) giveAnswer(fd, kept.number, kept.response);
    if (answered?.connection === id) giveAnswer(fd, sequence, answered.response);
  }
  memory.dropRingAnswer(MAX_COMMAND_BYTES);
}

function giveAnswer(fd: number, number: number, response: Buffer): void {
  const message = peekMessage(fd);
  if (message === undefined || message === 'end') return;
  let setup: ReturnType<typeof takeSetup>;
  try {
    setup = takeSetup(message);
  } catch {
    // Nothing of it was ever served.
    return;
  }
  try {
    const pages = MappedPages.of(setup.page, setup.pageBytes);
    putAnswer(new RingPage(pages.bytes), number, response);
    pages.release();
    sendNow(setup.event, NOTE);
  } finally {
    closeSync(setup.page);
    closeSync(setup.event);
  }
}

function putAnswer(page: RingPage, number: number, response: Buffer): void {
  const { state, claim } = page;
  const isOpen = state === STATE.SUBMIT || state === STATE.CANCEL;
  if (!isOpen || claim === undefined || !isAfterClaim(number, claim)) return;
  page.take(Buffer.alloc(MAX_COMMAND_BYTES), true);
  if (response.length > page.room) return;
  page.putResponse(response);
  page.finish(response.length);
}
