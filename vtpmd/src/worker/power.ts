import type { Visitor } from '../channels/doors.js';
import type { ChosenUnit } from '../checkpoint/choose.js';
import type { Left } from '../checkpoint/left.js';
import { endWhatWasGoingOn } from '../checkpoint/resume.js';
import { responseCode, shutdownClear, startupClear, TPM_RC_SUCCESS } from '../engine/command.js';
import { VtpmdError } from '../error.js';
import type { Identity } from '../manager-link/load.js';
import type { Log } from './log.js';
import { runOwnCommand } from './own-command.js';
import type { ServedTpm } from './served-tpm.js';
import { expectStirred, freshStir } from './trial.js';

/**
 * The beginning of a VM run. Resolves when what it stored is durable: no guest sees an identity that can vanish. Where a VMM
 * powers the TPM, that is off then. @throws VtpmdError
 */
export async function beginRun(
  { engine, queue, session, keeper, blobs, doors, power: switched }: ServedTpm,
  { startup, power }: Pick<Identity, 'startup' | 'power'>,
): Promise<void> {
  doors.adopt([], () => {});
  if (!engine.isOn) {
    keeper?.keepNow();
    return;
  }
  // Before a command stores anything: what is said of a suspended TPM is that it was dropped.
  blobs.begin();
  await blobs.started((permanent) => keeper?.keepSave(permanent));
  const { generation } = session;
  if (startup === 'clear' && power === 'on') {
    const answer = await runOwnCommand(queue, startupClear());
    if (responseCode(answer) !== TPM_RC_SUCCESS) {
      throw new VtpmdError(
        'startup-failed',
        `the TPM answered Startup with 0x${responseCode(answer).toString(16)}`,
      );
    }
  }
  // What Startup stored is in a checkpoint, and holds what was stored before it.
  const isKept = session.generation > generation;
  if (engine.storedAtStart && !isKept) {
    await session.save(engine.storedAtStart);
    keeper?.saved(engine.storedAtStart, session.generation);
  }
  if (power === 'vmm') await switched.off();
  else if (!isKept) keeper?.keepNow();
}

/**
 * From where the TPM was frozen, here or on another host: nothing is left of that VM run but the TPM. Resolves when it is
 * durable that this worker goes on, and nobody else can.
 * @param visitors who came since @throws VtpmdError
 */
export async function arrive(
  { keeper, blobs, doors }: ServedTpm,
  visitors: readonly Visitor[] = [],
  onClosed: (id: number) => void = () => {},
): Promise<void> {
  await blobs.arrived((permanent) => keeper?.keepSave(permanent));
  doors.everyoneGone();
  keeper?.keepNow();
  doors.adopt(visitors, onClosed);
}

/** From behind the last command of the worker before this one, with all its connections. @throws VtpmdError */
export async function goOn(
  { queue, doors, keeper, blobs, state, power }: ServedTpm,
  { unit }: ChosenUnit,
  visitors: readonly Visitor[],
  left: Left,
  onClosed: (id: number) => void,
): Promise<void> {
  endWhatWasGoingOn(unit, visitors, left);
  unit.volatile.fill(0);
  // The generator stands where it stood at the checkpoint: no random number may come twice. A command would end a measurement
  // that is under way, so that one is stirred behind it. And one that is frozen when it is taken back: what that stores would
  // end the suspension.
  const mustStir = !state.isOff && !state.isMeasuring;
  const isStirred = !state.isOff && (await blobs.goOn(mustStir));
  if (mustStir && !isStirred) expectStirred(await runOwnCommand(queue, freshStir()));
  if (left.memory.isSwitchedOff) {
    // By its VMM, to whoever stood in here.
    if (!state.isOff) await power.off();
    blobs.stopped();
    left.memory.isSwitchedOff = false;
  }
  keeper?.keepNow();
  doors.adopt(visitors, onClosed);
}

/**
 * It came from another host with its VMM: the TPM is off, and what waits in the VMM's socket is the INIT that restores it from
 * the reference that was brought before.
 */
export function arriveWithVmm(
  { keeper, blobs, doors }: ServedTpm,
  visitors: readonly Visitor[],
  { memory, controlPipe }: Left,
  onClosed: (id: number) => void,
  log: Log,
): void {
  controlPipe?.finish((connection) => visitors.find(({ id }) => id === connection)?.fd);
  try {
    const halves = [memory.reference(0), memory.reference(1)];
    blobs.bringIn('permanent', halves[0] ?? NOTHING);
    blobs.bringIn('volatile', halves[1] ?? NOTHING);
  } catch (error) {
    // The INIT says so: nothing is powered on from something else.
    log('warn', `what the VMM brought is refused: ${VtpmdError.from(error).message}`);
  }
  keeper?.keepNow();
  doors.adopt(visitors, onClosed);
}

/** Resolves when no other command runs any more. */
export async function endRun(
  { queue, session, blobs, power, freeze, state }: ServedTpm,
  log: Log,
): Promise<void> {
  const isLeaving = await freeze.isLeaving();
  if (!isLeaving) await power.settled();
  if (isLeaving || blobs.isFrozen) {
    // A reference to it as it is now is out, or somebody else goes on from there.
    log('info', 'stopped as it was suspended');
    session.close();
    return;
  }
  if (state.isOff) {
    session.close();
    return;
  }
  // What clients sent meanwhile must not run after the Shutdown, or that would not have been the last command.
  const answer = await runOwnCommand(queue, shutdownClear(), 'stop');
  const code = responseCode(answer);
  // Nothing is lost by it: state is durable. But the TPM may then count its next start as a wrong authorisation.
  if (code !== TPM_RC_SUCCESS) log('warn', `the TPM answered Shutdown with 0x${code.toString(16)}`);
  session.close();
}

const NOTHING = Buffer.alloc(0);
