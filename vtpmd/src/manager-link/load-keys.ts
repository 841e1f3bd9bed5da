import { AgreedBox, type BoxKeyPair, boxKeyPair, bytesEqual } from 'vtpm-proto';

/** What a worker takes one identity with: a key pair of its own, and what it has in common with the manager. */
export class LoadKeys {
  readonly #pair: BoxKeyPair;
  #agreed: { readonly managerKey: Uint8Array; readonly box: AgreedBox } | undefined;

  constructor(pair = boxKeyPair()) {
    this.#pair = pair;
  }

  /** 32 bytes */
  get publicKey(): Uint8Array {
    return this.#pair.publicKey;
  }

  /** Agrees with the manager of this public key, 32 bytes, before there is anything to say to it. */
  agree(managerKey: Uint8Array): void {
    this.#agreed?.box.wipe();
    this.#agreed = { managerKey, box: new AgreedBox(managerKey, this.#pair) };
  }

  /** @param managerKey 32 bytes @throws ProtoError where it is no key */
  boxFor(managerKey: Uint8Array): AgreedBox {
    if (this.#agreed && bytesEqual(this.#agreed.managerKey, managerKey)) return this.#agreed.box;
    this.agree(managerKey);
    return this.boxFor(managerKey);
  }

  /** They are of no use any more. */
  wipe(): void {
    this.#pair.secretKey.fill(0);
    this.#agreed?.box.wipe();
  }
}
