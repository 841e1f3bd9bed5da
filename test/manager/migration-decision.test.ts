import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  checkFormats,
  checkLibtpms,
  commonVersion,
  installedLibtpms,
} from 'vtpm-manager/migration/compatibility';
import { checkDecision, type DecisionNames } from 'vtpm-manager/migration/decision';
import { DESTINATION, MIGRATION_BARRIERS, SOURCE } from 'vtpm-manager/migration/machine';
import { OrderCheck } from 'vtpm-manager/migration/order-check';
import { signDecision } from 'vtpm-manager/ownership/decisions';
import { boxKeyPair, type MigrateOrder, signingKeyFromSeed, signMigrateOrder } from 'vtpm-proto';
import { refused } from './ownership-fixture.js';

describe('a decision about a migration', () => {
  const hostKey = signingKeyFromSeed(randomBytes(32));
  const names: DecisionNames = {
    migrationId: randomBytes(16),
    source: randomBytes(32),
    destination: hostKey.publicKey,
    vtpmUuid: randomBytes(16),
    epoch: 4n,
    generation: 9n,
  };

  it('is taken from the destination alone, for the very migration, vTPM, epoch and generation', () => {
    assert.equal(
      checkDecision(signDecision(hostKey, { ...names, verdict: 'ABORT' }), names).verdict,
      'ABORT',
    );
    assert.equal(
      checkDecision(signDecision(hostKey, { ...names, verdict: 'COMMIT' }), names).verdict,
      'COMMIT',
    );
    const other = signingKeyFromSeed(randomBytes(32));
    const forgeries = [
      signDecision(other, { ...names, verdict: 'ABORT' }),
      signDecision(hostKey, { ...names, verdict: 'ABORT', migrationId: randomBytes(16) }),
      signDecision(hostKey, { ...names, verdict: 'ABORT', source: randomBytes(32) }),
      signDecision(hostKey, { ...names, verdict: 'ABORT', destination: other.publicKey }),
      signDecision(hostKey, { ...names, verdict: 'ABORT', vtpmUuid: randomBytes(16) }),
      signDecision(hostKey, { ...names, verdict: 'ABORT', epoch: 3n }),
      signDecision(hostKey, { ...names, verdict: 'ABORT', generation: 10n }),
      { ...signDecision(hostKey, { ...names, verdict: 'ABORT' }), signature: Buffer.alloc(64) },
    ];
    for (const forged of forgeries)
      assert.throws(() => checkDecision(forged, names), refused('decision-forged'));
  });
});

describe('what both hosts must have in common', () => {
  it('is a libtpms at the destination that is not older than what wrote the state: incompatible', () => {
    for (const [state, destination] of [
      ['0.9.2', '0.9.2'],
      ['0.9.2', '0.10.0'],
      ['0.9.10', '1.0.0'],
      ['0.9.9', '0.9.10'],
    ] as const) {
      checkLibtpms(state, destination);
    }
    for (const [state, destination] of [
      ['0.9.3', '0.9.2'],
      ['0.10.0', '0.9.2'],
      ['1.0.0', '0.99.99'],
      ['0.9.10', '0.9.9'],
      ['', '0.9.2'],
      ['0.9.2', ''],
      ['0.9.2', '0.9'],
      ['0.9.2', '0.9.2-rc1'],
    ] as const) {
      assert.throws(
        () => checkLibtpms(state, destination),
        refused('incompatible'),
        `${state} ${destination}`,
      );
    }
  });

  it('is a version of the protocol and a format of records: incompatible', () => {
    assert.equal(commonVersion({ least: 1, most: 9 }), 1);
    assert.throws(() => commonVersion({ least: 2, most: 9 }), refused('incompatible'));
    assert.throws(() => commonVersion({ least: 0, most: 0 }), refused('incompatible'));
    checkFormats(1, 2);
    assert.throws(() => checkFormats(3, 2), refused('incompatible'));
  });

  it('is known of this host by the names of its libraries', () => {
    const directory = mkdtempSync(join(tmpdir(), 'vtpm-lib-'));
    for (const name of [
      'libtpms.so.0',
      'libtpms.so.0.9.2',
      'libtpms.so.0.10.0',
      'libtpms.so.0.9.9',
      'libother.so.7.0.0',
    ]) {
      writeFileSync(join(directory, name), '');
    }
    assert.equal(installedLibtpms([join(directory, 'none'), directory]), '0.10.0');
    rmSync(directory, { recursive: true });
    assert.equal(installedLibtpms([directory]), '');
    assert.match(installedLibtpms(), /^\d+\.\d+\.\d+$/);
  });
});

describe('an order to migrate', () => {
  const key = signingKeyFromSeed(randomBytes(32));
  const identity = boxKeyPair();
  const boot = randomBytes(16);
  let now = 1_000_000n;
  const made = (changes: Partial<MigrateOrder> = {}): MigrateOrder => ({
    format: 1,
    managerId: identity.publicKey,
    toolstackKey: key.publicKey,
    vtpmUuid: randomBytes(16),
    vmUuid: randomBytes(16),
    destination: randomBytes(32),
    expectedEpoch: 1n,
    leastGeneration: 1n,
    migrationId: randomBytes(16),
    bootId: boot,
    expiresAtMonotonicMs: now + 60_000n,
    mode: 'LIVE',
    dryRun: false,
    description: Buffer.from('{}'),
    ...changes,
  });
  const check = () =>
    new OrderCheck({
      identity,
      trust: { isToolstackKeyTrusted: (publicKey) => Buffer.from(publicKey).equals(key.publicKey) },
      bootId: () => boot,
      monotonicMs: () => now,
    });

  it('is taken once, and remembered for as long as its time would let it pass', () => {
    const orders = check();
    const signed = signMigrateOrder(key, made());
    orders.check(signed);
    assert.throws(() => orders.check(signed), refused('ticket-expired'));
    orders.check(signMigrateOrder(key, made()));
    now += 119_000n;
    assert.throws(
      () => orders.check(signed),
      (error) => /used already/.test((error as Error).message),
    );
    now += 2_000n;
    assert.throws(
      () => orders.check(signed),
      (error) => /has expired/.test((error as Error).message),
    );
  });

  const refusals: [string, Parameters<typeof refused>[0], () => Parameters<OrderCheck['check']>[0]][] = [
    [
      'signed by another key than it names',
      'ticket-forged',
      () => signMigrateOrder(signingKeyFromSeed(randomBytes(32)), made()),
    ],
    [
      'of a toolstack that is not trusted',
      'unknown-toolstack-key',
      () => {
        const other = signingKeyFromSeed(randomBytes(32));
        return signMigrateOrder(other, made({ toolstackKey: other.publicKey }));
      },
    ],
    [
      'for another manager',
      'wrong-manager',
      () => signMigrateOrder(key, made({ managerId: randomBytes(32) })),
    ],
    ['of another boot', 'ticket-expired', () => signMigrateOrder(key, made({ bootId: randomBytes(16) }))],
    [
      'past its time',
      'ticket-expired',
      () => signMigrateOrder(key, made({ expiresAtMonotonicMs: now - 61_000n })),
    ],
    [
      'good for days',
      'bad-request',
      () => signMigrateOrder(key, made({ expiresAtMonotonicMs: now + 86_400_000n })),
    ],
    ['of a newer format', 'newer-format', () => signMigrateOrder(key, made({ format: 2 }))],
    [
      'with a book for a description',
      'too-large',
      () => signMigrateOrder(key, made({ description: randomBytes(20_000) })),
    ],
    ['that is none', 'bad-request', () => ({ order: randomBytes(40), signature: randomBytes(64) })],
  ];
  for (const [what, code, signed] of refusals) {
    it(`is refused where it is ${what}: ${code}`, () => {
      assert.throws(() => check().check(signed()), refused(code));
    });
  }
});

describe('the tables of the two machines', () => {
  it('lead from every state to an end, also where each step fails', () => {
    for (const table of [SOURCE, DESTINATION] as const) {
      const states = table as Readonly<Record<string, { next: readonly string[]; onFailure: string }>>;
      const ends = Object.keys(states).filter((name) => states[name]!.next.length === 0);
      assert.ok(ends.length >= 3);
      for (const name of Object.keys(states)) {
        const seen = new Set<string>();
        const reach = (at: string): boolean => {
          if (ends.includes(at)) return true;
          if (seen.has(at)) return false;
          seen.add(at);
          return [...states[at]!.next, states[at]!.onFailure].every((next) => reach(next) || seen.has(next));
        };
        assert.equal(reach(name), true, name);
      }
    }
  });

  it('say of each durable step of the source after the departure that only the destination ends it', () => {
    for (const [state, step] of Object.entries(SOURCE)) {
      const isBefore = step.afterwards === 'source' || step.afterwards === 'decided-source';
      const goesOn =
        step.onFailure === 'aborted' || step.onFailure === 'thawing' || step.onFailure === undefined;
      assert.equal(isBefore, goesOn && state !== 'committed' && state !== 'in-doubt', state);
    }
    assert.ok(MIGRATION_BARRIERS.filter(({ isDurable }) => isDurable).length >= 12);
    assert.equal(new Set(MIGRATION_BARRIERS.map(({ name }) => name)).size, MIGRATION_BARRIERS.length);
  });
});
