/** A guard, the same code without it, and the test that must then fail. */
export interface Mutant {
  readonly name: string;
  readonly file: string;
  /** Source text that occurs exactly once in the file. */
  readonly guard: string;
  readonly without: string;
  readonly test: {
    /** Below test/, without `.test.ts`. */
    readonly file: string;
    /** Part of the test's full name. */
    readonly name: string;
  };
}

export const MUTANTS: readonly Mutant[] = [
  {
    name: 'I-4 an answer waits until its save is acknowledged',
    file: 'vtpmd/src/worker/command-queue.ts',
    guard: 'if (saving) {',
    without: 'if (saving && this.#isDead) {',
    test: { file: 'vtpmd/worker-durability', name: 'I-4: lets no answer leave on any door' },
  },
  {
    name: 'I-4 the store syncs before it acknowledges',
    file: 'manager/src/store/lmdb-environment.ts',
    guard: 'overlappingSync: false,',
    without: 'overlappingSync: false, noSync: true,',
    test: { file: 'manager/store-child', name: 'I-4 acknowledges a commit only after fdatasync' },
  },
  {
    name: 'I-4 the audit log syncs before it acknowledges',
    file: 'manager/src/audit/current-file.ts',
    guard: "await handle.datasync();\n      barrier('audit.synced');",
    without: "barrier('audit.synced');",
    test: { file: 'manager/audit-crash', name: 'has synced before each acknowledgement' },
  },
  {
    name: 'I-5 the audit log holds the anchored entry',
    file: 'manager/src/audit/walk.ts',
    guard: 'if (n === this.anchored.length && !bytesEqual(digest, this.anchored.digest)) {',
    without: 'if (n < 0n && !bytesEqual(digest, this.anchored.digest)) {',
    test: { file: 'manager/audit-tamper', name: 'by another history of this one' },
  },
  {
    name: 'I-3 a Load is a compare-and-set on the epoch',
    file: 'manager/src/ownership/ticket-check.ts',
    guard: 'if (ticket.expectedEpoch !== epoch) {',
    without: 'if (ticket.expectedEpoch > epoch + 1_000_000n) {',
    test: { file: 'manager/ownership', name: 'takes a ticket once: stale-epoch' },
  },
  {
    name: 'I-3 a used sequence with other content ends the session',
    file: 'manager/src/ownership/live-session.ts',
    guard: 'if (sequence <= last) {',
    without: 'if (sequence < 0n) {',
    test: { file: 'manager/ownership', name: 'with a used sequence and other content ends the session' },
  },
  {
    name: 'I-3 no epoch begins while the last process is there',
    file: 'toolstack/src/supervisor/leftovers.ts',
    guard: 'await killAndWait([...found.values()]);',
    without: 'void killAndWait;',
    test: { file: 'e2e/one-live-copy', name: 'has no worker left when its next epoch begins' },
  },
  {
    name: 'I-2 the worker key on the ticket opens the Load',
    file: 'proto/src/identity.ts',
    guard: 'if (!verify(null, Buffer.concat([domain, message]), key, signature)) {',
    without: 'if (!verify(null, Buffer.concat([domain, message]), key, signature) && message.length === 0) {',
    test: { file: 'manager/ownership', name: 'refuses a ticket whose signatures do not hold' },
  },
  {
    name: 'I-2 only allowed images get state',
    file: 'manager/src/ownership/ticket-check.ts',
    guard: 'if (!environment.trust.isImageAllowed(ticket.imageDigest)) {',
    without: 'if (environment.trust.isImageAllowed.length > 9) {',
    test: { file: 'manager/ownership', name: 'image-not-allowed' },
  },
  {
    name: 'I-5 a record is authenticated as a whole',
    file: 'manager/src/records/format.ts',
    guard: 'if (stored.mac.length !== expected.length || !timingSafeEqual(stored.mac, expected)) {',
    without: 'if (stored.mac.length !== expected.length && !timingSafeEqual(stored.mac, expected)) {',
    test: { file: 'manager/records', name: 'are refused with any bit flipped' },
  },
  {
    name: 'I-9 a retired vTPM is never loaded again',
    file: 'manager/src/ownership/ticket-check.ts',
    guard: "if (header?.kind === 'RETIRED') {",
    without: "if (header?.kind === 'RETIRED' && header.epoch < 0n) {",
    test: { file: 'manager/ownership', name: 'refuses what was retired: retired' },
  },
  {
    name: 'I-6 the sealed secret opens by policy alone',
    file: 'tpm2-ts-bindings/src/templates.ts',
    guard: 'A.fixedTPM | A.fixedParent | A.adminWithPolicy | A.noDA,',
    without: 'A.fixedTPM | A.fixedParent | A.adminWithPolicy | A.noDA | A.userWithAuth,',
    test: { file: 'manager/root-tpm', name: 'I-6 the empty authorisation does not open it' },
  },
  {
    name: 'I-7 the secret crosses the bus in an encrypting session',
    file: 'manager/src/root-tpm/release.ts',
    guard: "{ kind: 'policy', encrypt: 'both', salt: srk }",
    without: "{ kind: 'policy', salt: srk }",
    test: { file: 'manager/root-tpm', name: 'I-7 the secret is in no byte on the bus' },
  },
  {
    name: 'I-7 nothing is salted to a key of another Name',
    file: 'manager/src/root-tpm/srk.ts',
    guard: "if (srk.name.toString('hex') !== enrolment.srkName) {",
    without: 'if (srk.name.length > 99) {',
    test: { file: 'manager/root-tpm', name: 'a substituted SRK is refused by its Name' },
  },
  {
    name: 'I-6 an approval holds for one value of the revocation counter',
    file: 'tpm2-ts-bindings/src/approval.ts',
    guard: 'operation: Eo.EQ,',
    without: 'operation: Eo.UNSIGNED_GE,',
    test: { file: 'manager/root-tpm-approvals', name: 'I-6 a revoked approval stays dead' },
  },
  {
    name: 'I-6 an approval holds for one installation',
    file: 'manager/src/root-tpm/approvals.ts',
    guard: "subject: Buffer.from(enrolment.installation, 'hex'),",
    without: 'subject: Buffer.alloc(enrolment.installation.length / 2),',
    test: {
      file: 'manager/root-tpm-approvals',
      name: 'I-6 the chip refuses what the authority did not approve',
    },
  },
  {
    name: 'I-6 the NV half of an old generation is overwritten',
    file: 'manager/src/root-tpm/nv-index.ts',
    guard: 'if ((attributes & NV_TYPE) === 0) {',
    without: 'if ((attributes & NV_TYPE) === NV_TYPE) {',
    test: { file: 'manager/root-tpm-generations', name: 'the old sealed blob is worthless after it' },
  },
  {
    name: 'I-7 a rotation writes in an encrypting session',
    file: 'manager/src/root-tpm/generation.ts',
    guard: "const salted = { kind: 'hmac', encrypt: 'both', salt: srk } as const;",
    without: "const salted = { kind: 'hmac', salt: srk } as const;",
    test: { file: 'manager/root-tpm-generations', name: 'I-7 a rotation shows no secret on the bus' },
  },
  {
    name: 'I-5 the anchor counter has the enrolled Name',
    file: 'manager/src/root-tpm/anchor-counter.ts',
    guard: "if (index.name.toString('hex') !== anchor.name)",
    without: 'if (index.name.length > 99)',
    test: { file: 'manager/root-tpm-anchor', name: 'I-5 one that the owner made anew is refused' },
  },
  {
    name: 'I-5 of a count whose answer was lost the chip is asked before the next',
    file: 'manager/src/store/anchor-counter.ts',
    guard: 'const now = attempt === 0 ? wanted - 1n : await this.counter.read();',
    without: 'const now = wanted - 1n;',
    test: { file: 'manager/anchor-counter', name: 'a TPM that fails is asked again' },
  },
  {
    name: 'I-5 the anchor says the next value before the chip counts',
    file: 'manager/src/store/group-commit.ts',
    guard: 'counter: this.#steps.stated + (isCounting ? 1n : 0n),',
    without: 'counter: this.#steps.stated,',
    test: { file: 'manager/anchor-counter', name: 'I-5 a disk from before an event is refused' },
  },
  {
    name: 'I-5 an event waits for the chip',
    file: 'manager/src/store/group-commit.ts',
    guard: "if (write.counting === 'later') write.resolve",
    without: 'write.resolve',
    test: { file: 'manager/anchor-counter', name: 'is not acknowledged before it is' },
  },
  {
    name: 'I-5 an old anchor is refused',
    file: 'manager/src/store/anchor-counter.ts',
    guard: 'if (stated === shown) return shown;',
    without: 'if (stated <= shown) return shown;',
    test: { file: 'manager/anchored-store', name: 'a whole older copy of the files is refused' },
  },
  {
    name: 'tpm2-ts-bindings: the HMAC of an answer is compared',
    file: 'tpm2-ts-bindings/src/session.ts',
    guard: 'if (expected.length !== received.length || !timingSafeEqual(expected, received)) {',
    without: 'if (expected.length !== received.length && !timingSafeEqual(expected, received)) {',
    test: { file: 'tpm2-ts-bindings/session', name: 'an answer made with another key is refused' },
  },
  {
    name: 'tpm2-ts-bindings: an answer with an error has nothing after its code',
    file: 'tpm2-ts-bindings/src/pipeline.ts',
    guard: 'if (response.length !== HEADER || (tag !== St.NO_SESSIONS && tag !== St.RSP_COMMAND)) {',
    without: 'if (response.length < HEADER) {',
    test: { file: 'tpm2-ts-bindings/flip', name: 'is refused, and ends the session' },
  },
  {
    name: 'tpm2-ts-bindings: a primary key has the trusted Name',
    file: 'tpm2-ts-bindings/src/objects.ts',
    guard: 'if (options.name !== undefined && !object.name.equals(options.name)) {',
    without: 'if (options.name !== undefined && options.name.length === 0) {',
    test: { file: 'tpm2-ts-bindings/hostile', name: 'with a storage key of its own TPM is refused by Name' },
  },
  {
    name: 'tpm2-ts-bindings: nothing encrypts without a salt or a secret that is bound',
    file: 'tpm2-ts-bindings/src/open-session.ts',
    guard: 'if (options.encrypt !== undefined && salt === undefined && !bind?.authValue.length) {',
    without: 'if (options.encrypt !== undefined && salt === undefined && bind?.authValue.length === 999) {',
    test: { file: 'tpm2-ts-bindings/session', name: 'encryption without salt or bind cannot be asked for' },
  },
  {
    name: 'tpm2-ts-bindings: a list is as long as its bytes at the most',
    file: 'tpm2-ts-bindings/src/codec.ts',
    guard: 'if (count > MAX_LIST || count > reader.left) {',
    without: 'if (count > MAX_LIST * reader.left) {',
    test: { file: 'tpm2-ts-bindings/codec', name: 'a list that announces more than there is' },
  },
  {
    name: 'tpm2-ts-bindings: no late answer is that of the next command',
    file: 'tpm2-ts-bindings/src/transport/stream.ts',
    guard: 'const timer = setTimeout(() => this.fail(',
    without:
      'const fail = (why: string) => { this.#waiter = undefined; reject(transportError(why)); };' +
      'const timer = setTimeout(() => fail(',
    test: { file: 'tpm2-ts-bindings/transport', name: 'after the deadline a late answer is nobody’s' },
  },
  {
    name: 'tpm2-ts-bindings: what counts wrong guesses is not sent again',
    file: 'tpm2-ts-bindings/src/response-code.ts',
    guard: 'Rc.YIELDED, Rc.TESTING, Rc.NV_RATE]',
    without: 'Rc.YIELDED, Rc.TESTING, Rc.NV_RATE, Rc.LOCKOUT]',
    test: { file: 'tpm2-ts-bindings/error', name: 'only RETRY, YIELDED, TESTING and NV_RATE are retryable' },
  },
  {
    name: 'tpm2-ts-bindings: a session whose command got no answer is of no more use',
    file: 'tpm2-ts-bindings/src/tpm.ts',
    guard: 'if (!isInStep) for (const session of used) session.poison();',
    without: 'if (!isInStep && used.length > 9) for (const session of used) session.poison();',
    test: { file: 'tpm2-ts-bindings/session', name: 'a session whose command got no answer is poisoned' },
  },
];
