import { randomBytes } from 'node:crypto';
import { barrier, type Logger } from 'vtpm-common';
import {
  boxKeyPair,
  bytesEqual,
  type MigrateOrder,
  type MigrationHello,
  type MigrationOffer,
  type Peer,
  type SignedDecision,
  uuidToText,
} from 'vtpm-proto';
import type { AuditActor } from '../audit/index.js';
import { ManagerError } from '../error.js';
import { wipe } from '../keys/index.js';
import type { DepartureFacts, Destination, PendingDeparture } from '../ownership/departure.js';
import type { MadeChallenge } from '../peer/attestation-key.js';
import { checkRight } from '../trust/peers.js';
import { BUNDLE_FORMAT, MAX_STATE_BYTES, sealBundle } from './bundle.js';
import { throwIfCancelled, unlessCancelled } from './cancellation.js';
import { LEAST_VERSION, MOST_VERSION, OWN_RECORD_FORMAT } from './compatibility.js';
import { LIMITS_MS } from './limits.js';
import { SOURCE, type SourceAt } from './machine.js';
import { checkOffer } from './offer.js';
import { type Orderer, OrderProgress } from './order-progress.js';
import type { Attestor, Departures, Host } from './ports.js';
import type { Resolver } from './resolve.js';
import { StateKeys, sharedSecret } from './state-key.js';
import { Talk } from './talk.js';
import { within } from './within.js';

export interface SourceParts {
  readonly order: MigrateOrder;
  readonly orderer: Orderer;
  readonly host: Host;
  readonly departures: Departures;
  readonly attestor: Attestor;
  readonly resolver: Resolver;
  readonly log: Logger;
}

interface Greeted {
  readonly talk: Talk;
  /** Over HELLO. */
  readonly greeted: Buffer;
  readonly offer: MigrationOffer;
}

interface Keyed {
  readonly talk: Talk;
  readonly keys: StateKeys;
  readonly identifier: Uint8Array;
}

interface Frozen extends Keyed {
  readonly auditTail: readonly string[];
}

type SourceState =
  | { readonly at: 'connecting' }
  | { readonly at: 'greeting'; readonly talk: Talk }
  | ({ readonly at: 'attesting' } & Greeted)
  | ({ readonly at: 'preparing' } & Keyed)
  | ({ readonly at: 'prepared' } & Keyed)
  | ({ readonly at: 'freezing' } & Frozen)
  | ({ readonly at: 'departing' } & Frozen)
  | {
      readonly at: 'sending';
      readonly talk: Talk;
      readonly pending: PendingDeparture;
      readonly state: Buffer;
    }
  | { readonly at: 'deciding'; readonly talk: Talk; readonly pending: PendingDeparture }
  | {
      readonly at: 'committing';
      readonly talk: Talk;
      readonly pending: PendingDeparture;
      readonly signed: SignedDecision;
    }
  | { readonly at: 'thawing'; readonly reason: ManagerError }
  | { readonly at: 'asking'; readonly reason: ManagerError }
  | SourceEnd;

export type SourceEnd =
  | { readonly at: 'checked' | 'committed' }
  | { readonly at: 'aborted' | 'in-doubt'; readonly reason: ManagerError };

/**
 * The source of one migration. docs/migration.md has the states; the table in machine.ts says for each what it leads to,
 * also where it fails, and this class goes by that table.
 */
export class SourceMigration {
  /** Unix milliseconds, for people; `since`: when it came to the state that it is in. */
  readonly begunAt = Date.now();
  since = this.begunAt;
  #state: SourceState = { at: 'connecting' };
  readonly #session = boxKeyPair();
  #challenge: MadeChallenge | undefined;
  readonly #progress: OrderProgress;
  #talk: Talk | undefined;
  #keys: StateKeys | undefined;
  /** Settled when the state is sent, or is not sent any more. */
  #sending: Promise<unknown> | undefined;

  constructor(
    private readonly parts: SourceParts,
    /** Checked before. */
    private readonly facts: DepartureFacts,
  ) {
    this.#progress = new OrderProgress(parts.orderer);
  }

  get at(): SourceAt {
    return this.#state.at;
  }

  get order(): MigrateOrder {
    return this.parts.order;
  }

  /** Never rejects: what goes wrong is in the end. */
  async run(): Promise<SourceEnd> {
    this.#progress.tell(this.#state);
    for (;;) {
      const state = this.#state;
      if (isEnd(state)) {
        await this.#close(state);
        return state;
      }
      this.#enter(
        await this.#step(state).catch((error: unknown) => this.#failed(state, ManagerError.from(error))),
      );
    }
  }

  /** Closes its line. Nothing is being sent on it when this resolves. */
  async hangUp(): Promise<void> {
    this.#talk?.channel.close();
    await this.#sending;
  }

  #enter(next: SourceState): void {
    this.#state = next;
    this.since = Date.now();
    if (isEnd(next)) this.#progress.goesOn();
    this.#progress.tell(next);
  }

  /** The state that the table has for a failure in `state`. */
  #failed(state: SourceState, reason: ManagerError): SourceState {
    const to = SOURCE[state.at].onFailure;
    const first = 'reason' in state ? state.reason : reason;
    if (to === 'thawing' || to === 'asking' || to === 'in-doubt') return { at: to, reason: first };
    return { at: 'aborted', reason: first };
  }

  async #close(state: SourceEnd): Promise<void> {
    this.#keys?.wipe();
    wipe(this.#session.secretKey, this.#challenge?.answer);
    this.parts.departures.renounce(uuidToText(this.order.vtpmUuid));
    if (!this.#talk) return;
    if (state.at === 'aborted') await this.#talk.refuse(state.reason);
    else this.#talk.channel.close();
  }

  #step(state: Exclude<SourceState, SourceEnd>): Promise<SourceState> {
    switch (state.at) {
      case 'connecting':
        return this.#connect();
      case 'greeting':
        return this.#greet(state.talk);
      case 'attesting':
        return this.#attest(state);
      case 'preparing':
        return this.#prepare(state);
      case 'prepared':
        return this.#awaitTurn(state);
      case 'freezing':
        return this.#freeze(state);
      case 'departing':
        return this.#depart(state);
      case 'sending':
        return this.#send(state);
      case 'deciding':
        return this.#decide(state);
      case 'committing':
        return this.#commit(state);
      case 'thawing':
        return this.#thaw(state.reason);
      case 'asking':
        return this.#ask(state.reason);
    }
  }

  async #connect(): Promise<SourceState> {
    const { host, order } = this.parts;
    const peer = host.peer(order.destination);
    checkRight(peer, 'receive');
    const channel = await this.#unlessCancelled(host.dial(peer), LIMITS_MS.connecting, 'the line', (late) =>
      late.close(),
    );
    this.#talk = new Talk(channel, 'source');
    this.#progress.check('peer', `${peer.name}, over mutual TLS 1.3`);
    return { at: 'greeting', talk: this.#talk };
  }

  async #greet(talk: Talk): Promise<SourceState> {
    const { attestor } = this.parts;
    const challenge = attestor.challenge(talk.peer);
    this.#challenge = challenge;
    await talk.send('HELLO', this.#hello(challenge));
    const greeted = talk.transcript.digest;
    const { value: offer, accept } = await this.#receive(talk, 'OFFER', LIMITS_MS.attesting);
    checkOffer(offer, this.facts.libtpmsVersion);
    accept();
    this.#progress.check('libtpms', `${this.facts.libtpmsVersion} here, ${offer.libtpmsVersion} there`);
    return { at: 'attesting', talk, greeted, offer };
  }

  #hello(challenge: MadeChallenge | undefined): MigrationHello {
    const { order, host } = this.parts;
    return {
      leastVersion: LEAST_VERSION,
      mostVersion: MOST_VERSION,
      migrationId: order.migrationId,
      nonce: randomBytes(32),
      sessionKey: this.#session.publicKey,
      source: host.hostId,
      destination: order.destination,
      vtpmUuid: order.vtpmUuid,
      vmUuid: order.vmUuid,
      epoch: this.facts.epoch,
      generation: this.facts.generation,
      mode: order.mode,
      recordFormat: OWN_RECORD_FORMAT,
      libtpmsVersion: this.facts.libtpmsVersion,
      stateBytes: BigInt(MAX_STATE_BYTES),
      ...(challenge && { challenge: challenge.challenge }),
      description: order.description,
      dryRun: order.dryRun,
      vmRunId: this.facts.vmRunId,
    };
  }

  async #attest({ talk, greeted, offer }: Greeted): Promise<SourceState> {
    const { attestor } = this.parts;
    const { peer } = talk;
    const offered = talk.transcript.digest;
    const { value: evidence, accept } = await this.#receive(talk, 'EVIDENCE', LIMITS_MS.attesting);
    if (this.#challenge) await attestor.prove(peer, this.#challenge, offer.challengeAnswer);
    const facts = attestor.verify(peer, evidence, offered);
    if (!offer.importKey) throw new ManagerError('bad-request', `host ${peer.name} offers no import key`);
    const { point, secret } = attestor.wrap(peer, offer.importKey, greeted, facts);
    let shared: Buffer | undefined;
    try {
      accept();
      this.#progress.check('platform', `${peer.name}: ${facts.approvedBy}`);
      const answer = offer.challenge ? await attestor.answer(offer.challenge) : new Uint8Array(0);
      const own = await this.#unlessCancelled(
        attestor.evidence(talk.transcript.digest),
        LIMITS_MS.attesting,
        "this host's TPM",
      );
      await talk.send('EVIDENCE', { ...own, challengeAnswer: answer });
      await talk.send('SECRET', { point });
      shared = sharedSecret(this.#session, offer.sessionKey);
      this.#keys = new StateKeys(secret, shared, talk.transcript.digest);
      return { at: 'preparing', talk, keys: this.#keys, identifier: offer.identifier };
    } finally {
      wipe(secret, shared, this.#session.secretKey);
    }
  }

  async #prepare({ talk, keys, identifier }: Keyed): Promise<SourceState> {
    const { order } = this.parts;
    const agreed = talk.transcript.digest;
    const { value, accept } = await this.#receive(talk, 'READY', LIMITS_MS.ready);
    if (!keys.confirms(value.proof, agreed)) {
      throw new ManagerError(
        'peer-import-key',
        `host ${talk.peer.name} has not unwrapped the secret that it was sent; migrate again`,
      );
    }
    accept();
    this.#progress.check('ready', 'the secret is unwrapped, the toolstack there agrees, and there is room');
    if (order.dryRun) return { at: 'checked' };
    return { at: 'prepared', talk, keys, identifier };
  }

  async #awaitTurn(keyed: Keyed): Promise<SourceState> {
    const { departures, host, order } = this.parts;
    const id = uuidToText(order.vtpmUuid);
    const auditTail = await host.auditTail(id);
    await departures.announce(id, this.#destination(), this.#actor());
    if (order.mode === 'VMM') await this.#awaitVmm(keyed.talk, id);
    return { ...keyed, auditTail, at: 'freezing' };
  }

  /** Nothing has stopped yet. Where the destination gives it up, or is gone, its VMM would take the TPM out for nobody. */
  async #awaitVmm({ channel }: Talk, id: string): Promise<void> {
    const { departures, orderer } = this.parts;
    const over = new AbortController();
    const gone = channel.closed.then((reason) => {
      throw reason;
    });
    const taken = departures.awaitSuspend(id, AbortSignal.any([orderer.cancelled, over.signal]));
    try {
      await this.#unlessCancelled(Promise.race([taken, gone]), LIMITS_MS.state.VMM, 'the VMM');
    } finally {
      over.abort();
    }
  }

  async #freeze(frozen: Frozen): Promise<SourceState> {
    const { departures, order } = this.parts;
    throwIfCancelled(this.parts.orderer.cancelled);
    this.#progress.frozen();
    if (order.mode !== 'OFFLINE') {
      barrier('migrate.source.freeze');
      const suspended = departures.suspend(uuidToText(order.vtpmUuid));
      await this.#unlessCancelled(suspended, LIMITS_MS.freezing, 'the worker');
      barrier('migrate.source.frozen');
    }
    return { ...frozen, at: 'departing' };
  }

  /** The worker ends while the chip counts; nothing leaves before both are done. */
  async #depart({ talk, keys, identifier, auditTail }: Frozen): Promise<SourceState> {
    const { departures, order, orderer } = this.parts;
    const id = uuidToText(order.vtpmUuid);
    const { migrationId, destination, mode } = order;
    barrier('migrate.source.depart');
    const written = departures.depart(id, this.#destination(), this.#actor());
    const reaped = this.#unlessCancelled(
      orderer.reaped,
      LIMITS_MS.reaping,
      'the toolstack, which ends the worker,',
    );
    const [departed, ended] = await Promise.allSettled([
      written.then((departing) => {
        barrier('migrate.source.departed');
        return departing;
      }),
      reaped.then(() => barrier('migrate.source.reaped')),
    ]);
    if (departed.status === 'rejected') {
      const reason = ManagerError.from(departed.reason);
      // The store says that it did not come about: the worker is frozen still, and can go on.
      if (!(await this.#pending())) return { at: 'thawing', reason };
      throw reason;
    }
    const { header, parts } = departed.value;
    try {
      if (ended.status === 'rejected') throw ended.reason;
      const { epoch, generation } = header;
      const departure = { migrationId, destination, mode, at: 0n, epoch, generation };
      const pending = { vtpmUuid: id, epoch, generation, departure };
      const names = { format: BUNDLE_FORMAT, migrationId, identifier, vtpmUuid: order.vtpmUuid };
      const state = sealBundle(keys, { ...header, ...names, auditTail: [...auditTail] }, parts);
      this.#progress.bytes(0, state.length);
      return { at: 'sending', talk, pending, state };
    } finally {
      wipe(...Object.values(parts));
      keys.wipe();
    }
  }

  async #send({ talk, pending, state }: Extract<SourceState, { at: 'sending' }>): Promise<SourceState> {
    throwIfCancelled(this.parts.orderer.cancelled);
    const sent = talk.sendBytes('STATE', state);
    this.#sending = sent.catch(() => undefined);
    await within(sent, LIMITS_MS.deciding.LIVE, `host ${talk.peer.name}`);
    this.#progress.bytes(state.length, state.length);
    return { at: 'deciding', talk, pending };
  }

  async #decide({ talk, pending }: Extract<SourceState, { at: 'deciding' }>): Promise<SourceState> {
    const limit = LIMITS_MS.deciding[this.parts.order.mode];
    const decided = talk.receive('DECISION', limit);
    const { value: signed } = await this.#unlessCancelled(decided, limit + 1000, `host ${talk.peer.name}`);
    return { at: 'committing', talk, pending, signed };
  }

  async #commit({ talk, pending, signed }: Extract<SourceState, { at: 'committing' }>): Promise<SourceState> {
    // It goes on there already.
    this.#progress.goesOn();
    const verdict = await this.parts.resolver.apply(pending, signed);
    const { migrationId, vtpmUuid } = this.parts.order;
    await talk.send('SETTLED', { migrationId, vtpmUuid }).catch(() => undefined);
    return verdict === 'COMMIT' ? { at: 'committed' } : { at: 'aborted', reason: abortedThere(talk.peer) };
  }

  async #thaw(reason: ManagerError): Promise<SourceState> {
    barrier('migrate.source.thaw');
    if (this.parts.order.mode !== 'OFFLINE')
      await this.parts.departures.thawWorker(uuidToText(this.order.vtpmUuid));
    barrier('migrate.source.thawed');
    return { at: 'aborted', reason };
  }

  /** The destination ends its session for it, if it has one: what it says then is for ever. */
  async #ask(reason: ManagerError): Promise<SourceState> {
    const pending = await this.#pending();
    void this.#talk?.refuse(reason);
    const { resolver, order } = this.parts;
    const verdict = pending
      ? await within(resolver.ask(pending), LIMITS_MS.asking, 'the destination')
      : // Decided meanwhile: an operator had it asked.
        resolver.verdictOf(order.migrationId);
    if (!verdict) return { at: 'in-doubt', reason };
    return verdict === 'COMMIT' ? { at: 'committed' } : { at: 'aborted', reason };
  }

  #destination(): Destination {
    const { migrationId, destination, mode } = this.parts.order;
    return { migrationId, destination, mode, at: BigInt(Date.now()) };
  }

  #actor(): AuditActor {
    return { toolstackKey: Buffer.from(this.order.toolstackKey).toString('hex') };
  }

  async #pending(): Promise<PendingDeparture | undefined> {
    const { migrationId } = this.parts.order;
    const all = await this.parts.departures.pending();
    return all.find(({ departure }) => bytesEqual(departure.migrationId, migrationId));
  }

  #receive<T extends 'OFFER' | 'EVIDENCE' | 'READY'>(talk: Talk, type: T, limitMs: number) {
    return this.#unlessCancelled(talk.receive(type, limitMs), limitMs + 1000, `host ${talk.peer.name}`);
  }

  #unlessCancelled<T>(
    work: Promise<T>,
    limitMs: number,
    whose: string,
    onLate?: (late: T) => void,
  ): Promise<T> {
    return unlessCancelled(this.parts.orderer.cancelled, work, limitMs, whose, onLate);
  }
}

function isEnd(state: SourceState): state is SourceEnd {
  return SOURCE[state.at].next.length === 0;
}

function abortedThere({ name }: Peer): ManagerError {
  return new ManagerError('migration-aborted', `host ${name} has decided against it; the vTPM stays here`);
}
