/**
 * Stands in for a manager that is killed or traced: makes a store, then writes records and says on standard output
 * which ones were acknowledged.
 *
 *     node store-writer.js DIRECTORY STORE_ID ROOT_KEY sandbox|plain COUNT
 */
import { createLogger } from 'vtpm-common';
import { createAnchoredStore, openLmdbStore } from 'vtpm-manager/store/index';
import { anchorOptions, testKeys } from '../support/test-keys.js';
import { contentOf } from './store-fixture.js';

const [directory = '', storeId = '', rootKey = '', mode = '', count = ''] = process.argv.slice(2);
const store = await openLmdbStore({
  directory,
  create: true,
  sandbox: mode === 'sandbox',
  log: createLogger('writer', { 'log-level': 'silent', 'log-format': 'json' }),
  onLost: (error) => {
    throw error;
  },
});
const anchored = await createAnchoredStore(
  store,
  anchorOptions(testKeys(Buffer.from(storeId, 'hex'), Buffer.from(rootKey, 'hex'))),
);
for (let i = 0; i < Number(count); i++) {
  const key = `vtpm/${i % 10}`;
  const version = Math.floor(i / 10);
  await anchored.write(key, version, contentOf(key, version + 1));
  process.stdout.write(`${key} ${version + 1}\n`);
}
await anchored.close();
