import { randomBytes } from 'node:crypto';
import { setTimeout as delay } from 'node:timers/promises';
import { barrier, type Logger } from 'vtpm-common';
import { boxKeyPair, bytesEqual, type MigrationHello, type SignedDecision } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { wipe } from '../keys/index.js';
import type { Expected } from '../ownership/arrival.js';
import type { MadeChallenge } from '../peer/attestation-key.js';
import type { TravellingState } from '../records/index.js';
import type { ImportKey } from '../root-tpm/import-key.js';
import { openBundle } from './bundle.js';
import { checkLibtpms, commonVersion, OWN_RECORD_FORMAT } from './compatibility.js';
import { checkSuspension, expectedState } from './expected-state.js';
import { checkHello } from './hello.js';
import { LIMITS_MS, SETTLE_DELAY_MS } from './limits.js';
import { DESTINATION, type DestinationAt } from './machine.js';
import type { Arrivals, Attestor, Host } from './ports.js';
import { StateKeys, sharedSecret } from './state-key.js';
import type { Talk } from './talk.js';
import { within } from './within.js';

/** Asks the toolstack of this host. */
export interface Doorkeeper {
  /** Before anything costs anything. @throws ManagerError `no-toolstack` where nobody would be asked */
  check(): Promise<void>;
  /**
   * Resolves when it takes the vTPM. @param signal the migration has ended: nobody waits for an answer
   * @throws ManagerError `migration-refused`, `peer-late`
   */
  ask(hello: MigrationHello, signal: AbortSignal): Promise<void>;
}

export interface DestinationParts {
  readonly talk: Talk;
  readonly host: Host;
  readonly attestor: Attestor;
  readonly arrivals: Arrivals;
  readonly doorkeeper: Doorkeeper;
  /** Whether a migration may begin now. @throws ManagerError `busy` where there are too many, or this one is under way */
  readonly admit: (hello: MigrationHello) => void;
  /** It lives here. */
  readonly onCommitted: () => void;
  readonly log: Logger;
}

interface Offered {
  readonly hello: MigrationHello;
  readonly identifier: Buffer;
  readonly key: ImportKey;
}

interface Awaited {
  readonly hello: MigrationHello;
  readonly identifier: Buffer;
  readonly keys: StateKeys;
  /** Not where it is a dry run. */
  readonly expected: Expected | undefined;
}

type DestinationState =
  | { readonly at: 'greeting' }
  | { readonly at: 'offering'; readonly hello: MigrationHello }
  | ({ readonly at: 'attesting' } & Offered)
  | ({ readonly at: 'unwrapping'; readonly expected: Expected | undefined } & Offered)
  | ({ readonly at: 'accepting' } & Awaited)
  | ({ readonly at: 'ready' } & Awaited)
  | ({ readonly at: 'receiving'; readonly expected: Expected } & Omit<Awaited, 'expected'>)
  | { readonly at: 'deciding'; readonly expected: Expected; readonly state: TravellingState }
  | { readonly at: 'answering'; readonly signed: SignedDecision }
  | { readonly at: 'settling' }
  | DestinationEnd;

export type DestinationEnd =
  | { readonly at: 'checked' | 'committed' }
  | { readonly at: 'ended'; readonly reason: ManagerError };

/**
 * The destination of one migration. docs/migration.md has the states; the table in machine.ts says for each what it leads
 * to, also where it fails, and this class goes by that table.
 */
export class DestinationMigration {
  /** Unix milliseconds, for people; `since`: when it came to the state that it is in. */
  readonly begunAt = Date.now();
  since = this.begunAt;
  #state: DestinationState = { at: 'greeting' };
  #hello: MigrationHello | undefined;
  /** Looked for once: it takes longer than a guest should wait. */
  #libtpms = '';
  readonly #session = boxKeyPair();
  #challenge: MadeChallenge | undefined;
  #importKey: ImportKey | undefined;
  #keys: StateKeys | undefined;
  #expected: Expected | undefined;
  readonly #over = new AbortController();
  #endedBy: ManagerError | undefined;

  constructor(private readonly parts: DestinationParts) {}

  get at(): DestinationAt {
    return this.#state.at;
  }

  /** Undefined until it was read and looked at. */
  get hello(): MigrationHello | undefined {
    return this.#hello;
  }

  /** Ends it from outside. What is decided stays so. */
  end(reason: ManagerError): void {
    this.#endedBy ??= reason;
    this.#over.abort();
    this.#expected?.release(notComing(reason));
    void this.parts.talk.refuse(reason);
  }

  /** Never rejects: what goes wrong is in the end. */
  async run(): Promise<DestinationEnd> {
    for (;;) {
      const state = this.#state;
      if (isEnd(state)) {
        await this.#close(state);
        return state;
      }
      this.#state = await this.#step(state).catch((error: unknown) => this.#failed(state, error));
      this.since = Date.now();
    }
  }

  #failed({ at }: DestinationState, error: unknown): DestinationState {
    const to = DESTINATION[at].onFailure;
    const reason = this.#endedBy ?? ManagerError.from(error);
    return to === 'committed' ? { at: to } : { at: 'ended', reason };
  }

  async #close(state: DestinationEnd): Promise<void> {
    this.#over.abort();
    this.#keys?.wipe();
    wipe(this.#session.secretKey, this.#challenge?.answer);
    await this.#importKey?.drop();
    if (state.at === 'ended') {
      this.#expected?.release(notComing(state.reason));
      await this.parts.talk.refuse(state.reason);
    } else {
      this.parts.talk.channel.close();
    }
  }

  #step(state: Exclude<DestinationState, DestinationEnd>): Promise<DestinationState> {
    switch (state.at) {
      case 'greeting':
        return this.#greet();
      case 'offering':
        return this.#offer(state.hello);
      case 'attesting':
        return this.#attest(state);
      case 'unwrapping':
        return this.#unwrap(state);
      case 'accepting':
        return this.#accept(state);
      case 'ready':
        return this.#ready(state);
      case 'receiving':
        return this.#receive(state);
      case 'deciding':
        return this.#decide(state);
      case 'answering':
        return this.#answer(state.signed);
      case 'settling':
        return this.#settle();
    }
  }

  async #greet(): Promise<DestinationState> {
    const { talk, host, arrivals, doorkeeper, admit } = this.parts;
    const { value: hello, accept } = await talk.receive('HELLO', LIMITS_MS.hello);
    this.#libtpms = checkHello(hello, talk.peer, host);
    host.checkRoom();
    await doorkeeper.check();
    admit(hello);
    this.#hello = hello;
    await arrivals.check(hello, talk.peer);
    accept();
    return { at: 'offering', hello };
  }

  async #offer(hello: MigrationHello): Promise<DestinationState> {
    const { talk, attestor } = this.parts;
    const identifier = randomBytes(32);
    const challenge = attestor.challenge(talk.peer);
    this.#challenge = challenge;
    const answer = hello.challenge ? await attestor.answer(hello.challenge) : new Uint8Array(0);
    barrier('migrate.destination.import-key');
    const key = await attestor.makeImportKey(talk.transcript.digest);
    this.#importKey = key;
    const { publicArea, certifyInfo, certifySignature, pcrSelection } = key;
    await talk.send('OFFER', {
      version: commonVersion({ least: hello.leastVersion, most: hello.mostVersion }),
      nonce: randomBytes(32),
      sessionKey: this.#session.publicKey,
      identifier,
      importKey: { publicArea, certifyInfo, certifySignature, pcrSelection },
      libtpmsVersion: this.#libtpms,
      recordFormat: OWN_RECORD_FORMAT,
      challengeAnswer: answer,
      ...(challenge && { challenge: challenge.challenge }),
    });
    const evidence = await attestor.evidence(talk.transcript.digest);
    await talk.send('EVIDENCE', { ...evidence, challengeAnswer: new Uint8Array(0) });
    return { at: 'attesting', hello, identifier, key };
  }

  async #attest(offered: Offered): Promise<DestinationState> {
    const { talk, attestor, arrivals } = this.parts;
    const shown = talk.transcript.digest;
    const { value: evidence, accept } = await talk.receive('EVIDENCE', LIMITS_MS.attesting);
    if (this.#challenge) await attestor.prove(talk.peer, this.#challenge, evidence.challengeAnswer);
    attestor.verify(talk.peer, evidence, shown);
    accept();
    const { hello } = offered;
    if (!hello.dryRun) this.#expected = await arrivals.expect(hello, talk.peer);
    barrier('migrate.destination.expected');
    return { ...offered, expected: this.#expected, at: 'unwrapping' };
  }

  async #unwrap({ hello, identifier, key, expected }: Extract<DestinationState, { at: 'unwrapping' }>) {
    const { talk } = this.parts;
    const { value, accept } = await talk.receive('SECRET', LIMITS_MS.attesting);
    accept();
    const secret = await key.unwrap(value.point);
    let shared: Buffer | undefined;
    try {
      barrier('migrate.destination.unwrapped');
      shared = sharedSecret(this.#session, hello.sessionKey);
      this.#keys = new StateKeys(secret, shared, talk.transcript.digest);
      return { at: 'accepting' as const, hello, identifier, keys: this.#keys, expected };
    } finally {
      wipe(secret, shared, this.#session.secretKey);
    }
  }

  async #accept(awaited: Awaited): Promise<DestinationState> {
    const { host, doorkeeper } = this.parts;
    const { hello, expected } = awaited;
    barrier('migrate.destination.incoming');
    const began = performance.now();
    await this.#whileWanted(
      doorkeeper.ask(hello, this.#over.signal),
      LIMITS_MS.accepting,
      'the supervisor of the destination',
    );
    if (expected && hello.mode === 'LIVE') {
      const left = Math.max(1, LIMITS_MS.accepting - (performance.now() - began));
      const { libtpmsVersion } = await this.#whileWanted(
        expected.loadWaiting,
        left,
        'the worker at the destination',
      );
      checkLibtpms(hello.libtpmsVersion, libtpmsVersion);
    }
    barrier('migrate.destination.accepted');
    host.checkRoom();
    if (expected) await this.parts.arrivals.announce(expected);
    return { ...awaited, at: 'ready' };
  }

  async #ready({ hello, identifier, keys, expected }: Awaited): Promise<DestinationState> {
    const { talk } = this.parts;
    await talk.send('READY', { proof: keys.confirmation(talk.transcript.digest) });
    if (!expected) return { at: 'checked' };
    return { at: 'receiving', hello, identifier, keys, expected };
  }

  async #receive({ hello, identifier, keys, expected }: Extract<DestinationState, { at: 'receiving' }>) {
    const { talk } = this.parts;
    const bytes = await talk.receiveBytes('STATE', LIMITS_MS.state[hello.mode]);
    const { header, parts } = openBundle(keys, expectedState(hello, identifier), bytes);
    keys.wipe();
    try {
      checkLibtpms(header.libtpmsVersion, this.#libtpms);
      checkSuspension(hello.mode, header.referenceDigest.length > 0, parts);
    } catch (error) {
      wipe(...Object.values(parts));
      throw error;
    }
    return { at: 'deciding' as const, expected, state: { header, parts } };
  }

  async #decide({
    expected,
    state,
  }: Extract<DestinationState, { at: 'deciding' }>): Promise<DestinationState> {
    try {
      barrier('migrate.destination.commit');
      const signed = await this.parts.arrivals.commit(expected, state);
      barrier('migrate.destination.committed');
      this.parts.onCommitted();
      return { at: 'answering', signed };
    } finally {
      wipe(...Object.values(state.parts));
    }
  }

  async #answer(signed: SignedDecision): Promise<DestinationState> {
    await within(this.parts.talk.send('DECISION', signed), LIMITS_MS.settling, 'the source');
    return { at: 'settling' };
  }

  async #settle(): Promise<DestinationState> {
    const { talk, arrivals } = this.parts;
    const { value } = await talk.receive('SETTLED', LIMITS_MS.settling);
    const migrationId = this.#hello?.migrationId ?? new Uint8Array(0);
    if (bytesEqual(value.migrationId, migrationId)) {
      talk.channel.close();
      // The worker's first save here comes now, and a guest waits for it.
      await delay(SETTLE_DELAY_MS, undefined, { ref: false, signal: this.#over.signal });
      barrier('migrate.destination.settle');
      await arrivals.settled(migrationId, talk.peer.hostId);
      barrier('migrate.destination.settled');
    }
    return { at: 'committed' };
  }

  /** Ends with the line: what nobody hears needs not be waited for. */
  async #whileWanted<T>(work: Promise<T>, limitMs: number, whose: string): Promise<T> {
    const gone = this.parts.talk.channel.closed.then((reason) => {
      throw reason;
    });
    gone.catch(() => undefined);
    return await within(Promise.race([work, gone]), limitMs, whose);
  }
}

function isEnd(state: DestinationState): state is DestinationEnd {
  return DESTINATION[state.at].next.length === 0;
}

/** For the worker that waits: whatever it was, there is nothing to wait for. */
function notComing({ code, message }: ManagerError): ManagerError {
  return new ManagerError('migration-aborted', `the vTPM does not come here (${code}): ${message}`);
}
