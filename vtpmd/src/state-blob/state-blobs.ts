/** What a VMM asks for or brings, one by one; `savestate` is of TPM 1.2 and never there. */
export type StateBlobType = 'permanent' | 'volatile' | 'savestate';

/** What INIT powers the TPM on from. The caller wipes it. */
export interface StartState {
  /** In the place of the permanent state that the worker has: it was imported. */
  readonly permanent: Buffer | undefined;
  /** Restored: TPM2_Startup is not sent then. */
  readonly volatile: Buffer | undefined;
}

/**
 * The state that a VMM takes out and brings in over its control connection. What is taken out is a reference to a state that
 * the manager keeps, or, for a vTPM whose ticket grants it, the state itself.
 */
export interface StateBlobs {
  /**
   * GET_STATEBLOB, while the TPM is on. With a reference the TPM is frozen when it resolves, and everything is durable.
   * @returns the whole blob; undefined where there is none of that type (answer TPM_RETRY with zero lengths)
   * @throws VtpmdError; see `resultOf`
   */
  takeOut(type: StateBlobType): Promise<Buffer | undefined>;
  /** No command runs: a reference is out. Shutdown must not be sent before a power-off. */
  readonly isFrozen: boolean;
  /**
   * LOCK_STORAGE, and what a command on the VMM's data channel does by itself: the VM goes on here. When it resolves, the
   * reference is durably worthless and commands run. At once where nothing is frozen.
   */
  takeBack(): Promise<void>;
  /**
   * FREEZE: the TPM goes on elsewhere, or in another worker. As `takeOut`, but nobody gets a reference, and no command ends it.
   * Where a reference is out already that stays what the TPM is suspended for.
   */
  leave(): Promise<void>;
  /** THAW: as `takeBack`, of what `leave` suspended. */
  stay(): Promise<void>;
  /**
   * SET_STATEBLOB, while the TPM is off: permanent first. Where it throws, the next INIT fails too, until `stopped`.
   * @param blob the whole of it, of 512 KiB at most; the caller wipes it
   */
  bringIn(type: StateBlobType, blob: Uint8Array): void;
  /** INIT, before the engine is started. @throws VtpmdError: the TPM stays off */
  begin(): StartState;
  /**
   * INIT, when the engine runs from what `begin` gave and before INIT is answered or any command runs: stirs the generator
   * and makes the start durable, so that a reference is used up. At once where nothing was brought in or taken out.
   * @param beforeSave called right before the Save, where there is one, with the permanent state in it
   */
  started(beforeSave: (permanent: Buffer) => void): Promise<void>;
  /** STOP, when the TPM is off: what was brought in, or refused, is forgotten. A reference that is out stays valid. */
  stopped(): void;
  /** Resolves when what is under way is done. */
  settled(): Promise<void>;
}
