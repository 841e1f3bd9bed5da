import { createHash } from 'node:crypto';
import {
  type Ack,
  bytesEqual,
  decode,
  encode,
  type LoadGrant,
  type ManagerFrame,
  ProtoError,
  type SaveBody,
  type SessionCipher,
  sessionCipher,
} from 'vtpm-proto';
import { VtpmdError } from '../error.js';
import type { ManagerLink, SaveStream } from './manager-link.js';

export interface SaveSessionEvents {
  /** The stream is open, on its first or a later link; what was in flight is committed or on its way. */
  up(): void;
  /** The link is lost. Saves wait for the next one. */
  lost(error: VtpmdError): void;
  /** The session is over: fenced, refused or a manager that cannot be trusted. Nothing may be answered any more. */
  over(error: VtpmdError): void;
  /** The manager wants no command to run. `frozen` answers when none does. @param suspends the last save suspends the TPM */
  freeze(suspends: boolean): void;
  thaw(): void;
}

interface InFlight {
  readonly sequence: bigint;
  readonly body: Buffer;
  readonly digest: Buffer;
  readonly acknowledged: () => void;
}

/**
 * The Save stream of one session, over as many links as it takes. At most one save is in flight, because the TPM waits
 * for it. A save is acknowledged only by an ACK that names its digest; after the loss of a link the manager says what it
 * had committed, and a save that it had not is sent again under its own sequence number.
 */
export class SaveSession {
  readonly #cipher: SessionCipher;
  readonly #vtpmUuid: Uint8Array;
  readonly #libtpmsVersion: string;
  readonly #events: SaveSessionEvents;
  #state: 'detached' | 'greeting' | 'open' | 'over' = 'detached';
  #stream: SaveStream | undefined;
  #link: ManagerLink | undefined;
  #linkNumber = 0n;
  #lastSent = 0n;
  #lastAcknowledged = 0n;
  #lastDigest: Uint8Array = new Uint8Array(0);
  #inFlight: InFlight | undefined;
  #lastControl = 0n;
  #generation: bigint;

  constructor(grant: LoadGrant, vtpmUuid: Uint8Array, libtpmsVersion: string, events: SaveSessionEvents) {
    this.#cipher = sessionCipher(grant.sessionKey, grant.sessionId, grant.epoch);
    this.#sessionId = grant.sessionId;
    this.#vtpmUuid = vtpmUuid;
    this.#libtpmsVersion = libtpmsVersion;
    this.#events = events;
    this.#generation = grant.generation;
  }

  readonly #sessionId: Uint8Array;

  /** Of the newest save that the manager committed. */
  get generation(): bigint {
    return this.#generation;
  }

  /** Uses a new link; the one before it is lost or never was. */
  attach(link: ManagerLink): void {
    if (this.#state === 'over') {
      link.close();
      return;
    }
    const previous = this.#link;
    this.#link = link;
    previous?.close();
    this.#linkNumber++;
    this.#state = 'greeting';
    const stream = link.openSave(
      (frame) => {
        if (this.#link === link) this.#receive(frame);
      },
      (error) => {
        if (this.#link === link) this.#ended(error);
      },
    );
    this.#stream = stream;
    const hello = encode('Hello', { lastSent: this.#lastSent, lastAcknowledged: this.#lastAcknowledged });
    const type = this.#linkNumber === 1n ? 'HELLO' : 'RESUME';
    const frame = this.#cipher.sealWorker(type, this.#linkNumber, hello, this.#vtpmUuid);
    stream.send({ ...frame, sessionId: this.#sessionId });
    if (this.#isFirstLink) this.#events.up();
  }

  /** Nothing is committed of a session that begins: what it says first does not wait for the answer to its greeting. */
  get #isFirstLink(): boolean {
    return this.#linkNumber === 1n;
  }

  /**
   * Resolves when the manager has committed the state; never where the session is over.
   * @param more what it is saved with, where a VMM takes it out or brought it in
   */
  save(permanent: Uint8Array, more: Pick<SaveBody, 'volatile' | 'use'> = {}): Promise<void> {
    if (this.#inFlight) throw new VtpmdError('internal', 'a save is in flight already');
    const body = encode('SaveBody', { permanent, ...more, libtpmsVersion: this.#libtpmsVersion });
    const digest = createHash('sha256').update(body).digest();
    this.#lastSent++;
    return new Promise((acknowledged) => {
      this.#inFlight = { sequence: this.#lastSent, body, digest, acknowledged };
      if (this.#state === 'open' || (this.#state === 'greeting' && this.#isFirstLink)) this.#sendInFlight();
    });
  }

  /** Tells the manager that its freeze holds. */
  frozen(): void {
    if (this.#state !== 'open') return;
    this.#stream?.send(this.#cipher.sealWorker('FROZEN', this.#lastControl, new Uint8Array(0)));
  }

  close(): void {
    this.#state = 'over';
    this.#link?.close();
  }

  #sendInFlight(): void {
    if (!this.#inFlight) return;
    this.#stream?.send(this.#cipher.sealWorker('SAVE', this.#inFlight.sequence, this.#inFlight.body));
  }

  #receive(frame: ManagerFrame): void {
    try {
      const payload = this.#cipher.openManager(frame);
      if (this.#state === 'over') return;
      switch (frame.type) {
        case 'ACK':
          this.#acknowledged(frame.sequence, decode('Ack', payload));
          return;
        case 'FENCED': {
          const { reason, message } = decode('Fenced', payload);
          this.#end(new VtpmdError('fenced', message, { managerReason: reason || 'fenced' }));
          return;
        }
        case 'FREEZE':
          this.#takeControl(frame.sequence);
          this.#events.freeze(decode('Freeze', payload).suspend);
          return;
        case 'THAW':
          this.#takeControl(frame.sequence);
          this.#events.thaw();
          return;
      }
    } catch (error) {
      const reason = error instanceof ProtoError ? error.message : VtpmdError.from(error).message;
      this.#end(
        new VtpmdError('protocol', `the manager's frame cannot be trusted: ${reason}`, { cause: error }),
      );
    }
  }

  /** FREEZE and THAW have rising numbers over the whole session: an old one says nothing. */
  #takeControl(sequence: bigint): void {
    if (sequence <= this.#lastControl) {
      throw new VtpmdError('protocol', `control frame ${sequence} came after ${this.#lastControl}`);
    }
    this.#lastControl = sequence;
  }

  #acknowledged(sequence: bigint, ack: Ack): void {
    if (this.#state === 'greeting') {
      if (sequence !== this.#linkNumber) {
        throw new VtpmdError('protocol', `the answer to link ${sequence} came on link ${this.#linkNumber}`);
      }
      this.#greeted(ack);
      return;
    }
    const save = this.#inFlight;
    if (!save || ack.committed !== save.sequence || sequence !== save.sequence) {
      throw new VtpmdError('protocol', `an acknowledgement of save ${ack.committed}, which is not in flight`);
    }
    this.#committed(save, ack);
  }

  /** The answer to HELLO or RESUME: what the manager had committed when the link came up. */
  #greeted(ack: Ack): void {
    const save = this.#inFlight;
    if (save && ack.committed === save.sequence) {
      this.#committed(save, ack);
    } else if (ack.committed !== this.#lastAcknowledged) {
      throw new VtpmdError(
        'protocol',
        `the manager has save ${ack.committed} of this session, ${this.#lastAcknowledged} was acknowledged`,
      );
    } else if (this.#lastAcknowledged > 0n && !bytesEqual(ack.digest, this.#lastDigest)) {
      throw new VtpmdError('protocol', `save ${ack.committed} has another digest at the manager`);
    }
    this.#state = 'open';
    if (this.#isFirstLink) return;
    // Before `up`, which may start a save that sends itself.
    this.#sendInFlight();
    this.#events.up();
  }

  #committed(save: InFlight, ack: Ack): void {
    if (!bytesEqual(ack.digest, save.digest)) {
      throw new VtpmdError('protocol', `save ${save.sequence} has another digest at the manager`);
    }
    if (ack.generation <= this.#generation) {
      throw new VtpmdError('protocol', `save ${save.sequence} became generation ${ack.generation}`);
    }
    this.#inFlight = undefined;
    this.#lastAcknowledged = save.sequence;
    this.#lastDigest = save.digest;
    this.#generation = ack.generation;
    save.body.fill(0);
    save.acknowledged();
  }

  #ended(error: VtpmdError): void {
    this.#link = undefined;
    this.#stream = undefined;
    if (this.#state === 'over') return;
    if (error.code !== 'link-lost') {
      this.#end(error);
      return;
    }
    this.#state = 'detached';
    this.#events.lost(error);
  }

  #end(error: VtpmdError): void {
    this.#state = 'over';
    this.#link?.close();
    this.#events.over(error);
  }
}
