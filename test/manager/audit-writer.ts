/**
 * Stands in for a manager that is killed or traced: appends to an audit log, several entries at a time, and says on
 * standard output how many were acknowledged.
 *
 *     node audit-writer.js PATH KEY SEGMENT_BYTES COUNT
 */
import { writeSync } from 'node:fs';
import { createAuditLog } from 'vtpm-manager/audit/index';
import { load } from './audit-fixture.js';

const [path = '', key = '', segmentBytes = '', count = ''] = process.argv.slice(2);
const options = { segmentBytes: Number(segmentBytes) };
const log = await createAuditLog(path, { id: 1, key: Buffer.from(key, 'hex') }, options);
for (let i = 0; i < Number(count); i += 4) {
  await Promise.all([0, 1, 2, 3].map((more) => log.append(load(BigInt(i + more)))));
  writeSync(1, `${log.head.length} ${log.head.digest.toString('hex')}\n`);
}
await log.close();
