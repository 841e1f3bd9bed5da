import assert from 'node:assert/strict';
import { readdirSync, readFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { lineDigest } from 'vtpm-manager/audit/head';
import type { ManagerInstallation } from './manager-process.js';

/** Something that was asked of the manager. Unix milliseconds: not later than it was asked, not earlier than it was so. */
export class Claim {
  readonly askedAt = Date.now();
  /** When it was known to be done. */
  doneAt = NEVER;
  /** When the manager said so itself. */
  answeredAt = NEVER;

  answered(): void {
    this.answeredAt = Date.now() + 1;
    this.found();
  }

  /** It is so, although nobody was told. */
  found(): void {
    this.doneAt = Math.min(this.doneAt, Date.now() + 1);
  }
}

const NEVER = Number.POSITIVE_INFINITY;

interface SaveClaim {
  readonly generation: bigint;
  /** SHA-256 of the save as the worker sent it, hex. */
  readonly digest: string;
  /** SHA-256 of its permanent part, hex. */
  readonly content: string;
  readonly claim: Claim;
}

/** What the clients of one vTPM asked for, in order. */
export class VtpmHistory {
  readonly loads: { readonly epoch: bigint; readonly claim: Claim }[] = [];
  saves: SaveClaim[] = [];
  retirement: Claim | undefined;

  constructor(readonly id: string) {}

  get epoch(): bigint {
    return this.loads.at(-1)?.epoch ?? 0n;
  }

  get generation(): bigint {
    return this.saves.at(-1)?.generation ?? 0n;
  }
}

export interface ShownVtpm {
  readonly id: string;
  readonly kind: string;
  readonly generation: number;
  readonly epoch: number;
}

/** What the manager and its disk say. */
export interface Shown {
  readonly vtpms: readonly ShownVtpm[];
  readonly images: readonly string[];
  readonly audit: ShownAudit;
}

export interface ShownAudit {
  /** `action verdict subject` of each entry. */
  readonly events: ReadonlySet<string>;
  /** SHA-256 of each line, hex; entry n is at n - 1. */
  readonly digests: readonly string[];
}

/** Everything that was asked of a manager and what it answered, to be held against what is left after a crash. */
export class ManagerLedger {
  readonly vtpms = new Map<string, VtpmHistory>();
  readonly #images = new Map<string, { readonly isAllowed: boolean; readonly claim: Claim }[]>();
  readonly #events: { readonly event: string; readonly claim: Claim }[] = [];
  /** The save behind each generation that anybody was ever shown. */
  readonly #used = new Map<string, string>();
  readonly #granted = new Set<string>();
  #audit: readonly string[] = [];

  history(id: string): VtpmHistory {
    const known = this.vtpms.get(id) ?? new VtpmHistory(id);
    this.vtpms.set(id, known);
    return known;
  }

  load(history: VtpmHistory): Claim {
    const epoch = history.epoch + 1n;
    const claim = new Claim();
    history.loads.push({ epoch, claim });
    return this.#event(`load done ${history.id} ${epoch}`, claim);
  }

  /** An epoch was given to a worker. */
  granted(history: VtpmHistory, epoch: bigint): void {
    const name = `${history.id} ${epoch}`;
    assert.ok(!this.#granted.has(name), `epoch ${epoch} of ${history.id} was given twice`);
    this.#granted.add(name);
  }

  save(history: VtpmHistory, digest: string, content: string): SaveClaim {
    const save = { generation: history.generation + 1n, digest, content, claim: new Claim() };
    history.saves.push(save);
    return save;
  }

  saved(history: VtpmHistory, save: SaveClaim): void {
    save.claim.answered();
    this.#use(history, save);
  }

  retire(history: VtpmHistory): Claim {
    const claim = new Claim();
    history.retirement ??= claim;
    return this.#event(`retire done ${history.id}`, claim);
  }

  image(digest: string, isAllowed: boolean): Claim {
    const claim = new Claim();
    this.#images.set(digest, [...(this.#images.get(digest) ?? []), { isAllowed, claim }]);
    return this.#event(`image-${isAllowed ? 'allow' : 'remove'} done ${digest}`, claim);
  }

  rotation(): Claim {
    return new Claim();
  }

  rotated(claim: Claim, generation: number): void {
    claim.answered();
    this.#event(`platform-rotate done ${generation}`, claim);
  }

  /**
   * Everything answered before `at` is there, and nothing that was not asked for by then.
   * @param at Unix milliseconds
   */
  check(shown: Shown, at = Number.MAX_SAFE_INTEGER): void {
    const byId = new Map(shown.vtpms.map((vtpm) => [vtpm.id, vtpm]));
    for (const history of this.vtpms.values()) checkVtpm(history, byId.get(history.id), at);
    for (const { id } of shown.vtpms) assert.ok(this.vtpms.has(id), `${id} comes from nowhere`);
    for (const [digest, changes] of this.#images) {
      const asked = changes.filter(({ claim }) => claim.askedAt <= at);
      const isThere = shown.images.includes(digest);
      const sure = asked.findLastIndex(({ claim }) => claim.doneAt <= at);
      const possible = [
        asked[sure]?.isAllowed ?? false,
        ...asked.slice(sure + 1).map((one) => one.isAllowed),
      ];
      assert.ok(possible.includes(isThere), `image ${digest} is ${isThere ? '' : 'not '}allowed`);
    }
    for (const { event, claim } of this.#events) {
      if (claim.answeredAt <= at)
        assert.ok(shown.audit.events.has(event), `the audit log has lost: ${event}`);
    }
  }

  /** After a check of what goes on from here: what was asked and did not happen never will, and what happened stays. */
  settle(shown: Shown): void {
    for (const { id, generation, epoch, kind } of shown.vtpms) {
      const history = this.history(id);
      history.saves = history.saves.filter((save) => save.generation <= BigInt(generation));
      const newest = history.saves.at(-1);
      newest?.claim.found();
      if (newest) this.#use(history, newest);
      history.loads.splice(history.loads.findLastIndex((load) => load.epoch <= BigInt(epoch)) + 1);
      history.loads.at(-1)?.claim.found();
      if (kind === 'retired') history.retirement?.found();
      else history.retirement = undefined;
    }
    const ids = new Set(shown.vtpms.map(({ id }) => id));
    for (const history of this.vtpms.values()) {
      if (!ids.has(history.id)) history.loads.splice(0);
    }
    for (const [digest, changes] of this.#images) {
      const isAllowed = shown.images.includes(digest);
      const last = changes.findLast((change) => change.isAllowed === isAllowed) ?? changes[0];
      last?.claim.found();
      changes.splice(0, changes.length, ...(last ? [{ ...last, isAllowed }] : []));
    }
    this.#events.splice(
      0,
      this.#events.length,
      ...this.#events.filter(({ claim }) => claim.answeredAt !== NEVER),
    );
    const { digests } = shown.audit;
    assert.deepEqual(digests.slice(0, this.#audit.length), this.#audit, 'the audit log is another one');
    this.#audit = digests;
  }

  /** The save that a worker is shown as a vTPM's newest. */
  saveOf(history: VtpmHistory, generation: bigint): SaveClaim | undefined {
    return history.saves.findLast((save) => save.generation === generation);
  }

  #use(history: VtpmHistory, { generation, digest }: SaveClaim): void {
    const name = `${history.id} ${generation}`;
    const used = this.#used.get(name);
    assert.ok(
      used === undefined || used === digest,
      `generation ${generation} of ${history.id} was used twice`,
    );
    this.#used.set(name, digest);
  }

  #event(event: string, claim: Claim): Claim {
    this.#events.push({ event, claim });
    return claim;
  }
}

function checkVtpm(history: VtpmHistory, shown: ShownVtpm | undefined, at: number): void {
  const { id, loads, saves, retirement } = history;
  const last = <T extends { readonly claim: Claim }>(all: readonly T[], when: 'askedAt' | 'doneAt') =>
    all.findLast(({ claim }) => claim[when] <= at);
  const known = last(loads, 'doneAt');
  if (!shown) {
    assert.equal(known, undefined, `${id} is lost`);
    return;
  }
  const epoch = BigInt(shown.epoch);
  const generation = BigInt(shown.generation);
  const [leastEpoch, mostEpoch] = [known?.epoch ?? 1n, last(loads, 'askedAt')?.epoch ?? 0n];
  assert.ok(
    leastEpoch <= epoch && epoch <= mostEpoch,
    `${id} is at epoch ${epoch}, not ${leastEpoch}–${mostEpoch}`,
  );
  const [least, most] = [last(saves, 'doneAt')?.generation ?? 0n, last(saves, 'askedAt')?.generation ?? 0n];
  assert.ok(
    least <= generation && generation <= most,
    `${id} is at generation ${generation}; ${least} was acknowledged, ${most} asked for`,
  );
  if (shown.kind === 'retired') assert.ok(retirement && retirement.askedAt <= at, `${id} is retired`);
  else assert.ok(!retirement || retirement.doneAt > at, `${id} has come back`);
}

/** Asks a manager that serves for everything, and reads its audit log. */
export async function readManager(manager: ManagerInstallation): Promise<Shown> {
  const vtpms: ShownVtpm[] = [];
  for (let next: string | undefined = ''; next !== undefined; ) {
    const path = `/vtpms?limit=1000${next === '' ? '' : `&after=${next}`}`;
    const { status, body } = await manager.admin('GET', path);
    assert.equal(status, 200, JSON.stringify(body));
    vtpms.push(...(body.vtpms as ShownVtpm[]));
    next = body.next as string | undefined;
  }
  const { body } = await manager.admin('GET', '/images');
  const images = (body.images as { digest: string }[]).map(({ digest }) => digest);
  return { vtpms, images, audit: readAudit(manager.paths.audit) };
}

/** Reads the files as they are, and follows the chain from the first entry on. */
export function readAudit(path: string): ShownAudit {
  const directory = dirname(path);
  const stem = basename(path, '.log');
  const closed = readdirSync(directory).filter((name) => /^\.\d+\.log$/.test(name.slice(stem.length)));
  const digests: string[] = [];
  const events = new Set<string>();
  for (const name of [...closed.sort(), basename(path)]) {
    const text = readFileSync(join(directory, name), 'latin1');
    // What follows the last newline is being written.
    for (const line of text.split('\n').slice(0, -1)) {
      const entry = JSON.parse(line) as Record<string, unknown> & { facts?: Record<string, string> };
      assert.equal(entry.n, digests.length + 1, `${name}: entry ${digests.length + 1}`);
      assert.equal(entry.prev, digests.at(-1) ?? '0'.repeat(64), `${name}: the entry before ${entry.n}`);
      digests.push(lineDigest(Buffer.from(line, 'latin1')).toString('hex'));
      const { action, verdict, vtpm, epoch, facts } = entry;
      const subject =
        action === 'load' ? `${vtpm} ${epoch}` : (vtpm ?? facts?.digest ?? facts?.generation ?? '');
      events.add(`${action} ${verdict} ${subject}`);
    }
  }
  return { events, digests };
}
