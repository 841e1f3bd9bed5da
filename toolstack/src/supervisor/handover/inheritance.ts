import { closeSync, existsSync, readdirSync } from 'node:fs';
import { bootId, type Paths, type Settings } from 'vtpm-common';
import { setCloseOnExec } from 'vtpm-common/exec';
import { ToolstackError } from '../../error.js';
import { Confinements } from '../confinement.js';
import { readDelegateKey } from '../delegate-key.js';
import { prepareImage } from '../image.js';
import { collectSources } from '../image-sources.js';
import { VtpmList } from '../vtpm-list.js';
import { InheritedDescriptors } from './descriptors.js';
import { type HandOverState, parseHandOver } from './state.js';
import { readState } from './successor.js';

/** What a program of the supervisor is started with, the first one and each that takes over. */
export interface SupervisorProgram {
  readonly paths: Paths;
  readonly settings: Settings;
  /** Of the worker's build; see image-sources.ts. */
  readonly manifest: string;
}

/** What the program before this one hands over. */
export interface Inheritance {
  readonly state: HandOverState;
  readonly descriptors: InheritedDescriptors;
}

/**
 * Takes what the program before this one left open, before any process is started that could get it too.
 * @param flag number of the descriptor that holds the state
 * @throws ToolstackError `newer-format` | `corrupt`
 */
export function takeInheritance(flag: string): Inheritance {
  const memory = descriptorOf(flag);
  const state = parseHandOver(readState(memory));
  setCloseOnExec(memory, true);
  closeSync(memory);
  if (state.pid !== process.pid || state.boot !== bootId().toString('hex')) {
    throw new ToolstackError('corrupt', `the hand-over is of process ${state.pid} and for that one only`);
  }
  return { state, descriptors: new InheritedDescriptors(state.descriptors) };
}

/**
 * Whether this program could take over: it understands the state and reads what an ordinary start reads. The image that
 * workers will start from is made here, so that a full disk is noticed before there is no way back.
 * @throws ToolstackError that says why not
 */
export async function checkInheritance(
  flag: string,
  { paths, settings, manifest }: SupervisorProgram,
): Promise<void> {
  const state = parseHandOver(readState(descriptorOf(flag)));
  readDelegateKey(paths.supervisor.delegateKey);
  const list = VtpmList.open(paths.supervisor.vtpms);
  for (const { id } of state.vtpms) {
    if (!list?.get(id))
      throw new ToolstackError('corrupt', `${paths.supervisor.vtpms} does not name vTPM ${id}`);
  }
  const { images } = paths.supervisor;
  const there = new Set(existsSync(images) ? readdirSync(images) : []);
  const { command } = prepareImage(collectSources(manifest), images, there);
  (await Confinements.open({ images, config: paths.config, settings }, command)).close();
}

function descriptorOf(flag: string): number {
  if (/^[1-9]\d{0,5}$/.test(flag)) return Number(flag);
  throw new ToolstackError('usage', 'a hand-over is named by the number of its descriptor');
}
