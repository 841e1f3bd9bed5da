import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { tmpdir } from 'node:os';
import {
  Ht,
  listHandles,
  NV_Increment,
  NV_Read,
  NV_UndefineSpace,
  permanent,
  Quote,
  Rc,
  Rh,
  readNvIndex,
  StartAuthSession,
  TpmError,
  withPassword,
} from 'tpm2-ts-bindings';
import type { AnchorCounter, RootTpmEnrolment } from 'vtpm-manager/root-tpm/index';
import { commandCode, startRecordingProxy } from '../support/recording-proxy.js';
import { connectTpm } from '../support/tpm-fixture.js';
import { until } from '../support/until.js';
import { ANCHOR_AUTH, Chip, ENROL, refuses } from './root-tpm-fixture.js';

describe('manager: the anchor counter in the root TPM', () => {
  const chip = new Chip();
  const owner = withPassword(permanent(Rh.OWNER));

  function counter<T>(
    enrolment: RootTpmEnrolment,
    body: (counter: AnchorCounter) => Promise<T>,
    options: { path?: string; auth?: Uint8Array } = {},
  ): Promise<T> {
    return chip.root((tpm) => body(tpm.anchorCounter(enrolment, options.auth ?? ANCHOR_AUTH)), options.path);
  }

  async function undefine({ anchor }: RootTpmEnrolment): Promise<void> {
    await chip.direct(async (tpm) => {
      const nvIndex = (await readNvIndex(tpm, anchor.handle))!;
      await tpm.run(NV_UndefineSpace, { authHandle: owner, nvIndex }, {});
    });
  }

  it('counts on, also over restarts of the TPM', async () => {
    const { enrolment } = await chip.enrol();
    let last = await counter(enrolment, (anchor) => anchor.read());
    for (let round = 0; round < 3; round++) {
      await counter(enrolment, async (anchor) => {
        assert.equal(await anchor.read(), last);
        for (let step = 0; step < 5; step++) assert.equal(await anchor.increment(), ++last);
      });
      // As a power cut: what was not kept is gone.
      await chip.swtpm.restart();
    }
    assert.equal(await counter(enrolment, (anchor) => anchor.read()), last);
  });

  it('counts before all others that wait for the TPM, and those take their turns after it', async () => {
    const { enrolment } = await chip.enrol();
    const bus = await startRecordingProxy(chip.swtpm.socket);
    try {
      await chip.root(async (tpm) => {
        const key = await tpm.makeAttestationKey(enrolment);
        const anchor = tpm.anchorCounter(enrolment, ANCHOR_AUTH);
        bus.forget();
        const order: string[] = [];
        const quotes = Array.from({ length: 4 }, async (_, at) => {
          await tpm.quote(enrolment, key, 'sha256:7', randomBytes(32));
          order.push(`quote ${at}`);
        });
        const count = anchor.increment().then(() => order.push('count'));
        await Promise.all([...quotes, count]);
        assert.deepEqual(order, ['count', 'quote 0', 'quote 1', 'quote 2', 'quote 3']);
        const codes: readonly number[] = bus.commands.map(commandCode);
        assert.ok(codes.indexOf(NV_Increment.code) < codes.indexOf(Quote.code));
        assert.equal(codes.filter((code) => code === Quote.code).length, 4);
      }, bus.path);
    } finally {
      await bus.close();
    }
  });

  it('keeps no session in the TPM between two uses, and works beside everything else', async () => {
    const { enrolment, rootKey } = await chip.enrol();
    const bus = await startRecordingProxy(chip.swtpm.socket);
    try {
      await chip.root(async (tpm) => {
        const anchor = tpm.anchorCounter(enrolment, ANCHOR_AUTH);
        const first = await anchor.read();
        const all = await Promise.all(Array.from({ length: 20 }, () => anchor.increment()));
        assert.deepEqual(
          all,
          all.map((_, at) => first + BigInt(at) + 1n),
        );
        assert.deepEqual(await tpm.releaseRootKey(enrolment), rootKey);
        const facts = await tpm.examine(enrolment);
        assert.ok(facts.isStarted);
        assert.equal(facts.loaded, 0, 'what a killed manager would leave');
        const next = await tpm.nextGeneration(enrolment);
        await tpm.eraseGeneration(next.enrolment, enrolment.root);
        const of = tpm.anchorCounter(next.enrolment, ANCHOR_AUTH);
        assert.equal(await of.read(), first + 20n, 'generations share the counter');
      }, bus.path);
    } finally {
      await bus.close();
    }
  });

  it('gets ready to count and waits until it may count; where it may not, nothing is counted', async () => {
    const { enrolment } = await chip.enrol();
    const bus = await startRecordingProxy(chip.swtpm.socket);
    const codes = () => bus.commands.map(commandCode);
    try {
      await chip.root(async (tpm) => {
        const anchor = tpm.anchorCounter(enrolment, ANCHOR_AUTH);
        const before = await anchor.read();
        bus.forget();
        let state: () => void = () => undefined;
        const counting = anchor.increment(
          new Promise((resolve) => {
            state = resolve;
          }),
        );
        await until('a session is open', () => codes().includes(StartAuthSession.code));
        await new Promise((resolve) => setImmediate(resolve));
        assert.ok(!codes().includes(NV_Increment.code));
        state();
        assert.equal(await counting, before + 1n);
        const never = Promise.reject(new Error('it was not stated'));
        never.catch(() => undefined);
        await assert.rejects(anchor.increment(never), /it was not stated/);
        assert.equal(await anchor.read(), before + 1n);
        const facts = await tpm.examine(enrolment);
        assert.ok(facts.isStarted);
        assert.equal(facts.loaded, 0, 'no session stays open');
      }, bus.path);
    } finally {
      await bus.close();
    }
  });

  it('I-7 its secret is in no byte on the bus', async () => {
    const bus = await startRecordingProxy(chip.swtpm.socket);
    try {
      const { enrolment } = await chip.root((tpm) => tpm.enrol(ENROL), bus.path);
      await counter(enrolment, (anchor) => anchor.increment(), { path: bus.path });
      await chip.root((tpm) => tpm.recreateAnchorCounter(enrolment, ANCHOR_AUTH), bus.path);
      assert.ok(bus.commands.some((command) => commandCode(command) === NV_Increment.code));
      for (let at = 0; at + 8 <= ANCHOR_AUTH.length; at++) {
        assert.equal(bus.saw(ANCHOR_AUTH.subarray(at, at + 8)), false);
      }
      // Positive control: as a password it is there to read.
      bus.forget();
      const hex = `hex:${ANCHOR_AUTH.toString('hex')}`;
      const handle = `0x${enrolment.anchor.handle.toString(16)}`;
      const tpm = await connectTpm(bus.path);
      const index = (await readNvIndex(tpm, enrolment.anchor.handle, ANCHOR_AUTH))!;
      await tpm.run(NV_Read, { authHandle: withPassword(index), nvIndex: index }, { size: 8, offset: 0 });
      await tpm.close();
      assert.equal(bus.saw(ANCHOR_AUTH), true);
      // And with tpm2-tools the secret does count.
      await chip.tools(tmpdir(), 'tpm2_nvincrement', handle, '-C', handle, '-P', hex);
    } finally {
      await bus.close();
    }
  });

  it('neither owner nor a wrong secret counts or reads it', async () => {
    const { enrolment } = await chip.enrol();
    const before = await counter(enrolment, (anchor) => anchor.read());
    await chip.direct(async (tpm) => {
      const nvIndex = (await readNvIndex(tpm, enrolment.anchor.handle))!;
      const refused = (error: unknown) => TpmError.is(error, Rc.NV_AUTHORIZATION, Rc.AUTH_FAIL, Rc.BAD_AUTH);
      for (const authHandle of [owner, withPassword(nvIndex)]) {
        await assert.rejects(tpm.run(NV_Increment, { authHandle, nvIndex }, {}), refused);
        await assert.rejects(tpm.run(NV_Read, { authHandle, nvIndex }, { size: 8, offset: 0 }), refused);
      }
    });
    const bus = await startRecordingProxy(chip.swtpm.socket);
    const auth = randomBytes(32);
    for (const use of ['read', 'increment'] as const) {
      bus.forget();
      await assert.rejects(
        counter(enrolment, (anchor) => anchor[use](), { path: bus.path, auth }),
        refuses('tpm-changed', /with another secret/),
      );
      const tried = bus.commands.filter((command) =>
        [NV_Read.code, NV_Increment.code].includes(commandCode(command)),
      );
      assert.equal(tried.length, 1, 'never tried again');
    }
    await bus.close();
    assert.equal(await counter(enrolment, (anchor) => anchor.read()), before);
  });

  it('I-9 one that was removed is named, and never made anew', async () => {
    const { enrolment } = await chip.enrol();
    const before = await counter(enrolment, (anchor) => anchor.increment());
    await undefine(enrolment);
    for (const use of ['read', 'increment'] as const) {
      await assert.rejects(
        counter(enrolment, (anchor) => anchor[use]()),
        refuses('anchor-removed', /vtpmctl recover --accept-rollback/),
      );
    }
    assert.equal(await chip.direct((tpm) => readNvIndex(tpm, enrolment.anchor.handle)), undefined);
    const recovered = await chip.root((tpm) => tpm.recreateAnchorCounter(enrolment, ANCHOR_AUTH));
    assert.ok((await counter(recovered, (anchor) => anchor.read())) > before, 'no value comes back');
    assert.notEqual(recovered.anchor.name, enrolment.anchor.name);
  });

  it('one that is removed while it is in use is named too', async () => {
    const { enrolment } = await chip.enrol();
    const bus = await startRecordingProxy(chip.swtpm.socket);
    try {
      await counter(
        enrolment,
        async (anchor) => {
          await anchor.read();
          // TPM2_NV_UndefineSpace with the owner's empty password.
          const area = `40000001${enrolment.anchor.handle.toString(16).padStart(8, '0')}`;
          const answer = await bus.inject(
            Buffer.from(`80020000001f00000122${area}00000009400000090000010000`, 'hex'),
          );
          assert.equal(answer.readUInt32BE(6), 0);
          await assert.rejects(anchor.increment(), refuses('anchor-removed'));
          await assert.rejects(anchor.read(), refuses('anchor-removed'));
        },
        { path: bus.path },
      );
    } finally {
      await bus.close();
    }
  });

  it('I-5 one that the owner made anew is refused, of the same kind and of another', async () => {
    const { enrolment } = await chip.enrol();
    const handle = `0x${enrolment.anchor.handle.toString(16)}`;
    for (const [attributes, args, text] of [
      ['authwrite|authread|no_da|nt=1', ['-p', 'guess'], /with another secret/],
      ['authwrite|authread|no_da', ['-p', 'guess'], /with other properties/],
      ['authwrite|ownerwrite|authread|no_da|nt=1', [], /with other properties/],
    ] as const) {
      await undefine(enrolment);
      await chip.tools(tmpdir(), 'tpm2_nvdefine', handle, '-C', 'o', '-s', '8', '-a', attributes, ...args);
      if (attributes.includes('nt=1')) {
        const auth = args.length > 0 ? ['-P', 'guess'] : [];
        await chip.tools(tmpdir(), 'tpm2_nvincrement', handle, '-C', handle, ...auth);
      }
      for (const use of ['read', 'increment'] as const) {
        await assert.rejects(
          counter(enrolment, (anchor) => anchor[use]()),
          refuses('tpm-changed', text),
          attributes,
        );
      }
    }
  });

  it('I-5 an answer that was changed on its way is refused', async () => {
    const { enrolment } = await chip.enrol();
    const before = await counter(enrolment, (anchor) => anchor.read());
    let changed: number | undefined = NV_Read.code;
    const bus = await startRecordingProxy(chip.swtpm.socket, {
      response: (message, command) => {
        // Header, parameter size, TPM2B size: then the counter, of which the last byte counts. The HMAC is the end.
        const at = changed === NV_Read.code ? 23 : message.length - 1;
        if (commandCode(command) === changed) message[at] = (message[at] ?? 0) ^ 1;
        return message;
      },
    });
    try {
      await counter(
        enrolment,
        async (anchor) => {
          await assert.rejects(anchor.read(), refuses('tpm-fault', /changed on its way/));
          await assert.rejects(anchor.increment(), refuses('tpm-fault', /changed on its way/));
          changed = undefined;
          assert.equal(await anchor.read(), before, 'in a session of its own again');
          changed = NV_Increment.code;
          await assert.rejects(anchor.increment(), refuses('tpm-fault', /changed on its way/));
          changed = undefined;
          assert.equal(await anchor.read(), before + 1n, 'it was counted, and nobody knew');
        },
        { path: bus.path },
      );
    } finally {
      await bus.close();
    }
  });

  it('after the TPM went away and came back, the same object counts on', async () => {
    const { enrolment, rootKey } = await chip.enrol();
    await chip.root(async (tpm) => {
      const anchor = tpm.anchorCounter(enrolment, ANCHOR_AUTH);
      const before = await anchor.increment();
      await chip.swtpm.kill();
      await assert.rejects(anchor.increment(), refuses('tpm-unreachable'));
      await assert.rejects(anchor.read(), refuses('tpm-unreachable'));
      await chip.swtpm.restart();
      assert.equal(await anchor.read(), before);
      assert.equal(await anchor.increment(), before + 1n);
      assert.deepEqual(await tpm.releaseRootKey(enrolment), rootKey);
    });
  });

  it('an orderly one never goes back either, and jumps ahead by no more than it says', async () => {
    const { enrolment } = await chip.enrol({ orderly: true });
    const { orderlyCount } = enrolment.anchor;
    assert.ok(orderlyCount > 0);
    let last = await counter(enrolment, (anchor) => anchor.read());
    for (let round = 0; round < 3; round++) {
      await counter(enrolment, async (anchor) => {
        for (let step = 0; step < 5; step++) assert.equal(await anchor.increment(), ++last);
      });
      await chip.swtpm.restart();
      const after = await counter(enrolment, (anchor) => anchor.read());
      assert.ok(after >= last && after <= last + BigInt(orderlyCount) + 1n, `${after} after ${last}`);
      last = after;
    }
    const plain = await chip.enrol({ installation: randomBytes(16) });
    assert.equal(plain.enrolment.anchor.orderlyCount, 0);
  });

  it('a TPM without orderly counters is said to have none, before anything is made', async () => {
    const bus = await startRecordingProxy(chip.swtpm.socket, {
      // TPM_PT_ORDERLY_COUNT, whose value is last.
      response: (message, command) => {
        if (command.length === 22 && command.readUInt32BE(14) === 0x11d) message.fill(0, message.length - 4);
        return message;
      },
    });
    try {
      await assert.rejects(
        chip.root((tpm) => tpm.enrol({ ...ENROL, orderly: true }), bus.path),
        refuses('tpm-unfit', /no orderly counters/),
      );
    } finally {
      await bus.close();
    }
    assert.deepEqual(await chip.direct((tpm) => listHandles(tpm, Ht.NV_INDEX)), []);
  });

  it('a secret of another length is refused', async () => {
    await assert.rejects(chip.enrol({ anchorAuth: randomBytes(31) }), refuses('bad-request', /32 bytes/));
  });
});
