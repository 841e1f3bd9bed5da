import { ToolstackError } from '../../error.js';
import { DOOR_NAMES } from '../control-protocol.js';
import {
  added,
  count,
  flag,
  list,
  object,
  oneOf,
  orNull,
  partial,
  type Shaped,
  ShapeError,
  text,
} from './shape.js';

/**
 * Of what one program tells the next; a newer one is refused by name. Any other field or meaning makes a new format. Format 1
 * knows three doors, which every vTPM has, and is still read.
 */
export const HANDOVER_FORMAT = 2;

const UUID = text(/^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/, 36);
const SENTENCE = text(/^/, 65_536);
/** The first three are the standard streams, which are nobody's but the program's. */
const DESCRIPTOR = count(0x7fff_ffff, 3);
const MOST_CONNECTIONS = 1024;
const MOST_VTPMS = 100_000;
const MOST_PROCESSES = 4096;

const MOST_PID = 0x7fff_ffff;
const PROCESS = object({ pid: count(MOST_PID), startTime: text(/^\d+$/, 20) });

const CONFINEMENT = object({
  /** Of the host, the worker's alone. */
  uid: orNull(count(0xffff_fffe)),
  /** Directories of the worker's groups. */
  groups: list(text(/^\//, 4096), 16),
});

const WORKER = object({
  /** The one that the supervisor made, then its descendants; the last one is node. */
  processes: list(PROCESS, MOST_PROCESSES),
  startedAt: text(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/, 24),
  imageDigest: text(/^[0-9a-f]{64}$/, 64),
  confinement: CONFINEMENT,
  /** Null where it is closed: then the worker is at its end. */
  control: orNull(DESCRIPTOR),
  descriptors: DESCRIPTOR,
  /** Its standard error, null where that is closed. */
  output: orNull(DESCRIPTOR),
  /** What was read of a line whose end has not come yet, base64. */
  pending: text(/^[A-Za-z0-9+/]*={0,2}$/, 65_536),
  link: oneOf('linked', 'wanting', 'passed'),
  failure: orNull(object({ reason: SENTENCE, message: SENTENCE })),
  saidStopped: flag,
});

const DOORS = object({
  nextId: count(),
  /** The entrances that there are. */
  servers: partial(DOOR_NAMES, DESCRIPTOR),
  connections: list(
    object({
      id: count(),
      door: oneOf(...DOOR_NAMES),
      peer: orNull(count(MOST_PID)),
      fd: DESCRIPTOR,
    }),
    MOST_CONNECTIONS,
  ),
  /** Processes behind connections, former ones too. */
  clients: list(PROCESS, MOST_PROCESSES),
});

const PIPE = object({ read: DESCRIPTOR, write: DESCRIPTOR });

const RUN = object({
  /** Of the memory with the checkpoints, and of the pipe that answers go through. */
  memory: DESCRIPTOR,
  pipe: PIPE,
  /** For answers to control requests, where the vTPM has that door. */
  controlPipe: added(PIPE),
  /** Sequence of the newest checkpoint that was seen. */
  newest: count(),
  /** Workers in a row that ended without an answer, and the count of answers then. */
  futile: count(),
  answers: count(),
  clientsGone: list(count(MOST_PID), MOST_PROCESSES),
  lost: orNull(SENTENCE),
});

const VMM = object({ connected: flag, power: oneOf('on', 'off'), bufferSize: count(), locality: count() });

const VTPM = object({
  id: UUID,
  /** What the worker said last of the VMM, where that powers the TPM. */
  vmm: added(VMM),
  state: oneOf('stopped', 'running', 'restarting', 'lost', 'crashed'),
  reason: orNull(SENTENCE),
  /** What a kill could not end. */
  lingering: list(PROCESS, MOST_PROCESSES),
  served: orNull(object({ run: RUN, doors: DOORS, worker: orNull(WORKER) })),
});

const API = object({
  listener: DESCRIPTOR,
  /** Connections of which nothing was read. */
  waiting: list(DESCRIPTOR, MOST_CONNECTIONS),
  /** The connection that asked for the hand-over and waits for its answer. */
  caller: orNull(DESCRIPTOR),
});

const HANDOVER = object({
  format: count(HANDOVER_FORMAT),
  /** Of the program that wrote it. */
  version: text(/^[0-9A-Za-z.+-]+$/, 64),
  pid: count(0x7fff_ffff),
  boot: text(/^[0-9a-f]{32}$/, 32),
  /** How often this process has become another program, this time included. */
  times: count(),
  /** Every descriptor that is named below. */
  descriptors: list(DESCRIPTOR, MOST_VTPMS),
  locks: list(DESCRIPTOR, 2),
  confinements: object({
    /** Holds the locks of the uids that workers have. */
    uidLock: orNull(DESCRIPTOR),
    /** Groups that were made so far. */
    groups: count(),
  }),
  api: API,
  /** Ids of the vTPMs that are still to be started. */
  autostart: list(UUID, MOST_VTPMS),
  vtpms: list(VTPM, MOST_VTPMS),
});

export type HandOverState = Shaped<typeof HANDOVER>;
export type VtpmHandOver = Shaped<typeof VTPM>;
export type RunHandOver = Shaped<typeof RUN>;
export type WorkerHandOver = Shaped<typeof WORKER>;
export type ConfinementHandOver = Shaped<typeof CONFINEMENT>;
export type DoorsHandOver = Shaped<typeof DOORS>;
export type ApiHandOver = Shaped<typeof API>;

/** @throws ToolstackError `newer-format` | `corrupt` */
export function parseHandOver(content: Uint8Array): HandOverState {
  let value: unknown;
  try {
    value = JSON.parse(Buffer.from(content).toString('utf8'));
  } catch {
    throw new ToolstackError('corrupt', 'the hand-over of the program before is not JSON');
  }
  const format: unknown =
    typeof value === 'object' && value !== null && 'format' in value ? value.format : null;
  if (typeof format === 'number' && format > HANDOVER_FORMAT) {
    throw new ToolstackError(
      'newer-format',
      `the running vtpm-supervisord hands over in format ${format}, this version knows ${HANDOVER_FORMAT}; stop it in order and start this one`,
    );
  }
  try {
    return consistent(HANDOVER(value, 'the hand-over'));
  } catch (error) {
    if (error instanceof ShapeError) throw new ToolstackError('corrupt', error.message, { cause: error });
    throw error;
  }
}

/** What no single field shows. */
function consistent(state: HandOverState): HandOverState {
  if (state.format < 1) throw new ShapeError('the hand-over has no known format number');
  const ids = state.vtpms.map(({ id }) => id);
  if (new Set(ids).size !== ids.length) throw new ShapeError('the hand-over names a vTPM twice');
  for (const { id, state: kind, served } of state.vtpms) {
    const isServed = kind !== 'stopped' && kind !== 'crashed';
    const hasWorker = kind === 'running' || kind === 'lost';
    if (isServed !== (served !== null) || hasWorker !== Boolean(served?.worker)) {
      throw new ShapeError(`vTPM ${id} is ${kind} and that does not go with its worker`);
    }
    if (served?.worker?.processes.length === 0)
      throw new ShapeError(`the worker of vTPM ${id} has no process`);
  }
  return state;
}
