/** Lines of JSON on the control channel (the worker's descriptor 4), one message each. */
export type WorkerMessage =
  /** The worker's box key, 32 bytes in hex. First of all. */
  | { readonly type: 'ready'; readonly publicKey: string; readonly libtpms: string }
  /** The answer to `rehearse`. */
  | { readonly type: 'rehearsed' }
  /** State is loaded and generation ≥ 1 is durable: the doors may open. */
  | { readonly type: 'serving'; readonly epoch: number; readonly generation: number }
  | { readonly type: 'link-lost' }
  | { readonly type: 'link-up' }
  | { readonly type: 'connection-closed'; readonly id: number }
  /** A VMM gave a data channel, which was sent over the descriptor channel; a `connection` of `vmm-data` is the answer. */
  | { readonly type: 'data-channel' }
  /** The VMM came or went, or changed something of the TPM. */
  | ({ readonly type: 'vmm' } & VmmStatus)
  /** The VMM needs the TPM no more; it is off. */
  | { readonly type: 'vmm-shut-down' }
  /** The TPM is lost, and the VMM begins a new run of its VM. It is said again until there is an answer. */
  | ({ readonly type: 'vm-reset' } & VmmChoice)
  /** It answers TPM_RC_FAILURE to everything. */
  | { readonly type: 'lost' }
  /** It holds the VMM's connections in the place of a TPM. */
  | { readonly type: 'standing-in' }
  /** The VMM needs the TPM that it stands in for. It is said again until there is an answer. */
  | ({ readonly type: 'vmm-calls' } & VmmCall)
  /** The worker ends now, with another status than 0. */
  | { readonly type: 'failed'; readonly reason: string; readonly message: string }
  /** Shutdown(CLEAR) is saved and durable; the worker ends now. */
  | { readonly type: 'stopped' };

export type SupervisorMessage =
  /**
   * There is no identity yet: time to do everything once that a start will do. `managerKey` as in `identity`, if known;
   * `checkpoint` of a VM run that there is not.
   */
  | {
      readonly type: 'rehearse';
      readonly managerKey: string | undefined;
      readonly checkpoint: CheckpointFields;
    }
  /**
   * `ticket`: a serialised SignedTicket, base64. `managerKey`: 32 bytes in hex. `outage`: for each kind of client, how
   * many milliseconds its commands are held, while the manager is away, before they are tried.
   */
  | {
      readonly type: 'identity';
      readonly ticket: string;
      readonly managerKey: string;
      readonly startup: 'clear' | 'none';
      /** `vmm`: the TPM stays off until the VMM powers it on. */
      readonly power: 'on' | 'vmm';
      readonly vmm: VmmChoice;
      /** Its VMM has brought it from another host, and wants to go on here. */
      readonly arrives?: boolean;
      readonly outage: { readonly holdMs: Readonly<Record<'tpm' | 'tcti', number>> };
      readonly checkpoint: CheckpointFields | null;
    }
  /** Instead of an identity: the VM run goes on, and its state is lost. */
  | { readonly type: 'lost'; readonly checkpoint: CheckpointFields }
  /**
   * Instead of an identity, which may follow: the TPM is on its way. `away` from here, `incoming` to here with its VMM; then
   * `refused` is why the INIT that is in the VMM's socket is not done.
   */
  | {
      readonly type: 'stand-in';
      readonly kind: 'away' | 'incoming';
      readonly bufferSize: number;
      readonly refused?: string;
      readonly checkpoint: CheckpointFields;
    }
  /** What the VMM waits for does not come. */
  | { readonly type: 'no-tpm'; readonly message: string }
  /** A new manager link was passed on the descriptor channel. */
  | { readonly type: 'link' }
  /** A guest's connection was passed on the descriptor channel. `peer`: process id of its client, as the host sees it. */
  | {
      readonly type: 'connection';
      readonly door: DoorName;
      readonly id: number;
      readonly peer: number | undefined;
    }
  /** That process has ended. */
  | { readonly type: 'peer-gone'; readonly peer: number }
  /** The data channel is not kept. */
  | { readonly type: 'no-data-channel' }
  /** No other worker comes for a new run of the VM. */
  | { readonly type: 'no-vm-reset' }
  | { readonly type: 'stop' };

/** What a VMM has chosen, and keeps over a run of its VM that is lost. */
export interface VmmChoice {
  /** 0 where it has not chosen. */
  readonly bufferSize: number;
  readonly locality: number;
}

/** Why a VMM needs its TPM. */
export interface VmmCall extends VmmChoice {
  /** The control request that waits, or `command` for one of the guest's. */
  readonly request: string;
  /** Of the reference that it brought, 32 bytes in hex. */
  readonly referenceDigest: string | null;
}

export interface VmmStatus extends VmmChoice {
  readonly connected: boolean;
  readonly power: 'on' | 'off';
}

/** The descriptors of a CheckpointStore were passed on the descriptor channel. */
export interface CheckpointFields {
  /** The worker leaves checkpoints; otherwise only which connections wait for an answer. */
  readonly keeps: boolean;
  /** There is a pipe for the answers to control requests. */
  readonly control: boolean;
  /**
   * Set where a worker before this one ended: the sequence of its newest checkpoint, and how many open connections
   * follow at once.
   */
  readonly resumes: { readonly newest: number; readonly connections: number } | null;
}

/**
 * What a connection came through. `vmm-data`: what a VMM gave its commands by SET_DATAFD; it is no entrance.
 */
export const DOOR_NAMES = [
  'tpm',
  'tcti',
  'tcti-ctrl',
  'control',
  'vmm-data',
  'mssim',
  'mssim-platform',
  'ring',
] as const;
export type DoorName = (typeof DOOR_NAMES)[number];

/** A worker is not trusted with the supervisor's memory: no line is longer. */
const MAX_LINE_BYTES = 16 * 1024;

/** Splits the channel into lines. @throws Error for a line over the limit */
export class LineReader {
  #pending: Buffer;

  /** @param pending what came of the first line already */
  constructor(pending: Buffer = Buffer.alloc(0)) {
    this.#pending = pending;
  }

  /** What came of a line that has no end yet. */
  get pending(): Buffer {
    return this.#pending;
  }

  push(chunk: Buffer): string[] {
    this.#pending = Buffer.concat([this.#pending, chunk]);
    const lines: string[] = [];
    for (let end = this.#pending.indexOf(10); end >= 0; end = this.#pending.indexOf(10)) {
      lines.push(this.#pending.toString('utf8', 0, end));
      this.#pending = this.#pending.subarray(end + 1);
    }
    if (this.#pending.length > MAX_LINE_BYTES) throw new Error('a line of the control channel is too long');
    return lines;
  }
}

type Shape = Readonly<Record<string, (value: unknown) => boolean>>;
const isCount = (value: unknown): boolean => Number.isSafeInteger(value) && Number(value) >= 0;
const isText = (value: unknown): boolean => typeof value === 'string' && value.length <= 4096;

const SHAPES: Readonly<Record<WorkerMessage['type'], Shape>> = {
  ready: {
    publicKey: (value) => typeof value === 'string' && /^[0-9a-f]{64}$/.test(value),
    libtpms: isText,
  },
  rehearsed: {},
  serving: { epoch: isCount, generation: isCount },
  'link-lost': {},
  'link-up': {},
  'connection-closed': { id: isCount },
  'data-channel': {},
  vmm: {
    connected: (value) => typeof value === 'boolean',
    power: (value) => value === 'on' || value === 'off',
    bufferSize: isCount,
    locality: isCount,
  },
  'vmm-shut-down': {},
  'vm-reset': { bufferSize: isCount, locality: isCount },
  lost: {},
  'standing-in': {},
  'vmm-calls': {
    request: isText,
    referenceDigest: (value) => value === null || (typeof value === 'string' && /^[0-9a-f]{64}$/.test(value)),
    bufferSize: isCount,
    locality: isCount,
  },
  failed: { reason: isText, message: isText },
  stopped: {},
};

/** @throws Error for anything but a message of the protocol */
export function parseWorkerMessage(line: string): WorkerMessage {
  const value: unknown = JSON.parse(line);
  const fields = (typeof value === 'object' && value !== null ? value : {}) as Record<string, unknown>;
  const type = fields.type;
  if (typeof type !== 'string' || !Object.hasOwn(SHAPES, type)) throw new Error('a message of no known type');
  for (const [name, accepts] of Object.entries(SHAPES[type as WorkerMessage['type']])) {
    if (!accepts(fields[name])) throw new Error(`${type}: "${name}" is not what it must be`);
  }
  return fields as unknown as WorkerMessage;
}
