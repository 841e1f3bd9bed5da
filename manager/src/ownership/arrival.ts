import { barrier } from 'vtpm-common';
import {
  bytesEqual,
  type MigrationDecision,
  type MigrationHello,
  type Peer,
  type RecordHeader,
  type SignedDecision,
  uuidToBytes,
  uuidToText,
} from 'vtpm-proto';
import { ManagerError } from '../error.js';
import {
  type ArrivalNames,
  arrive,
  checkTravelling,
  settled,
  type TravellingState,
  type VtpmRecord,
} from '../records/index.js';
import { AbortPromises } from './abort-promises.js';
import { acceptedAt } from './acceptance.js';
import { asked, checkIsExpected, checkNotSince, checkWelcome, isGivenUpTo } from './arrival-check.js';
import type { UnsettledArrival } from './census.js';
import { signDecision } from './decisions.js';
import type { Desk } from './desk.js';
import { sealGrant } from './load-grant.js';
import { Place, type WaitingLoad } from './place.js';
import { loadFactsOf } from './ticket-check.js';

/** vTPMs that are expected at the same time: each may hold a Load, and the state once it is here. */
const MAX_PLACES = 64;
const MAX_PLACES_PER_PEER = 32;

/** A vTPM whose place is held until its state is here. */
export type Expected = Pick<Place, 'migrationId' | 'vtpmUuid' | 'loadWaiting' | 'release'>;

/** What a source asks about. */
export type InquiryFacts = Pick<
  MigrationDecision,
  'migrationId' | 'source' | 'vtpmUuid' | 'epoch' | 'generation'
>;

/**
 * How vTPMs come, and what this host decided of it. A COMMIT is the record of the vTPM itself, so that there is nothing that
 * could be half done; an ABORT was promised before anything began.
 */
export class Arrivals {
  readonly #places = new Map<string, Place>();
  readonly #promises: AbortPromises;

  constructor(private readonly desk: Desk) {
    this.#promises = new AbortPromises(desk);
  }

  /** Where Loads of a vTPM wait for it to come. */
  placeOf(vtpmUuid: string): Place | undefined {
    return this.#places.get(vtpmUuid);
  }

  /**
   * Whether there is a place for it; changes nothing.
   * @throws ManagerError `busy`, `retired`, `migrating`, `migration-refused`, `rollback-detected`, `wrong-vm`, `store-full`
   */
  async check(hello: MigrationHello, peer: Pick<Peer, 'hostId'>): Promise<void> {
    this.desk.checkOpen();
    const vtpmUuid = uuidToText(hello.vtpmUuid);
    const ofPeer = [...this.#places.values()].filter(({ source }) => bytesEqual(source, peer.hostId));
    if (this.#places.has(vtpmUuid)) {
      throw new ManagerError('busy', `vTPM ${vtpmUuid} is expected here already; end that migration first`);
    }
    if (this.#places.size >= MAX_PLACES || ofPeer.length >= MAX_PLACES_PER_PEER) {
      throw new ManagerError(
        'busy',
        `${this.#places.size} vTPMs are expected here; try again when they have come`,
      );
    }
    const held = await this.desk.records.read(vtpmUuid);
    if (!held) this.desk.checkRoom();
    checkWelcome(vtpmUuid, held?.record.header, hello);
  }

  /**
   * Holds its place: Loads with a ticket for it wait. When it resolves, it is an ABORT unless it is committed, whatever
   * happens.
   * @throws ManagerError as `check`; `migration-aborted` where that migration was begun before
   */
  async expect(hello: MigrationHello, peer: Pick<Peer, 'hostId'>): Promise<Expected> {
    await this.check(hello, peer);
    const vtpmUuid = uuidToText(hello.vtpmUuid);
    const { migrationId } = hello;
    const place = new Place(hello, peer.hostId, () => {
      if (this.#places.get(vtpmUuid) === place) this.#places.delete(vtpmUuid);
    });
    if (this.#places.has(vtpmUuid))
      throw new ManagerError('busy', `vTPM ${vtpmUuid} is expected here already`);
    this.#places.set(vtpmUuid, place);
    try {
      if (await this.#promises.has(peer.hostId, migrationId)) {
        throw new ManagerError(
          'migration-aborted',
          'this migration was begun before and came to nothing; order it anew',
        );
      }
      barrier('migrate.expect.begun');
      await this.#promise(peer.hostId, migrationId);
      barrier('migrate.expect.written');
      place.checkHeld();
      return place;
    } catch (error) {
      place.release(ManagerError.from(error));
      throw error;
    }
  }

  /** Writes into the log what is about to be decided, while the vTPM runs on at its source: `commit` needs not wait for it then. */
  async announce({ vtpmUuid }: Pick<Expected, 'vtpmUuid'>): Promise<void> {
    const place = this.#places.get(vtpmUuid);
    if (!place) return;
    const { hello } = place;
    await this.desk.audit('manager', 'migrate-commit', 'intended', hello, factsOf(place));
    place.isAnnounced = true;
  }

  /**
   * THE decision: the record, with the session of the Load that waits in it, in one write that the TPM counts before it
   * resolves. In mode VMM it waits for the Load that brings the reference.
   * @throws ManagerError `migration-aborted` where it was given up or aborted before, or the worker that waited is gone;
   * `incomplete`, `too-large`, `bad-request`, `wrong-vm` for what cannot be taken over; `store-full`. Nothing is decided
   * then, and the place is given up: an abort works
   */
  async commit(expected: Expected, state: TravellingState): Promise<SignedDecision> {
    const place = this.#places.get(expected.vtpmUuid);
    if (!place || place !== expected) {
      throw new ManagerError('migration-aborted', `vTPM ${expected.vtpmUuid} is not expected here any more`);
    }
    try {
      const { migrationId, source } = place;
      const names: ArrivalNames = { vtpmUuid: uuidToBytes(place.vtpmUuid), migrationId, source };
      checkTravelling(names, state);
      checkIsExpected(place, state);
      const load = await this.#loadFor(place, state);
      return await this.desk.visit(place.vtpmUuid, (slot) =>
        slot.exclusively('migrate-in', () => this.#commitInto(place, names, state, load)),
      );
    } catch (error) {
      const reason = ManagerError.from(error);
      place.release(reason);
      throw reason;
    }
  }

  /**
   * Ends what is under way of it, for good.
   * @returns ABORT as the source asks for it, after it is durable and counted; or the COMMIT where that was decided before
   * @throws ManagerError `unknown-migration` where another host asks; `in-doubt` where the source asks with an old disk: the
   * vTPM has lived here since; or where this host has an old store, in which a COMMIT may be missing
   */
  async abort(facts: InquiryFacts): Promise<SignedDecision> {
    this.desk.checkOpen();
    const { migrationId, source } = facts;
    const vtpmUuid = uuidToText(facts.vtpmUuid);
    return await this.desk.visit(vtpmUuid, (slot) =>
      slot.inOrder(async () => {
        const held = await this.desk.records.read(vtpmUuid);
        const committed = held && this.#commitIn(held.record, migrationId);
        if (committed) return this.#sign('COMMIT', asked(committed, source));
        const place = this.#places.get(vtpmUuid);
        if (place?.isOf(migrationId)) {
          asked(place, source);
          place.release(new ManagerError('migration-aborted', 'its source has asked for an ABORT'));
        }
        checkNotSince(vtpmUuid, held?.record.header, facts.epoch);
        await this.#checkKnown(facts);
        await this.#promise(source, migrationId);
        barrier('migrate.abort.written');
        const fact = { migration: hex(migrationId), from: hex(source) };
        await this.desk.audit('manager', 'migrate-abort', 'done', facts, fact);
        return this.#sign('ABORT', facts);
      }),
    );
  }

  /**
   * Its source has taken it back: what is under way of it comes to nothing. The ABORT was promised when it was expected.
   * @throws ManagerError `unknown-migration` where another host says so
   */
  async giveUp({ migrationId, source, vtpmUuid }: InquiryFacts): Promise<void> {
    const id = uuidToText(vtpmUuid);
    await this.desk.visit(id, (slot) =>
      slot.inOrder(async () => {
        const place = this.#places.get(id);
        if (!place?.isOf(migrationId)) return;
        asked(place, source);
        place.release(new ManagerError('migration-aborted', 'its source has taken it back'));
      }),
    );
  }

  /** The COMMIT of a migration that is not settled; undefined where there is none. */
  async decisionOf(migrationId: Uint8Array): Promise<SignedDecision | undefined> {
    const vtpmUuid = this.desk.census.committedBy(hex(migrationId));
    const held = vtpmUuid === undefined ? undefined : await this.desk.records.read(vtpmUuid);
    const facts = held && this.#commitIn(held.record, migrationId);
    return facts && this.#sign('COMMIT', facts);
  }

  /** The source's tombstone, or its thaw, is durable: it asks no more. @param source who says so */
  async settled(migrationId: Uint8Array, source: Uint8Array): Promise<void> {
    this.desk.checkOpen();
    // First: what was promised must never be heard again of what was committed.
    await this.#promises.forget(source, migrationId);
    barrier('migrate.settle.forgotten');
    const vtpmUuid = this.desk.census.committedBy(hex(migrationId));
    if (vtpmUuid === undefined) return;
    await this.desk.visit(vtpmUuid, (slot) =>
      slot.inOrder(async () => {
        const change = (record: VtpmRecord): VtpmRecord => settled(record, migrationId);
        const isOf = ({ header }: VtpmRecord): boolean =>
          header.unsettled.some(
            (arrival) => bytesEqual(arrival.migrationId, migrationId) && bytesEqual(arrival.source, source),
          );
        if (slot.live?.isOver === false) {
          if (isOf(slot.live.record)) await slot.live.rewrite(change);
        } else {
          const held = await this.desk.records.read(vtpmUuid);
          if (held && isOf(held.record)) await this.desk.records.write(vtpmUuid, held, change(held.record));
        }
        barrier('migrate.settle.written');
      }),
    );
  }

  /** Those whose source has to say that it is settled, from before a restart too. */
  unsettled(): UnsettledArrival[] {
    return this.desk.census.unsettled;
  }

  /** Puts what is promised under the current generation of the root key. */
  rekey(): Promise<void> {
    return this.#promises.rekey();
  }

  /** Nothing comes any more. */
  close(error: ManagerError): void {
    for (const place of [...this.#places.values()]) place.release(error);
  }

  async #loadFor(place: Place, { header }: TravellingState) {
    if (place.mode === 'OFFLINE') return undefined;
    const refusal = ({ checked }: WaitingLoad): ManagerError | undefined => {
      const { referenceDigest } = checked.claim;
      if (place.mode !== 'VMM') return undefined;
      if (referenceDigest && bytesEqual(referenceDigest, header.referenceDigest)) return undefined;
      return new ManagerError(
        'wrong-reference',
        `the VMM brings another TPM than vTPM ${place.vtpmUuid} as it was taken out; nothing was decided`,
      );
    };
    return await place.chosen(refusal, place.mode === 'VMM');
  }

  async #commitInto(
    place: Place,
    names: ArrivalNames,
    state: TravellingState,
    load: Awaited<ReturnType<Place['chosen']>> | undefined,
  ): Promise<SignedDecision> {
    this.desk.checkOpen();
    place.checkHeld();
    const { vtpmUuid } = place;
    const held = await this.desk.records.read(vtpmUuid);
    checkWelcome(vtpmUuid, held?.record.header, place.hello);
    const { keys } = this.desk;
    const record = arrive(keys, names, state, held?.record.header, load && loadFactsOf(load.checked));
    // Sealed before it is decided: what no worker can be given is not taken over.
    const response = load && sealGrant(keys, load.checked, record, false);
    const { header } = record;
    if (!place.isAnnounced) await this.announce(place);
    barrier('migrate.commit.audited');
    const loaded = await this.desk.records.write(vtpmUuid, held, record, 'now');
    barrier('migrate.commit.written');
    this.desk.noteDone('manager', 'migrate-commit', header, factsOf(place));
    this.desk.emit('arrived', header);
    if (load && response && header.session) {
      const { sessionId } = header.session;
      load.connection.session = { vtpmUuid: Buffer.from(header.vtpmUuid), sessionId, loaded };
      this.desk.emit('loaded', header);
      load.resolve(response);
    }
    place.release(new ManagerError('migrating', `vTPM ${vtpmUuid} has come; ask again`));
    const { epoch, generation } = state.header;
    return this.#sign('COMMIT', { ...names, epoch, generation });
  }

  /** What was committed here is in the store, unless that was taken for the newest and is not: promises go with that. */
  async #checkKnown({ source, migrationId }: InquiryFacts): Promise<void> {
    if (await this.#promises.has(source, migrationId)) return;
    const accepted = await acceptedAt(this.desk.store);
    if (!accepted) return;
    throw new ManagerError(
      'in-doubt',
      `an old store was accepted on this host on ${accepted.toISOString()}, and whether it had committed this migration ` +
        'before cannot be told: nobody says that the vTPM may go on at its source; see docs/migration.md, "An old disk"',
    );
  }

  #promise(source: Uint8Array, migrationId: Uint8Array): Promise<void> {
    const isUnderWay = (id: string): boolean =>
      [...this.#places.values()].some((place) => hex(place.migrationId) === id);
    return this.#promises.make(source, migrationId, isUnderWay);
  }

  /** What a record says of a migration that made it, for as long as its history knows of it. */
  #commitIn({ header }: VtpmRecord, migrationId: Uint8Array): InquiryFacts | undefined {
    const facts = this.#madeBy(header, migrationId);
    // A host that took it back and asks about the way here has an old disk: to hear COMMIT would end what it has.
    return facts && !isGivenUpTo(header, facts.source) ? facts : undefined;
  }

  #madeBy(header: RecordHeader, migrationId: Uint8Array): InquiryFacts | undefined {
    const { vtpmUuid, unsettled, lineage } = header;
    const arrival = unsettled.find((other) => bytesEqual(other.migrationId, migrationId));
    if (arrival) return { ...arrival, vtpmUuid };
    const at = lineage.findIndex((stay) => bytesEqual(stay.migrationId, migrationId));
    const stay = lineage[at];
    // Where it went from there: only that host has decided.
    const next = lineage[at + 1]?.host ?? this.desk.keys.hostKey.publicKey;
    if (!stay || !bytesEqual(next, this.desk.keys.hostKey.publicKey)) return undefined;
    const { host, lastEpoch, lastGeneration } = stay;
    return { migrationId, source: host, vtpmUuid, epoch: lastEpoch, generation: lastGeneration };
  }

  #sign(
    verdict: MigrationDecision['verdict'],
    { migrationId, source, vtpmUuid, epoch, generation }: InquiryFacts,
  ): SignedDecision {
    const { hostKey } = this.desk.keys;
    const destination = hostKey.publicKey;
    return signDecision(hostKey, { migrationId, verdict, source, destination, vtpmUuid, epoch, generation });
  }
}

function factsOf({ migrationId, source, mode }: Place): Record<string, string> {
  return { migration: hex(migrationId), from: hex(source), mode };
}

function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex');
}
