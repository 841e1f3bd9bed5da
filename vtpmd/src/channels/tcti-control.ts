import { Socket } from 'node:net';

/** Commands of swtpm's control protocol (u32, big-endian). */
const CMD = {
  GetCapability: 0x01,
  GetTpmEstablished: 0x04,
  SetLocality: 0x05,
  CancelTpmCommand: 0x09,
} as const;

/** Capability bits of what this door does: GET_TPMESTABLISHED, SET_LOCALITY, CANCEL_TPM_CMD. */
const CAPABILITIES = (1 << 2) | (1 << 3) | (1 << 5);

/** Results (TPM 1.2 codes). */
const SUCCESS = 0;
const BAD_PARAMETER = 0x03;
const BAD_ORDINAL = 0x0a;
const BAD_LOCALITY = 61;

export interface TctiControlTarget {
  readonly established: boolean;
  /** Cancels what runs, where it came through the tcti door. */
  cancel(): void;
}

/**
 * The answer to one control request. Clients of this door may not power the TPM on or off or touch its state: those
 * commands, and unknown ones, are BAD_ORDINAL. Only locality 0 is theirs.
 */
export function answerControl(request: Buffer, target: TctiControlTarget): Buffer {
  if (request.length < 4) return words(BAD_PARAMETER);
  switch (request.readUInt32BE(0)) {
    case CMD.GetCapability:
      return words(SUCCESS, CAPABILITIES);
    case CMD.GetTpmEstablished:
      // The bit, then three bytes of padding.
      return words(SUCCESS, target.established ? 0x01000000 : 0);
    case CMD.SetLocality:
      // One byte; some clients pad it to four.
      if (request.length < 5) return words(BAD_PARAMETER);
      return words(request.readUInt8(4) === 0 ? SUCCESS : BAD_LOCALITY);
    case CMD.CancelTpmCommand:
      target.cancel();
      return words(SUCCESS);
    default:
      return words(BAD_ORDINAL);
  }
}

/** A control connection. One receive is one request: peers pad some requests, and wait for each answer. */
export function serveTctiControl(
  fd: number,
  target: TctiControlTarget,
  onClosed: () => void,
): { close(): void } {
  const socket = new Socket({ fd });
  // A client that takes no answers waits: they are not kept for it without bound.
  socket.on('data', (chunk: Buffer) => {
    if (!socket.write(answerControl(chunk, target))) socket.pause();
  });
  socket.on('drain', () => socket.resume());
  socket.on('error', () => {});
  socket.on('close', onClosed);
  return { close: () => void socket.destroy() };
}

function words(...values: number[]): Buffer {
  const out = Buffer.alloc(4 * values.length);
  values.forEach((value, index) => {
    out.writeUInt32BE(value, 4 * index);
  });
  return out;
}
