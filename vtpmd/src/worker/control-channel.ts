import { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { receiveDescriptor } from 'vtpm-common/libc';
import type { VmmStatus } from '../control/vmm-doors.js';
import { VtpmdError } from '../error.js';
import type { StandInKind, VmmCall } from './stand-in.js';

/** What a worker tells its supervisor; one JSON object per line. */
export type WorkerMessage =
  | { type: 'ready'; publicKey: string; libtpms: string }
  | { type: 'rehearsed' }
  | { type: 'serving'; epoch: number; generation: number }
  | { type: 'link-lost'; message: string }
  | { type: 'link-up' }
  | { type: 'connection-closed'; id: number }
  /** A VMM gave a data channel, which was sent over the descriptor channel: a `connection` of `vmm-data` follows. */
  | { type: 'data-channel' }
  /** The VMM came or went, or changed something of the TPM. */
  | ({ type: 'vmm' } & VmmStatus)
  /** The VMM needs the TPM no more; it is off. */
  | { type: 'vmm-shut-down' }
  /** The TPM is lost, and the VMM begins a new run of its VM. */
  | { type: 'vm-reset'; bufferSize: number; locality: number }
  /** Holds the VMM's connections in the place of a TPM. */
  | { type: 'standing-in' }
  /** The VMM needs the TPM that somebody stands in for. */
  | ({ type: 'vmm-calls' } & VmmCall)
  /** Answers TPM_RC_FAILURE to everything. */
  | { type: 'lost' }
  | { type: 'failed'; reason: string; message: string }
  | { type: 'stopped' };

/** What it hears. Descriptors come over a channel of their own, before the line that announces them. */
export type SupervisorMessage =
  /** `managerKey`: of the manager that the identity will probably be for. `checkpoint`: of a VM run that there is not. */
  | {
      type: 'rehearse';
      managerKey: Uint8Array | undefined;
      checkpoint: CheckpointDescriptors | undefined;
    }
  | { type: 'identity'; fields: Record<string, unknown>; checkpoint: CheckpointDescriptors | undefined }
  /** Nothing can go on: see LostTpm. */
  | { type: 'lost'; checkpoint: CheckpointDescriptors }
  /** The TPM is at another host, or on its way: see StandIn. */
  | {
      type: 'stand-in';
      kind: StandInKind;
      bufferSize: number;
      refused: string | undefined;
      outage: unknown;
      checkpoint: CheckpointDescriptors;
    }
  /** It does not come. */
  | { type: 'no-tpm'; message: string }
  | { type: 'link'; fd: number }
  /** `peer`: process id of the client, where the supervisor says when it is gone. */
  | { type: 'connection'; door: string; id: number; peer: number | undefined; fd: number }
  | { type: 'peer-gone'; peer: number }
  /** The data channel is not kept. */
  | { type: 'no-data-channel' }
  /** There is no other worker for a new run of the VM. */
  | { type: 'no-vm-reset' }
  | { type: 'stop' };

export interface PipeEnds {
  readonly read: number;
  readonly write: number;
}

/** What outlives the workers of one VM run. */
export interface CheckpointDescriptors {
  readonly memory: number;
  /** What answers go through. */
  readonly pipe: PipeEnds;
  /** What answers to control requests go through, where the vTPM has that door. */
  readonly controlPipe: PipeEnds | undefined;
  /** The worker leaves checkpoints. */
  readonly keeps: boolean;
  /** A worker before this one: the sequence of its newest checkpoint, and how many connections follow. */
  readonly resumes: { readonly newest: number; readonly connections: number } | undefined;
}

export interface ControlChannel {
  /** `sent` is called when the line has left the process. */
  send(message: WorkerMessage, sent?: () => void): void;
}

/** Longest line: an identity with its ticket is below 2 KiB. */
const MAX_LINE_BYTES = 64 * 1024;

/**
 * Opens both channels to the supervisor. The end of the control channel is the end of the supervisor: `onEnd`.
 * `onMessage` may throw VtpmdError; `onError` gets that, and what cannot be read.
 */
export function openControlChannel(
  ends: { control: number | Duplex; descriptors: number },
  handlers: {
    onMessage(message: SupervisorMessage): void;
    onError(error: VtpmdError): void;
    onEnd(): void;
  },
): ControlChannel {
  const socket = typeof ends.control === 'number' ? new Socket({ fd: ends.control }) : ends.control;
  let pending = '';
  socket.setEncoding('utf8');
  socket.on('data', (chunk: string) => {
    pending += chunk;
    try {
      for (let end = pending.indexOf('\n'); end >= 0; end = pending.indexOf('\n')) {
        const line = pending.slice(0, end);
        pending = pending.slice(end + 1);
        handlers.onMessage(parse(line, ends.descriptors));
      }
      if (pending.length > MAX_LINE_BYTES) throw new VtpmdError('protocol', 'a control line has no end');
    } catch (error) {
      handlers.onError(VtpmdError.from(error));
    }
  });
  socket.on('end', handlers.onEnd);
  socket.on('error', handlers.onEnd);
  return { send: (message, sent) => void socket.write(`${JSON.stringify(message)}\n`, () => sent?.()) };
}

function parse(line: string, descriptors: number): SupervisorMessage {
  let fields: Record<string, unknown>;
  try {
    fields = JSON.parse(line) as Record<string, unknown>;
  } catch (cause) {
    throw new VtpmdError('protocol', 'a control line is not JSON', { cause });
  }
  switch (fields.type) {
    case 'identity': {
      const checkpoint = takeCheckpointIfAny(descriptors, fields.checkpoint);
      return { type: 'identity', fields, checkpoint };
    }
    case 'lost':
      return { type: 'lost', checkpoint: takeCheckpoint(descriptors, fields.checkpoint) };
    case 'stand-in': {
      const { kind, bufferSize = 0, refused, outage } = fields;
      const checkpoint = takeCheckpoint(descriptors, fields.checkpoint);
      if ((kind !== 'away' && kind !== 'incoming') || !isCount(bufferSize)) {
        throw new VtpmdError('protocol', 'for what it is to stand in is not said');
      }
      const why = typeof refused === 'string' ? refused : undefined;
      return {
        ...{ type: 'stand-in', kind, bufferSize: Number(bufferSize) },
        refused: why,
        outage,
        checkpoint,
      };
    }
    case 'no-tpm':
      return { type: 'no-tpm', message: String(fields.message) };
    case 'rehearse': {
      const { managerKey } = fields;
      const isKey = typeof managerKey === 'string' && /^[0-9a-f]{64}$/i.test(managerKey);
      return {
        type: 'rehearse',
        managerKey: isKey ? Buffer.from(managerKey, 'hex') : undefined,
        checkpoint: takeCheckpointIfAny(descriptors, fields.checkpoint),
      };
    }
    case 'no-data-channel':
    case 'no-vm-reset':
    case 'stop':
      return { type: fields.type };
    case 'link':
      return { type: 'link', fd: takeDescriptor(descriptors, 'link') };
    case 'connection': {
      const { door, id, peer } = fields;
      const fd = takeDescriptor(descriptors, 'connection');
      if (typeof door !== 'string' || typeof id !== 'number') {
        throw new VtpmdError('protocol', 'a connection has no door or id');
      }
      return { type: 'connection', door, id, peer: typeof peer === 'number' ? peer : undefined, fd };
    }
    case 'peer-gone':
      if (typeof fields.peer !== 'number') throw new VtpmdError('protocol', 'nobody is named to be gone');
      return { type: 'peer-gone', peer: fields.peer };
    default:
      throw new VtpmdError('protocol', `unknown control message "${String(fields.type).slice(0, 40)}"`);
  }
}

function takeCheckpointIfAny(descriptors: number, fields: unknown): CheckpointDescriptors | undefined {
  return fields == null ? undefined : takeCheckpoint(descriptors, fields);
}

function takeCheckpoint(descriptors: number, fields: unknown): CheckpointDescriptors {
  const { resumes, keeps, control } = (fields ?? {}) as {
    resumes?: { newest?: unknown; connections?: unknown } | null;
    keeps?: unknown;
    control?: unknown;
  };
  const memory = takeDescriptor(descriptors, 'checkpoint memory');
  const pipe = takePipe(descriptors);
  const controlPipe = control === true ? takePipe(descriptors) : undefined;
  const given = { memory, pipe, controlPipe, keeps: keeps === true };
  if (resumes == null) return { ...given, resumes: undefined };
  const { newest, connections } = resumes;
  if (!isCount(newest) || !isCount(connections)) {
    throw new VtpmdError('protocol', 'what a worker left is not described');
  }
  return { ...given, resumes: { newest, connections } };
}

function takePipe(descriptors: number): PipeEnds {
  const read = takeDescriptor(descriptors, 'pipe');
  return { read, write: takeDescriptor(descriptors, 'pipe') };
}

function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && Number(value) >= 0;
}

function takeDescriptor(channel: number, what: string): number {
  const fd = receiveDescriptor(channel);
  if (fd === undefined) throw new VtpmdError('protocol', `a ${what} was announced without its descriptor`);
  return fd;
}
