/** What the listener for peers takes. All are far above what an evacuation needs. */
export interface PeerLimits {
  /** Milliseconds from the first packet to the end of the TLS handshake. */
  readonly handshakeMs: number;
  /** Connections of which it is not known yet whose they are, of all and of one address. */
  readonly handshakes: number;
  readonly handshakesPerAddress: number;
  /** Milliseconds for which a connection that was refused still counts as one of them: who is refused comes slowly. */
  readonly refusalPauseMs: number;
  /** Connections of peers, of all and of one. */
  readonly connections: number;
  readonly connectionsPerPeer: number;
  /** Connections that a peer may begin: at once, then each second. */
  readonly rate: { readonly burst: number; readonly perSecond: number };
  /** Bytes that one connection may bring; a migration is far below 1 MiB. */
  readonly bytes: number;
  /** Milliseconds without a byte; an honest peer asks more often whether this host is there. */
  readonly silenceMs: number;
  /** Milliseconds that a connection may have no session, at its begin and at its end. */
  readonly idleMs: number;
}

/** docs/peers.md has this table for operators. */
export const PEER_LIMITS: PeerLimits = {
  handshakeMs: 5_000,
  handshakes: 64,
  handshakesPerAddress: 8,
  refusalPauseMs: 1_000,
  connections: 512,
  connectionsPerPeer: 64,
  rate: { burst: 128, perSecond: 16 },
  bytes: 4 * 1024 * 1024,
  silenceMs: 30_000,
  idleMs: 5_000,
};

/** Who is on the way in: handshakes under way, in all and by address. */
export class Doorway {
  readonly #byAddress = new Map<string, number>();
  #all = 0;

  constructor(private readonly limits: PeerLimits) {}

  /** @returns what frees the place, or undefined where there is none */
  enter(address: string): (() => void) | undefined {
    const here = this.#byAddress.get(address) ?? 0;
    const { handshakes, handshakesPerAddress } = this.limits;
    if (this.#all >= handshakes || here >= handshakesPerAddress) return undefined;
    this.#all += 1;
    this.#byAddress.set(address, here + 1);
    let isFree = false;
    return () => {
      if (isFree) return;
      isFree = true;
      this.#all -= 1;
      const left = (this.#byAddress.get(address) ?? 1) - 1;
      if (left === 0) this.#byAddress.delete(address);
      else this.#byAddress.set(address, left);
    };
  }
}
