import { closeSync } from 'node:fs';
import { Socket } from 'node:net';
import { socketPair } from 'vtpm-common/libc';
import { DropinRefusal } from './refusal.js';
import type { SupervisorLink, VmmDoor } from './supervisor-link.js';

const CMD_INIT = Buffer.from('0000000200000000', 'hex');
/** TPM2_Startup with TPM_SU_CLEAR (Part 3, section 9.3). */
const STARTUP = Buffer.from('80010000000c000001440000', 'hex');
/** TPM_RC_INITIALIZE: it was started already. */
const ALREADY_STARTED = 0x100;

/** What a VMM does at a power-on, done here for callers that leave it to swtpm. */
export async function powerOn(link: SupervisorLink): Promise<void> {
  const answer = await exchange(link, 'control', CMD_INIT, 4);
  const result = answer.readUInt32BE(0);
  if (result !== 0) throw new DropinRefusal(`the TPM cannot be powered on (result 0x${result.toString(16)})`);
}

export async function startUp(link: SupervisorLink): Promise<void> {
  const answer = await exchange(link, 'tpm', STARTUP, 10);
  const code = answer.readUInt32BE(6);
  if (code !== 0 && code !== ALREADY_STARTED) {
    throw new DropinRefusal(`TPM2_Startup(CLEAR) failed with 0x${code.toString(16)}`);
  }
}

/** A connection to the vTPM of a session, through a door of its VMM. The caller ends it. */
export async function openDoor(link: SupervisorLink, door: VmmDoor): Promise<Socket> {
  const [mine, theirs] = socketPair();
  const socket = new Socket({ fd: mine });
  socket.on('error', () => undefined);
  try {
    await link.pass(door, theirs);
    return socket;
  } catch (error) {
    socket.destroy();
    throw error;
  } finally {
    closeSync(theirs);
  }
}

async function exchange(
  link: SupervisorLink,
  door: VmmDoor,
  request: Buffer,
  bytes: number,
): Promise<Buffer> {
  const socket = await openDoor(link, door);
  try {
    socket.write(request);
    let received = Buffer.alloc(0);
    for await (const chunk of socket) {
      received = Buffer.concat([received, chunk as Buffer]);
      if (received.length >= bytes) return received;
    }
    throw new DropinRefusal('the vTPM ended before it answered');
  } finally {
    socket.destroy();
  }
}
