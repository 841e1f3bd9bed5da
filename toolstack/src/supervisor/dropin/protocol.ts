import { DOOR_NAMES } from '../control-protocol.js';
import {
  count,
  flag,
  list,
  object,
  oneOf,
  orNull,
  type Shape,
  type Shaped,
  ShapeError,
  text,
} from '../handover/shape.js';

/**
 * Lines of JSON between a drop-in command and the supervisor. Each request has one answer, in order. What comes unasked
 * has a type of its own. A session takes two connections, because nothing that Node.js reads keeps the descriptors that come
 * with it: the second one carries one byte with a descriptor for each `connection`, sent before the line.
 */
export const DROPIN_FORMAT = 1;

const UUID = text(/^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/, 36);
const HEX32 = text(/^[0-9a-f]{64}$/, 64);
const SESSION = text(/^[0-9a-f]{32}$/, 32);
const PLACE = text(/^\/[^\0]*$/, 4096);
const MOST_CONNECTIONS = 4096;
const SENTENCE = text(/^/, 65_536);

/** What a token says, and where it is. */
const TOKEN = object({ id: UUID, vmUuid: UUID, secret: HEX32, place: PLACE });
export type PlacedToken = Shaped<typeof TOKEN>;

const REQUESTS = {
  /** Makes this connection the one for descriptors of a session. Nothing of it is read after the answer. */
  descriptors: object({ type: oneOf('descriptors'), session: SESSION }),
  /** Registers a vTPM that has no state. `name`: a proposal. */
  create: object({
    type: oneOf('create'),
    id: UUID,
    vmUuid: UUID,
    secretSha256: HEX32,
    place: PLACE,
    name: text(/^[a-z0-9][a-z0-9._-]{0,62}$/, 63),
  }),
  /** What the vTPM of a token is, without starting it. */
  inspect: object({ type: oneOf('inspect'), token: TOKEN }),
  /** Powers it on; `goesOn`: it runs already, and the supervisor was exchanged meanwhile. */
  start: object({ type: oneOf('start'), token: TOKEN, goesOn: flag }),
  /** A client that the caller accepted. Its descriptor came before. */
  connection: object({ type: oneOf('connection'), door: oneOf('control', 'tpm') }),
  stop: object({ type: oneOf('stop') }),
  /** Destroys the vTPM that this session made: it was not finished. */
  discard: object({ type: oneOf('discard') }),
} as const;

type Requests = typeof REQUESTS;
export type DropinRequest = { [T in keyof Requests]: Shaped<Requests[T]> }[keyof Requests];

/** @throws ShapeError */
export function parseRequest(line: string): DropinRequest {
  return parse<DropinRequest>(line, REQUESTS);
}

const ANSWERS = {
  ok: object({
    type: oneOf('ok'),
    /** Of the vTPM, where there is one. */
    name: orNull(text(/^/, 63)),
    state: orNull(text(/^/, 16)),
    /** Of a client that was passed. */
    connection: orNull(count()),
    /** Of a vTPM that goes on: those that are open. */
    connections: list(count(), MOST_CONNECTIONS),
  }),
  error: object({ type: oneOf('error'), code: text(/^/, 64), message: SENTENCE }),
} as const;

const EVENTS = {
  /** First of all. `session`: what the connection for descriptors names. */
  hello: object({ type: oneOf('hello'), format: count(), session: SESSION }),
  /** A client that was passed is gone, or the data channel that one of them gave. */
  disconnected: object({ type: oneOf('disconnected'), connection: count(), door: oneOf(...DOOR_NAMES) }),
  /** The vTPM is off. `reason`: why it crashed. */
  ended: object({ type: oneOf('ended'), reason: orNull(SENTENCE) }),
} as const;

type Messages = typeof ANSWERS & typeof EVENTS;
export type DropinMessage = { [T in keyof Messages]: Shaped<Messages[T]> }[keyof Messages];

/** @throws ShapeError */
export function parseMessage(line: string): DropinMessage {
  return parse<DropinMessage>(line, { ...ANSWERS, ...EVENTS });
}

/** As it is sent. */
export function lineOf(message: DropinRequest | DropinMessage): string {
  return `${JSON.stringify(message)}\n`;
}

function parse<T>(line: string, shapes: Readonly<Record<string, Shape<T>>>): T {
  let value: unknown;
  try {
    value = JSON.parse(line);
  } catch {
    throw new ShapeError('a line is not JSON');
  }
  const type: unknown = typeof value === 'object' && value !== null && 'type' in value ? value.type : null;
  const shape = typeof type === 'string' && Object.hasOwn(shapes, type) ? shapes[type] : undefined;
  if (!shape) throw new ShapeError('a line has no known type');
  return shape(value, String(type));
}
