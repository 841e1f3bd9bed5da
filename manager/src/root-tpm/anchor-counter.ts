import {
  concat,
  inSession,
  NV_Increment,
  type NvEntity,
  type ObjectEntity,
  Rc,
  ReadClock,
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
  /**
   * Counts, and returns the value that it shows then, unless somebody else counted at the same moment: the next use shows that.
   * @param stated waited for when all is ready to count; where it rejects, so does this, and nothing is counted
   */
  increment(stated?: Promise<void>): Promise<bigint>;
  /** Where the chip keeps the value in its RAM: after a loss of power it may be ahead of what it was. */
  readonly orderly?: OrderlyCounter;
}

export interface OrderlyCounter {
  /** By how much at most. */
  readonly ahead: bigint;
  /** How often the TPM was reset (Part 2, TPMS_CLOCK_INFO: resetCount), proved like the value. */
  resets(): Promise<number>;
  /** Counts until it shows this, in one session, and returns the value read after it. */
  countTo(value: bigint): Promise<bigint>;
}

/**
 * Opens a session for each use: one that was kept would stay loaded when the manager is killed, and a TPM without a
 * resource manager has room for three or so.
 */
export class SessionCounter {
  readonly #auth: Buffer;
  /** As they were read; whether they still are so is asked when the TPM refuses something. */
  #objects: { readonly srk: ObjectEntity; readonly index: NvEntity } | undefined;

  /** @param auth 32 bytes; copied */
  constructor(
    private readonly enrolment: RootTpmEnrolment,
    auth: Uint8Array,
  ) {
    this.#auth = concat(auth);
  }

  read(tpm: Tpm): Promise<bigint> {
    return this.#use(tpm, (index, session) => readCounterBy(tpm, index, session));
  }

  increment(tpm: Tpm, stated?: Promise<void>): Promise<bigint> {
    return this.#use(tpm, async (index, session) => {
      const shown = await readCounterBy(tpm, index, session);
      await stated;
      // Who waits for the count waits for one command.
      session.endWithNext();
      await tpm.run(NV_Increment, { authHandle: withSession(index, session), nvIndex: index }, {});
      return shown + 1n;
    });
  }

  countTo(tpm: Tpm, value: bigint): Promise<bigint> {
    return this.#use(tpm, async (index, session) => {
      const shown = await readCounterBy(tpm, index, session);
      for (let next = shown; next < value; next++) {
        await tpm.run(NV_Increment, { authHandle: withSession(index, session), nvIndex: index }, {});
      }
      return await readCounterBy(tpm, index, session);
    });
  }

  resets(tpm: Tpm): Promise<number> {
    return this.#use(tpm, async (_, session) => {
      const { currentTime } = await tpm.run(ReadClock, {}, {}, [session]);
      return currentTime.clockInfo.resetCount;
    });
  }

  close(): void {
    wipe(this.#auth);
  }

  async #use<T>(tpm: Tpm, body: (index: NvEntity, session: Session) => Promise<T>): Promise<T> {
    this.#objects ??= await this.#enrolledObjects(tpm);
    const { srk, index } = this.#objects;
    try {
      return await inSession(tpm, { kind: 'hmac', salt: srk }, (session) => body(index, session));
    } catch (error) {
      this.#objects = undefined;
      throw await this.#explain(tpm, error);
    }
  }

  async #enrolledObjects(tpm: Tpm): Promise<{ srk: ObjectEntity; index: NvEntity }> {
    return { srk: await enrolledSrk(tpm, this.enrolment), index: await this.#enrolledIndex(tpm) };
  }

  async #enrolledIndex(tpm: Tpm): Promise<NvEntity> {
    const { anchor } = this.enrolment;
    const index = await readNvIndex(tpm, anchor.handle, this.#auth);
    if (index === undefined) throw removed(anchor);
    if (index.name.toString('hex') !== anchor.name) throw remade(anchor, 'with other properties');
    return index;
  }

  async #explain(tpm: Tpm, error: unknown): Promise<unknown> {
    if (!(error instanceof TpmError) || error.code !== 'tpm') return error;
    await this.#enrolledObjects(tpm);
    return TpmError.is(error, Rc.AUTH_FAIL, Rc.BAD_AUTH)
      ? remade(this.enrolment.anchor, 'with another secret', error)
      : error;
  }
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
