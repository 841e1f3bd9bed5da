import { VtpmdError } from '../error.js';
import { checkState } from './check-state.js';
import { checkReference, isReference, type ReferenceNames, type ReferredState } from './reference.js';
import type { StateBlobType } from './state-blobs.js';
import { decodeBlob } from './swtpm-format.js';

/** Bits of what outlives a worker of a bringing-in: halves of the reference; something that was in its memory only, or refused. */
const NOTED = { permanent: 1, volatile: 2, savestate: 0, lost: 4 } as const;

/** Where they are kept; 0 for none. */
export interface BroughtInNote {
  broughtIn: number;
}

/** What a power-on finds. */
export type Brought =
  | { readonly kind: 'nothing' }
  /** Both halves of the one reference that is out. */
  | { readonly kind: 'reference' }
  /** State of libtpms, in the clear. */
  | { readonly kind: 'plain'; readonly permanent: Buffer; readonly volatile: Buffer | undefined };

export interface BroughtInParts {
  readonly names: ReferenceNames;
  /** Undefined where the manager gives none. */
  readonly referenceKey: Uint8Array | undefined;
  readonly mayImport: boolean;
  readonly note: BroughtInNote;
}

/** The blobs that a VMM brings in between STOP and INIT. After one that was refused there is no power-on. */
export class BroughtIn {
  readonly #parts: BroughtInParts;
  readonly #halves = new Set<StateBlobType>();
  #plain: { readonly permanent: Buffer; volatile: Buffer | undefined } | undefined;
  #refusal: VtpmdError | undefined;

  /** @param suspended whether a reference is out, of what a worker before this one may have been brought */
  constructor(parts: BroughtInParts, suspended: boolean) {
    this.#parts = parts;
    const { broughtIn } = parts.note;
    if (suspended && (broughtIn & NOTED.lost) === 0) {
      for (const type of ['permanent', 'volatile'] as const)
        if (broughtIn & NOTED[type]) this.#halves.add(type);
    } else if (broughtIn !== 0) {
      this.#refusal = new VtpmdError(
        'blob-incomplete',
        'the worker that was brought the state has ended; stop the TPM and bring it in again',
      );
    }
  }

  /** @param state that is suspended @throws VtpmdError; then `take` throws too */
  add(type: StateBlobType, blob: Buffer, state: ReferredState | undefined): void {
    if (this.#refusal) throw this.#refusal;
    // There may be no such state: some VMMs bring that too.
    if (blob.length === 0) return;
    const { note } = this.#parts;
    try {
      if (isReference(blob)) {
        this.#addReference(type, blob, state);
        note.broughtIn |= NOTED[type];
      } else {
        note.broughtIn = NOTED.lost;
        this.#addPlain(type, blob);
      }
    } catch (error) {
      this.clear();
      note.broughtIn = NOTED.lost;
      this.#refusal = VtpmdError.from(error);
      throw this.#refusal;
    }
  }

  /** @throws VtpmdError where something was refused, or a half is missing */
  get(): Brought {
    if (this.#refusal) throw this.#refusal;
    if (this.#plain) return { kind: 'plain', ...this.#plain };
    if (this.#halves.size === 0) return { kind: 'nothing' };
    if (this.#halves.size === 2) return { kind: 'reference' };
    throw new VtpmdError(
      'blob-incomplete',
      'only one of the permanent and the volatile state was brought in',
    );
  }

  clear(): void {
    this.#plain?.permanent.fill(0);
    this.#plain?.volatile?.fill(0);
    this.#plain = undefined;
    this.#halves.clear();
    this.#refusal = undefined;
    this.#parts.note.broughtIn = 0;
  }

  #addReference(type: StateBlobType, blob: Buffer, state: ReferredState | undefined): void {
    const { names, referenceKey } = this.#parts;
    if (!referenceKey) throw new VtpmdError('blob-refused', 'this manager knows no references; upgrade it');
    checkReference(referenceKey, names, type, state, blob);
    if (this.#plain) throw mixed();
    this.#halves.add(type);
  }

  #addPlain(type: StateBlobType, blob: Buffer): void {
    if (!this.#parts.mayImport) {
      throw new VtpmdError(
        'plain-forbidden',
        'state in the clear does not come in here; create the vTPM with --state-blobs plain',
      );
    }
    const state = decodeBlob(type, blob);
    if (this.#halves.size > 0) throw mixed();
    if (type === 'permanent') {
      checkState(state);
      this.#plain?.permanent.fill(0);
      this.#plain?.volatile?.fill(0);
      this.#plain = { permanent: Buffer.from(state), volatile: undefined };
      return;
    }
    if (!this.#plain)
      throw new VtpmdError('blob-incomplete', 'the permanent state comes before the volatile one');
    checkState(this.#plain.permanent, state);
    this.#plain.volatile?.fill(0);
    this.#plain.volatile = Buffer.from(state);
  }
}

function mixed(): VtpmdError {
  return new VtpmdError('blob-incomplete', 'a reference and a state in the clear are not of one TPM');
}
