import assert from 'node:assert/strict';
import { createHmac } from 'node:crypto';
import { createAnchoredStore } from 'vtpm-manager/store/index';
import { createTrustStore, openTrustStore, TRUST_KEY } from 'vtpm-manager/trust/trust-configuration';
import { decode, encode } from 'vtpm-proto';
import { AuditFixture } from '../manager/audit-fixture.js';
import { refusal } from '../manager/store-fixture.js';
import { MemoryStore } from '../support/memory-store.js';
import { anchorOptions, testKeys } from '../support/test-keys.js';

/** What says its format under a MAC can be made by who has the key only: a later version of the manager. */
describe('what a later version wrote under its key is refused by name', () => {
  it('an entry of the audit log', async () => {
    const audit = new AuditFixture();
    try {
      const heads = await audit.write(3);
      const lines = audit.lines();
      const body = (lines.at(-1) ?? '').replace('"format":1', '"format":2').replace(/,"mac":.*$/, '');
      const mac = createHmac('sha256', audit.key.key).update('vtpm.v1 audit\0').update(body).digest('hex');
      audit.put([...lines.slice(0, -1), `${body},"mac":"${mac}"}`]);
      const [head] = heads.slice(-1);
      assert.ok(head);
      await assert.rejects(audit.open(head), refusal('newer-format', /entries of format 2/));
      // The same line without the key is damage.
      audit.put([...lines.slice(0, -1), `${body},"mac":"${'0'.repeat(64)}"}`]);
      await assert.rejects(audit.open(head), refusal('audit-corrupt'));
    } finally {
      await audit.destroy();
    }
  });

  it('the trust configuration', async () => {
    const keys = testKeys();
    const store = await createAnchoredStore(new MemoryStore(), anchorOptions(keys));
    await createTrustStore(keys, store, Buffer.alloc(32, 1), 1n);
    const entry = await store.read(TRUST_KEY);
    assert.ok(entry);
    const record = decode('TrustRecord', entry.value);
    const newer = { ...decode('TrustConfiguration', record.configuration), format: 2 };
    const configuration = encode('TrustConfiguration', newer);
    const { trustMacKey } = keys.current;
    const mac = createHmac('sha256', trustMacKey).update('vtpm.v1 trust\0').update(configuration).digest();
    const { version } = entry;
    await store.write(TRUST_KEY, version, encode('TrustRecord', { ...record, configuration, mac }), 'now');
    await assert.rejects(openTrustStore(keys, store), refusal('newer-format', /has format 2/));
  });
});
