import {
  type BoxKeyPair,
  bytesEqual,
  type MigrateOrder,
  ProtoError,
  type SignedMigrateOrder,
  uuidToText,
  verifyMigrateOrder,
} from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { TrustStore } from '../trust/trust-configuration.js';
import { MAX_DESCRIPTION_BYTES, MAX_ORDER_LIFETIME_MS, MAX_REMEMBERED } from './limits.js';

/** As of tickets: a toolstack in another time namespace. */
const CLOCK_SKEW_MS = 60_000n;

/** What an order is held against. */
export interface OrderEnvironment {
  readonly identity: Pick<BoxKeyPair, 'publicKey'>;
  readonly trust: Pick<TrustStore, 'isToolstackKeyTrusted'>;
  /** 16 bytes */
  bootId(): Uint8Array;
  /** CLOCK_MONOTONIC */
  monotonicMs(): bigint;
}

const REFUSAL = {
  malformed: 'bad-request',
  forged: 'ticket-forged',
  'newer-format': 'newer-format',
} as const;

/** Takes each order once. */
export class OrderCheck {
  /** Migration ids, with when their orders expire: after that the time refuses them. */
  readonly #used = new Map<string, bigint>();

  constructor(private readonly environment: OrderEnvironment) {}

  /**
   * Who signed comes first: nothing of an order that nobody signed who may is believed. What the vTPM's record says to it
   * is not looked at.
   * @throws ManagerError `bad-request`, `ticket-forged`, `newer-format`, `unknown-toolstack-key`, `wrong-manager`,
   * `ticket-expired`, `rate-limited`
   */
  check(signed: SignedMigrateOrder): MigrateOrder {
    const order = verified(signed);
    const { trust, identity } = this.environment;
    const vtpm = uuidToText(order.vtpmUuid);
    if (!trust.isToolstackKeyTrusted(order.toolstackKey, order.vtpmUuid)) {
      throw new ManagerError(
        'unknown-toolstack-key',
        `the order for vTPM ${vtpm} comes from a toolstack key this manager does not trust; use the toolstack that was named at init`,
      );
    }
    if (!bytesEqual(order.managerId, identity.publicKey)) {
      throw new ManagerError('wrong-manager', `the order for vTPM ${vtpm} is for another manager`);
    }
    this.#checkTime(order);
    if (order.description.length > MAX_DESCRIPTION_BYTES) {
      throw new ManagerError('too-large', `a description has at most ${MAX_DESCRIPTION_BYTES} bytes`);
    }
    this.#useOnce(order);
    return order;
  }

  #checkTime({ bootId, expiresAtMonotonicMs, vtpmUuid }: MigrateOrder): void {
    const now = this.environment.monotonicMs();
    const vtpm = uuidToText(vtpmUuid);
    if (!bytesEqual(bootId, this.environment.bootId())) {
      throw new ManagerError('ticket-expired', `the order for vTPM ${vtpm} is of another boot of the host`);
    }
    if (expiresAtMonotonicMs + CLOCK_SKEW_MS < now) {
      throw new ManagerError('ticket-expired', `the order for vTPM ${vtpm} has expired; sign a new one`);
    }
    if (expiresAtMonotonicMs > now + MAX_ORDER_LIFETIME_MS) {
      throw new ManagerError('bad-request', `an order is good for at most ${MAX_ORDER_LIFETIME_MS} ms`);
    }
  }

  #useOnce({ migrationId, expiresAtMonotonicMs }: MigrateOrder): void {
    const now = this.environment.monotonicMs();
    for (const [id, expiry] of this.#used) if (expiry + CLOCK_SKEW_MS < now) this.#used.delete(id);
    const id = Buffer.from(migrationId).toString('hex');
    if (this.#used.has(id)) {
      throw new ManagerError('ticket-expired', `the order ${id} was used already; sign a new one`);
    }
    if (this.#used.size >= MAX_REMEMBERED) {
      throw new ManagerError('rate-limited', 'too many orders in a short time; try again in a moment');
    }
    this.#used.set(id, expiresAtMonotonicMs);
  }
}

function verified(signed: SignedMigrateOrder): MigrateOrder {
  try {
    return verifyMigrateOrder(signed);
  } catch (error) {
    if (!(error instanceof ProtoError)) throw error;
    throw new ManagerError(REFUSAL[error.code], `the order is refused: ${error.message}`, { cause: error });
  }
}
