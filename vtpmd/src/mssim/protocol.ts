import { type Message, readMessage, SEND_COMMAND } from '../channels/framing.js';

/**
 * Requests of the TCG simulator, as its clients know them from TpmTcpProtocol.h of the reference implementation (TPM 2.0
 * library, part 4): u32 code and a body, big-endian. Each answer ends with a u32, 0 for success.
 */
export const SIGNAL = {
  PowerOn: 1,
  PowerOff: 2,
  PhysicalPresenceOn: 3,
  PhysicalPresenceOff: 4,
  HashStart: 5,
  HashData: 6,
  HashEnd: 7,
  CancelOn: 9,
  CancelOff: 10,
  NvOn: 11,
  NvOff: 12,
  RemoteHandshake: 15,
  SetAlternativeResult: 16,
  Reset: 17,
  SessionEnd: 20,
  Stop: 21,
} as const;

/** What stands at the end of an answer. */
export const DONE = 0;
export const REFUSED = 1;

/** No body is longer, except a command's. */
const MAX_DATA_BYTES = 4096;

/** Whoever sends what is not known here cannot be understood any further. */
interface Unknown {
  readonly type: 'unknown';
}
/** What is known and not done here; its body is read. */
interface Refused {
  readonly type: 'refused';
}

export type CommandRequest =
  | { readonly type: 'command'; readonly message: Message }
  | { readonly type: 'handshake'; readonly version: number }
  | { readonly type: 'end' }
  | { readonly type: 'stop' }
  | Refused
  | Unknown;

export type PlatformRequest =
  | {
      readonly type:
        | 'power-on'
        | 'power-off'
        | 'reset'
        | 'presence-on'
        | 'presence-off'
        | 'cancel-on'
        | 'cancel-off'
        | 'nv-on'
        | 'end'
        | 'stop';
    }
  | Refused
  | Unknown;

/** One request and its length in the stream. */
export interface Read<R> {
  readonly length: number;
  readonly request: R;
}

const CODE_BYTES = 4;
const WORD_BYTES = 4;

/** What is at the beginning of the command port's stream; undefined where it is not all there. */
export function readCommandRequest(bytes: Buffer): Read<CommandRequest> | undefined {
  if (bytes.length < CODE_BYTES) return undefined;
  const alone = <R>(request: R): Read<R> => ({ length: CODE_BYTES, request });
  switch (bytes.readUInt32BE(0)) {
    case SEND_COMMAND: {
      const message = readMessage(bytes);
      return message && { length: message.length, request: { type: 'command', message } };
    }
    case SIGNAL.RemoteHandshake:
      if (bytes.length < CODE_BYTES + WORD_BYTES) return undefined;
      return {
        length: CODE_BYTES + WORD_BYTES,
        request: { type: 'handshake', version: bytes.readUInt32BE(CODE_BYTES) },
      };
    case SIGNAL.HashStart:
    case SIGNAL.HashEnd:
      return alone({ type: 'refused' });
    case SIGNAL.HashData: {
      if (bytes.length < CODE_BYTES + WORD_BYTES) return undefined;
      const size = bytes.readUInt32BE(CODE_BYTES);
      if (size > MAX_DATA_BYTES) return alone({ type: 'unknown' });
      const length = CODE_BYTES + WORD_BYTES + size;
      return bytes.length < length ? undefined : { length, request: { type: 'refused' } };
    }
    case SIGNAL.SetAlternativeResult:
      if (bytes.length < CODE_BYTES + WORD_BYTES) return undefined;
      return { length: CODE_BYTES + WORD_BYTES, request: { type: 'refused' } };
    case SIGNAL.SessionEnd:
      return alone({ type: 'end' });
    case SIGNAL.Stop:
      return alone({ type: 'stop' });
    default:
      return alone({ type: 'unknown' });
  }
}

const PLATFORM: ReadonlyMap<number, PlatformRequest['type']> = new Map<number, PlatformRequest['type']>([
  [SIGNAL.PowerOn, 'power-on'],
  [SIGNAL.PowerOff, 'power-off'],
  [SIGNAL.Reset, 'reset'],
  [SIGNAL.PhysicalPresenceOn, 'presence-on'],
  [SIGNAL.PhysicalPresenceOff, 'presence-off'],
  [SIGNAL.CancelOn, 'cancel-on'],
  [SIGNAL.CancelOff, 'cancel-off'],
  [SIGNAL.NvOn, 'nv-on'],
  [SIGNAL.NvOff, 'refused'],
  [SIGNAL.SessionEnd, 'end'],
  [SIGNAL.Stop, 'stop'],
]);

/** As `readCommandRequest`, of the platform port. */
export function readPlatformRequest(bytes: Buffer): Read<PlatformRequest> | undefined {
  if (bytes.length < CODE_BYTES) return undefined;
  const type = PLATFORM.get(bytes.readUInt32BE(0)) ?? 'unknown';
  return { length: CODE_BYTES, request: { type } };
}

/** Each a u32. */
export function words(...values: number[]): Buffer {
  const out = Buffer.alloc(WORD_BYTES * values.length);
  values.forEach((value, index) => {
    out.writeUInt32BE(value, WORD_BYTES * index);
  });
  return out;
}
