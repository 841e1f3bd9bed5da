import { ToolstackError } from '../../error.js';
import { count, flag, list, object, oneOf, orNull, type Shaped, ShapeError, text } from './shape.js';

/** Of what one program tells the next; a newer one is refused by name. Any other field or meaning makes a new format. */
export const HANDOVER_FORMAT = 1;

const UUID = text(/^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/, 36);
const SENTENCE = text(/^/, 65_536);
const DESCRIPTOR = count(0x7fff_ffff);
const MOST_CONNECTIONS = 1024;
const MOST_VTPMS = 100_000;
const MOST_PROCESSES = 4096;

const PROCESS = object({ pid: count(0x7fff_ffff), startTime: text(/^\d+$/, 20) });

const WORKER = object({
  /** The one that the supervisor made, then its descendants; the last one is node. */
  processes: list(PROCESS, MOST_PROCESSES),
  startedAt: text(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/, 24),
  imageDigest: text(/^[0-9a-f]{64}$/, 64),
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
  servers: object({ tpm: DESCRIPTOR, tcti: DESCRIPTOR, 'tcti-ctrl': DESCRIPTOR }),
  connections: list(object({ id: count(), fd: DESCRIPTOR }), MOST_CONNECTIONS),
  /** Processes behind connections, former ones too. */
  clients: list(PROCESS, MOST_PROCESSES),
});

const VTPM = object({
  id: UUID,
  state: oneOf('stopped', 'running', 'crashed'),
  reason: orNull(SENTENCE),
  /** What a kill could not end. */
  lingering: list(PROCESS, MOST_PROCESSES),
  served: orNull(object({ worker: WORKER, doors: DOORS })),
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
  api: API,
  /** Ids of the vTPMs that are still to be started. */
  autostart: list(UUID, MOST_VTPMS),
  vtpms: list(VTPM, MOST_VTPMS),
});

export type HandOverState = Shaped<typeof HANDOVER>;
export type VtpmHandOver = Shaped<typeof VTPM>;
export type WorkerHandOver = Shaped<typeof WORKER>;
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
  if (state.format !== HANDOVER_FORMAT) throw new ShapeError('the hand-over has no known format number');
  const ids = state.vtpms.map(({ id }) => id);
  if (new Set(ids).size !== ids.length) throw new ShapeError('the hand-over names a vTPM twice');
  for (const { id, state: kind, served } of state.vtpms) {
    if ((kind === 'running') !== (served !== null)) {
      throw new ShapeError(`vTPM ${id} is ${kind} and that does not go with its worker`);
    }
    if (served?.worker.processes.length === 0)
      throw new ShapeError(`the worker of vTPM ${id} has no process`);
  }
  return state;
}
