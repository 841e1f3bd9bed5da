import type { AnchorCounter } from 'vtpm-manager/root-tpm/index';

/** A counter for tests of what is above it; those of rollback itself use a TPM. */
export class MemoryCounter implements AnchorCounter {
  /** Called before each increment; what it throws is the TPM's failure. */
  beforeIncrement: () => void | Promise<void> = () => undefined;
  increments = 0;
  constructor(public value = 1n) {}

  async read(): Promise<bigint> {
    return this.value;
  }

  async increment(stated?: Promise<void>): Promise<bigint> {
    await stated;
    await this.beforeIncrement();
    this.increments++;
    return ++this.value;
  }
}
