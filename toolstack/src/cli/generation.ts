const ACCEPTANCE = 2 ** 32;

/** The upper half says at which count of the TPM an old state was last accepted (0: never), the lower one counts saves. */
export function sayGeneration(generation: number): string {
  const accepted = Math.floor(generation / ACCEPTANCE);
  const saves = String(generation % ACCEPTANCE);
  return accepted === 0 ? saves : `${saves}, after an old state was accepted at count ${accepted} of the TPM`;
}
