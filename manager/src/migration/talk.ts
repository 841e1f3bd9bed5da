import { barrier } from 'vtpm-common';
import {
  decode,
  encode,
  type Messages,
  type Peer,
  type PeerMessage,
  type PeerMessageType,
  ProtoError,
} from 'vtpm-proto';
import { ManagerError, type ManagerErrorCode } from '../error.js';
import type { PeerChannel } from '../peer/channel.js';
import { Transcript } from './transcript.js';

/** What a message of a type has in it. */
interface Payloads {
  HELLO: Messages['MigrationHello'];
  OFFER: Messages['MigrationOffer'];
  EVIDENCE: Messages['Evidence'];
  SECRET: Messages['MigrationSecret'];
  READY: Messages['MigrationReady'];
  DECISION: Messages['SignedDecision'];
  SETTLED: Messages['MigrationName'];
  INQUIRE: Messages['MigrationInquiry'];
  UNSETTLED: Messages['MigrationName'];
}

const MESSAGE = {
  HELLO: 'MigrationHello',
  OFFER: 'MigrationOffer',
  EVIDENCE: 'Evidence',
  SECRET: 'MigrationSecret',
  READY: 'MigrationReady',
  DECISION: 'SignedDecision',
  SETTLED: 'MigrationName',
  INQUIRE: 'MigrationInquiry',
  UNSETTLED: 'MigrationName',
} as const satisfies Record<keyof Payloads, keyof Messages>;

type Spoken = keyof Payloads;

/** Reasons that hosts give each other. Whatever else one says is one word at the other end: its codes are not ours to trust. */
const REASONS: ReadonlySet<string> = new Set<ManagerErrorCode>([
  'unknown-peer',
  'peer-forbidden',
  'peer-unattested',
  'peer-platform',
  'approval-stale',
  'peer-restarted',
  'peer-ek',
  'peer-ak',
  'peer-import-key',
  'peer-late',
  'import-key-lost',
  'migrating',
  'moved',
  'retired',
  'incompatible',
  'incomplete',
  'wrong-identifier',
  'wrong-vm',
  'migration-refused',
  'migration-aborted',
  'no-toolstack',
  'in-doubt',
  'unknown-migration',
  'stale-epoch',
  'rollback-detected',
  'store-full',
  'busy',
  'locked',
  'too-large',
  'rate-limited',
  'bad-request',
  'newer-format',
  'shutting-down',
]);
/** Those whose words are for the other host too. */
const SAID: ReadonlySet<string> = new Set<string>([...REASONS, 'platform-policy']);
const MAX_SENTENCE = 500;

/** A channel with what was said on it. Each end has one, and both have the same transcript. */
export class Talk {
  readonly transcript: Transcript;

  #first: PeerMessage | undefined;

  /**
   * @param side of this end, in the names of the points where a crash is tested
   * @param first what was read already, to see what it is about
   */
  constructor(
    readonly channel: PeerChannel,
    private readonly side: 'source' | 'destination',
    first?: PeerMessage,
  ) {
    this.transcript = new Transcript(channel.binding);
    this.#first = first;
  }

  get peer(): Peer {
    return this.channel.peer;
  }

  send<T extends Spoken>(type: T, value: Payloads[T]): Promise<void> {
    const name: keyof Messages = MESSAGE[type];
    return this.sendBytes(type, encode(name, value as never));
  }

  async sendBytes(type: PeerMessageType, payload: Uint8Array): Promise<void> {
    const message: PeerMessage = { type, payload };
    this.transcript.add(message);
    barrier(`migrate.${this.side}.send.${type}`);
    await this.channel.send(message);
    barrier(`migrate.${this.side}.sent.${type}`);
  }

  /**
   * The next message, which must be of this type. It is in the transcript once `value` was looked at: what it says of the
   * transcript is of the one before it.
   * @throws ManagerError `peer-late`, `bad-request`, and the other end's reason where it ends the migration
   */
  async receive<T extends Spoken>(type: T, limitMs: number): Promise<Received<Payloads[T]>> {
    const payload = await this.receiveBytes(type, limitMs);
    const value = readPayload(MESSAGE[type], payload) as Payloads[T];
    return { value, accept: () => this.transcript.add({ type, payload }) };
  }

  async receiveBytes(type: PeerMessageType, limitMs: number): Promise<Uint8Array> {
    const message = this.#first ?? (await this.channel.receive(limitMs));
    this.#first = undefined;
    if (message.type === 'REFUSED') throw reasonOf(message, this.peer.name);
    if (message.type !== type) {
      throw new ManagerError('bad-request', `host ${this.peer.name} sent ${message.type} instead of ${type}`);
    }
    barrier(`migrate.${this.side}.received.${type}`);
    return message.payload;
  }

  /**
   * It ends here; the other end is told why. What is about this host alone, its chip or disk for instance, is not in words for
   * others. Never rejects.
   */
  async refuse(error: ManagerError): Promise<void> {
    const { code: reason } = error;
    const message = SAID.has(reason) ? error.message : `it failed (${reason}), and its log says why`;
    const payload = encode('Refused', { reason, message });
    await this.channel.send({ type: 'REFUSED', payload }).catch(() => undefined);
    this.channel.close(error);
  }
}

interface Received<T> {
  readonly value: T;
  accept(): void;
}

/** @throws ManagerError `bad-request` */
export function readPayload<K extends keyof Messages>(name: K, payload: Uint8Array): Messages[K] {
  try {
    return decode(name, payload);
  } catch (error) {
    if (!(error instanceof ProtoError)) throw error;
    throw new ManagerError('bad-request', `not a ${name}: ${error.message}`, { cause: error });
  }
}

/** What the other end gave as its reason, as this one's. */
function reasonOf({ payload }: PeerMessage, name: string): ManagerError {
  const { reason, message } = readPayload('Refused', payload);
  const code = REASONS.has(reason) ? (reason as ManagerErrorCode) : 'migration-refused';
  const said = printable(message);
  // A command in it is for who is there.
  const where = said.includes('vtpmctl') ? ` (to be typed on ${name})` : '';
  return new ManagerError(code, `host ${name} refuses, in its own words: ${said}${where}`);
}

/** A sentence of another host, for logs and terminals of this one. */
function printable(text: string): string {
  const line = text.replaceAll(/[^\x20-\x7e]+/g, ' ');
  return line.length > MAX_SENTENCE ? `${line.slice(0, MAX_SENTENCE)}…` : line;
}
