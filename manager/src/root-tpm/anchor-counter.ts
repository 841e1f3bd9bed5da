import {
  concat,
  NV_Increment,
  type NvEntity,
  openSession,
  Rc,
  readNvIndex,
  type Session,
  type Tpm,
  TpmError,
  wipe,
  withSession,
} from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';
import type { RootTpmEnrolment } from './enrolment.js';
import { readCounterBy } from './nv-counter.js';
import { whereIs } from './nv-index.js';
import { enrolledSrk } from './srk.js';

/**
 * The chip's counter of states of the store. Each value is proved by the chip with a secret that nobody else has.
 * Both throw ManagerError `anchor-removed`, `tpm-changed`, and the TPM's. After a failure of `increment` the counter may or
 * may not have counted: read it.
 */
export interface AnchorCounter {
  read(): Promise<bigint>;
  /** Counts, and returns the value read after it. */
  increment(): Promise<bigint>;
}

interface Opened {
  readonly tpm: Tpm;
  readonly session: Session;
  readonly index: NvEntity;
}

/** Keeps one salted session open, as opening one costs several times what its use does. */
export class SessionCounter {
  #opened: Opened | undefined;
  /** The last proved value. */
  #last: bigint | undefined;
  readonly #auth: Buffer;

  /** @param auth 32 bytes; copied */
  constructor(
    private readonly enrolment: RootTpmEnrolment,
    auth: Uint8Array,
  ) {
    this.#auth = concat(auth);
  }

  /** Whether a session of it is loaded in the TPM now. */
  get isOpen(): boolean {
    return this.#opened !== undefined;
  }

  read(tpm: Tpm): Promise<bigint> {
    return this.#use(tpm, (opened) => this.#read(opened));
  }

  increment(tpm: Tpm): Promise<bigint> {
    const before = this.#last;
    let isFirst = true;
    return this.#use(tpm, async (opened) => {
      const { session, index } = opened;
      // Nothing proves an answer that the session is gone: the TPM may have counted before it.
      const hasCounted = !isFirst && before !== undefined && (await this.#read(opened)) > before;
      isFirst = false;
      if (!hasCounted)
        await tpm.run(NV_Increment, { authHandle: withSession(index, session), nvIndex: index }, {});
      return this.#read(opened);
    });
  }

  async close(): Promise<void> {
    await this.#drop();
    wipe(this.#auth);
  }

  async #read({ tpm, index, session }: Opened): Promise<bigint> {
    this.#last = await readCounterBy(tpm, index, session);
    return this.#last;
  }

  async #use<T>(tpm: Tpm, body: (opened: Opened) => Promise<T>): Promise<T> {
    // After a new connection nothing of the old one is there.
    if (this.#opened !== undefined && this.#opened.tpm !== tpm) this.#opened = undefined;
    for (let mayBeStale = this.#opened !== undefined; ; mayBeStale = false) {
      this.#opened ??= await this.#open(tpm);
      try {
        return await body(this.#opened);
      } catch (error) {
        // Whatever it was: the session may be out of step, and the index is looked at again.
        await this.#drop();
        if (mayBeStale && isGone(error)) continue;
        throw await this.#explain(tpm, error);
      }
    }
  }

  async #open(tpm: Tpm): Promise<Opened> {
    const srk = await enrolledSrk(tpm, this.enrolment);
    const index = await this.#enrolledIndex(tpm);
    return { tpm, index, session: await openSession(tpm, { kind: 'hmac', salt: srk }) };
  }

  async #enrolledIndex(tpm: Tpm): Promise<NvEntity> {
    const { anchor } = this.enrolment;
    const index = await readNvIndex(tpm, anchor.handle, this.#auth);
    if (index === undefined) throw removed(anchor);
    if (index.name.toString('hex') !== anchor.name) throw remade(anchor, 'with other properties');
    return index;
  }

  async #explain(tpm: Tpm, error: unknown): Promise<unknown> {
    if (TpmError.is(error, Rc.HANDLE, Rc.NV_UNINITIALIZED, Rc.AUTH_FAIL, Rc.BAD_AUTH)) {
      await this.#enrolledIndex(tpm);
      return TpmError.is(error, Rc.AUTH_FAIL, Rc.BAD_AUTH)
        ? remade(this.enrolment.anchor, 'with another secret', error)
        : error;
    }
    return error;
  }

  async #drop(): Promise<void> {
    const opened = this.#opened;
    this.#opened = undefined;
    await opened?.session.close();
  }
}

/** The TPM does not know the session, which another program or a reset removed. Such a command was not executed. */
function isGone(error: unknown): boolean {
  if (TpmError.is(error, Rc.REFERENCE_S0, Rc.REFERENCE_S1, Rc.REFERENCE_S2)) return true;
  return TpmError.is(error, Rc.VALUE, Rc.HANDLE) && error.response.subject === 'session';
}

const RECOVER =
  'Whether the store is the last one can no longer be told. If it is known to be, vtpmctl recover --accept-rollback makes a new one';

function removed(anchor: RootTpmEnrolment['anchor']): ManagerError {
  return new ManagerError(
    'anchor-removed',
    `${whereIs(anchor)}, which counts the states of the store, is gone: it was removed or the TPM was cleared. ${RECOVER}`,
  );
}

function remade(anchor: RootTpmEnrolment['anchor'], how: string, cause?: unknown): ManagerError {
  return new ManagerError(
    'tpm-changed',
    `${whereIs(anchor)}, which counts the states of the store, was made anew ${how}. ${RECOVER}`,
    { cause },
  );
}
