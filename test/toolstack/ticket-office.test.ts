import assert from 'node:assert/strict';
import { monotonicMs } from 'vtpm-common';
import { signingKeyFromSeed, type Verb, verifyTicketChain } from 'vtpm-proto';
import type { ToolstackError } from 'vtpm-toolstack/error';
import type { ManagerHealth, ManagerRecord } from 'vtpm-toolstack/supervisor/admin-client';
import { type Entry, newEntry, parseNewEntry } from 'vtpm-toolstack/supervisor/entry';
import { createTicketOffice, type TicketOffice } from 'vtpm-toolstack/supervisor/ticket-office';
import { MANAGER_ID, newVtpm } from './supervisor-fixture.js';

describe('the ticket office', () => {
  const delegateKey = signingKeyFromSeed(Buffer.alloc(32, 3));
  const workerKey = Buffer.alloc(32, 5);
  const imageDigest = 'cd'.repeat(32);
  const fresh = (change: Partial<Entry> = {}): Entry => ({
    ...newEntry(parseNewEntry(newVtpm('web1', delegateKey.publicKey))),
    vmRunId: '01234567-89ab-cdef-0123-456789abcdef',
    ...change,
  });
  function office(
    record?: Partial<ManagerRecord>,
    health: Partial<ManagerHealth> = {},
    instance: () => number | undefined = () => undefined,
  ): TicketOffice {
    return createTicketOffice({
      admin: {
        health: async () => ({ status: 'ready', managerId: MANAGER_ID, ...health }),
        vtpm: async () => record && { kind: 'live', vmUuid: '', epoch: 0, generation: 0, ...record },
      },
      managerInstance: instance,
      delegateKey,
      lifetimeSeconds: 60,
    });
  }
  const hasCode = (code: string) => (error: unknown) => (error as ToolstackError).code === code;

  it('signs what the manager checks, for this worker, image and boot', async () => {
    const entry = fresh();
    const before = monotonicMs();
    const { ticket: signed, managerKey, epoch } = await office().issue(entry, workerKey, imageDigest);
    const { ticket, vtpmUuid } = verifyTicketChain(signed);
    assert.equal(vtpmUuid, entry.id);
    assert.equal(managerKey, MANAGER_ID);
    assert.equal(epoch, 1);
    assert.equal(Buffer.from(ticket.imageDigest).toString('hex'), imageDigest);
    assert.deepEqual(Buffer.from(ticket.workerPublicKey), workerKey);
    assert.deepEqual([ticket.expectedEpoch, ticket.verbs], [0n, ['MANUFACTURE', 'COLD']]);
    assert.ok(
      ticket.expiresAtMonotonicMs >= before + 60_000n &&
        ticket.expiresAtMonotonicMs <= monotonicMs() + 60_000n,
    );
  });

  it('allows a new TPM only where there is none: at the manager and in the list (I-9)', async () => {
    const verbsOf = async (entry: Entry, record?: Partial<ManagerRecord>) => {
      const { ticket } = await office(record && { vmUuid: entry.vmUuid, ...record }).issue(
        entry,
        workerKey,
        imageDigest,
      );
      const { verbs, expectedEpoch } = verifyTicketChain(ticket).ticket;
      return [verbs, expectedEpoch];
    };
    assert.deepEqual(await verbsOf(fresh(), { epoch: 1, generation: 0 }), [['MANUFACTURE', 'COLD'], 1n]);
    assert.deepEqual(await verbsOf(fresh(), { epoch: 1, generation: 1 }), [['COLD'], 1n]);
    assert.deepEqual(await verbsOf(fresh({ manufactured: true }), { epoch: 8, generation: 90 }), [
      ['COLD'],
      8n,
    ]);
    await assert.rejects(verbsOf(fresh({ manufactured: true })), hasCode('corrupt'));
    await assert.rejects(
      verbsOf(fresh({ manufactured: true }), { epoch: 8, generation: 0 }),
      hasCode('corrupt'),
    );
  });

  it('asks for the verb resume at a power-on where a VMM may have suspended the TPM, and the delegation has it', async () => {
    const verbsOf = async (entry: Entry) => {
      const record = { vmUuid: entry.vmUuid, epoch: 4, generation: 7 };
      const { ticket } = await office(record).issue(entry, workerKey, imageDigest);
      return verifyTicketChain(ticket).ticket.verbs;
    };
    assert.deepEqual(await verbsOf(fresh({ doors: ['control'] })), ['COLD', 'RESUME']);
    assert.deepEqual(await verbsOf(fresh()), ['COLD']);
    const verbs: Verb[] = ['MANUFACTURE', 'COLD'];
    const narrow = parseNewEntry(newVtpm('web1', delegateKey.publicKey, { verbs }));
    assert.deepEqual(await verbsOf(fresh({ ...narrow, doors: ['control'] })), ['COLD']);
  });

  it('asks for export and import for a vTPM of plain state blobs alone, at each of its tickets', async () => {
    const verbs: Verb[] = ['MANUFACTURE', 'COLD', 'RESUME', 'IMPORT', 'EXPORT'];
    for (const stateBlobs of ['plain', 'reference']) {
      const given = newVtpm('web1', delegateKey.publicKey, { verbs, stateBlobs });
      office().checkDelegation(given as Entry);
      const entry = fresh(parseNewEntry(given));
      const plain = stateBlobs === 'plain' ? ['IMPORT', 'EXPORT'] : [];
      const verbsOf = async (record: Partial<ManagerRecord>, power: 'is-on' | 'goes-on') => {
        const { ticket } = await office({ vmUuid: entry.vmUuid, ...record }).issue(
          ...([entry, workerKey, imageDigest, power] as const),
        );
        return verifyTicketChain(ticket).ticket.verbs;
      };
      assert.deepEqual(await verbsOf({}, 'is-on'), ['MANUFACTURE', 'COLD', ...plain]);
      assert.deepEqual(await verbsOf({ generation: 3 }, 'is-on'), ['COLD', ...plain]);
      assert.deepEqual(await verbsOf({ generation: 3 }, 'goes-on'), ['RESUME', ...plain]);
    }
    // What the toolstack's key does not grant, the supervisor cannot give itself.
    const forged = newVtpm('web1', delegateKey.publicKey, { stateBlobs: 'plain' }) as Entry;
    assert.throws(() => office().checkDelegation(forged), hasCode('bad-request'));
  });

  it('refuses what the manager would refuse', async () => {
    const entry = fresh();
    await assert.rejects(
      office({ vmUuid: entry.vmUuid, kind: 'retired' }).issue(entry, workerKey, imageDigest),
      hasCode('manager-refused'),
    );
    await assert.rejects(
      office({ vmUuid: entry.id }).issue(entry, workerKey, imageDigest),
      hasCode('manager-refused'),
    );
    await assert.rejects(
      office(undefined, { status: 'locked' }).issue(entry, workerKey, imageDigest),
      hasCode('locked'),
    );
    await assert.rejects(
      office(undefined, { status: 'starting' }).issue(entry, workerKey, imageDigest),
      hasCode('manager-unreachable'),
    );
  });

  it('presumes what the list says, of a manager that it knows, and never that there is no TPM (I-9)', async () => {
    let instance: number | undefined = 1;
    const knowing = office(undefined, {}, () => instance);
    const presumed = (entry: Entry) => {
      const issued = knowing.presume(entry, workerKey, imageDigest);
      if (!issued) return undefined;
      const { verbs, expectedEpoch, managerId } = verifyTicketChain(issued.ticket).ticket;
      assert.equal(Buffer.from(managerId).toString('hex'), MANAGER_ID);
      return [verbs, expectedEpoch, issued.epoch];
    };
    assert.equal(presumed(fresh()), undefined, 'it has not asked who the manager is');
    await knowing.issue(fresh(), workerKey, imageDigest);
    assert.deepEqual(presumed(fresh()), [['MANUFACTURE', 'COLD'], 0n, 1]);
    assert.deepEqual(presumed(fresh({ manufactured: true, epoch: 4 })), [['COLD'], 4n, 5]);
    instance = 2;
    assert.equal(presumed(fresh()), undefined, 'another manager may be there now');
    instance = undefined;
    assert.equal(presumed(fresh()), undefined, 'none is there');
  });

  it('takes only delegations that are signed, for its own key and for that vTPM', () => {
    const good = newVtpm('web1', delegateKey.publicKey) as Entry;
    office().checkDelegation(good);
    const other = newVtpm('web1', delegateKey.publicKey) as Entry;
    for (const [what, bad] of Object.entries({
      'another key': newVtpm('web1', signingKeyFromSeed(Buffer.alloc(32, 4)).publicKey) as Entry,
      'another signature': { ...good, delegationSignature: other.delegationSignature },
      'another vTPM': { ...good, id: other.id },
      'another VM': { ...good, vmUuid: other.vmUuid },
      nothing: { ...good, delegation: '', delegationSignature: '' },
    })) {
      assert.throws(() => office().checkDelegation(bad), hasCode('bad-request'), what);
    }
  });
});
