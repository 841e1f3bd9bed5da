import assert from 'node:assert/strict';
import { once } from 'node:events';
import { readFileSync, writeFileSync } from 'node:fs';
import { type IncomingMessage, request } from 'node:http';
import { join } from 'node:path';
import { ROUTES } from 'vtpm-manager/admin/routes';
import { newBackupKey, parseBackupSecret } from 'vtpm-manager/backup/operator-key';
import { openEntry, readBackup } from 'vtpm-manager/backup/read';
import {
  encode,
  type RestoreRequest,
  signFencing,
  signingKeyFromSeed,
  uuidToBytes,
  uuidToText,
} from 'vtpm-proto';
import { check, description } from '../support/admin-description.js';
import { type TestVtpm, testVtpm } from '../support/worker-client.js';
import { BackupDesk } from './backup-fixture.js';
import { identityOf, LyingTpm } from './peer-fixture.js';
import { Host } from './platform-fixture.js';

const operations = Object.entries(description.paths).flatMap(([path, methods]) =>
  Object.entries(methods).map(([method, operation]) => ({
    call: `${method.toUpperCase()} ${path}`,
    operation,
  })),
);

interface Answer {
  readonly status: number;
  readonly type: string;
  readonly allow: string | undefined;
  readonly bytes: Buffer;
  readonly text: string;
}

/** Of one migration: manager/migration.test.ts has those answers. */
const OF_TWO_HOSTS = ['200', '409'];

const OCTETS = 'application/octet-stream';

describe('docs/admin-api.yaml', () => {
  let host: Host;
  /** Of each call the statuses that were seen, each with a body as documented. */
  const seen = new Map<string, Set<string>>();

  before(async () => {
    host = await Host.create();
    await host.manager.start();
  });
  after(() => host.destroy());

  /** Sends it, and holds the answer against what is documented of the call. */
  async function send(
    call: string,
    names: { id?: string; digest?: string; migration?: string; name?: string } = {},
    body?: unknown,
    query = '',
  ): Promise<Answer> {
    const [method = '', template = ''] = call.split(' ');
    const path =
      template.replace(/\{(\w+)\}/g, (_, name: keyof typeof names) => names[name] ?? names.digest ?? '') +
      query;
    const answer = await raw(method, path, body, template === '/events' ? 1 : undefined);
    const { responses } = description.paths[template]?.[method.toLowerCase()] ?? assert.fail(call);
    const response =
      responses[answer.status] ?? assert.fail(`${call} answers ${answer.status}: ${answer.text}`);
    const place = response.$ref
      ? response.$ref.split('/').slice(1)
      : ['paths', template, method.toLowerCase(), 'responses', String(answer.status)];
    const documented = response.$ref ? description.components.responses.Error : response;
    assert.ok(documented?.content?.[answer.type], `${call} answers ${answer.type}`);
    const values =
      answer.type === 'application/x-ndjson'
        ? answer.text
            .trimEnd()
            .split('\n')
            .map((line) => JSON.parse(line) as unknown)
        : [answer.type === 'application/json' ? (JSON.parse(answer.text) as unknown) : answer.text];
    for (const value of values) check([...place, 'content', answer.type, 'schema'], value);
    // What was taken is what is documented, too.
    const taken = description.paths[template]?.[method.toLowerCase()]?.requestBody;
    if (taken && body !== undefined && answer.status < 300) {
      const type = Buffer.isBuffer(body) ? OCTETS : 'application/json';
      assert.ok(taken.content[type], `${call} takes ${type}`);
      check(['paths', template, method.toLowerCase(), 'requestBody', 'content', type, 'schema'], body);
    }
    const statuses = seen.get(call) ?? new Set();
    seen.set(call, statuses.add(String(answer.status)));
    return answer;
  }

  async function raw(method: string, path: string, body?: unknown, lines?: number): Promise<Answer> {
    const sent = request({ socketPath: host.manager.paths.adminSocket, method, path });
    const isRaw = typeof body === 'string' || Buffer.isBuffer(body);
    sent.end(body === undefined || isRaw ? body : JSON.stringify(body));
    const [response] = (await once(sent, 'response')) as [IncomingMessage];
    let bytes = Buffer.alloc(0);
    for await (const chunk of response as AsyncIterable<Buffer>) {
      bytes = Buffer.concat([bytes, chunk]);
      if (lines !== undefined && bytes.toString().split('\n').length > lines) break;
    }
    const { 'content-type': type = '', allow } = response.headers;
    return {
      status: response.statusCode ?? 0,
      type: type.split(';')[0] ?? '',
      allow,
      bytes,
      text: bytes.toString(),
    };
  }

  const liar = new LyingTpm();
  const backups = new BackupDesk();
  after(() => backups.clear());
  const otherHost = (own: string, quotedBy = liar) =>
    identityOf(own, liar, { backupKey: backups.keys.backupKey.publicKey }, quotedBy);

  /** What brings back each vTPM of a backup. */
  async function restores(backup: Buffer, secretKey: Uint8Array): Promise<Map<string, RestoreRequest>> {
    const path = join(host.manager.home, 'backup.vtpm');
    writeFileSync(path, backup);
    const requests = new Map<string, RestoreRequest>();
    await readBackup(path, (start, entry) => {
      const { facts, signature, parsed } = entry;
      const content = openEntry(secretKey, start, entry);
      requests.set(uuidToText(parsed.vtpmUuid), { headerDigest: start.digest, facts, signature, content });
    });
    return requests;
  }

  /** What rescues the vTPM of a backup that the other host made. */
  async function rescueRequests(id: string): Promise<{ good: Buffer; unfenced: Buffer; unknown: Buffer }> {
    backups.put(id, 3n, Buffer.from('state'));
    const restore = (await restores(await backups.make(), backups.operator.secretKey)).get(id);
    assert.ok(restore);
    const { key } = host.manager.toolstack;
    const statement = {
      format: 1,
      toolstackKey: key.publicKey,
      vtpmUuid: uuidToBytes(id),
      host: signingKeyFromSeed(Buffer.alloc(32, 1)).publicKey,
      lastGeneration: 2n ** 40n,
      method: 'its power was cut',
      at: BigInt(Date.now()),
    };
    const fencing = signFencing(key, statement);
    const other = signFencing(key, { ...statement, host: Buffer.alloc(32, 3) });
    return {
      good: encode('RescueRequest', { restore, fencing }),
      unfenced: encode('RescueRequest', { restore }),
      unknown: encode('RescueRequest', { restore, fencing: other }),
    };
  }

  /** @returns the function that ends its worker in order */
  async function loaded(vtpm: TestVtpm): Promise<() => Promise<void>> {
    const worker = host.manager.worker(host.managerId);
    const grant = await worker.load(
      host.manager.toolstack.ticket(worker.managerId, vtpm, worker.keys.publicKey),
    );
    const session = await worker.session(vtpm, grant);
    await session.save({ permanent: Buffer.from('P') });
    return async () => {
      session.stream?.end();
      await session.stream?.ended;
      worker.close();
    };
  }

  it('names the calls that there are, no more and no less, each with its action in the audit log', () => {
    assert.deepEqual(
      operations.map(({ call, operation }) => [call, operation['x-audit']]).sort(),
      ROUTES.map(({ method, path, audits }) => [`${method} ${path}`, audits]).sort(),
    );
  });

  it('says what each call answers', async () => {
    const image = host.manager.toolstack.imageDigest.toString('hex');
    const unknown = { id: testVtpm().id, digest: 'ab'.repeat(32) };
    for (const call of ['GET /health', 'GET /doctor', 'GET /metrics', 'GET /platform', 'GET /events']) {
      await send(call);
    }
    await send('POST /images', {}, { digest: image, note: 'n' });
    await send('POST /images', {}, { digest: 'x' });
    await send('POST /images', {}, `{"digest":"${'a'.repeat(4_000_000)}"}`);
    await send('POST /images', {}, { digest: unknown.digest });
    await send('GET /images');
    await send('DELETE /images/{digest}', unknown);
    await send('DELETE /images/{digest}', unknown);
    await send('DELETE /images/{digest}', { digest: 'x' });

    const [one, two] = [testVtpm(), testVtpm()];
    const endOne = await loaded(one);
    await (await loaded(two))();
    await send('POST /vtpms/{id}/retire', one);
    const key = newBackupKey();
    const to = key.public;
    const { bytes } = await send('POST /backup', {}, { to });
    await send('POST /backup', {}, { to, vtpms: [one.id] });
    await send('POST /backup', {}, { to, vtpms: [unknown.id] });
    await send('POST /backup', {}, { to, vtpm: [one.id] });
    await send('POST /backup', {}, { to: 'a'.repeat(4_000_000) });
    const requests = await restores(bytes, parseBackupSecret(key.secret));
    const [connected, idle] = [one, two].map(({ id }) => {
      const request = requests.get(id);
      return request && encode('RestoreRequest', request);
    });
    for (const query of ['', '?accept-rollback=yes', '?accept-rollback=1', '?accept_rollback=yes']) {
      await send('POST /restore', {}, idle, query);
      await send('POST /restore', {}, connected, query);
    }
    await send('POST /restore', {}, Buffer.alloc(600_000));
    await send('GET /vtpms/{id}', two);
    await endOne();
    await send('GET /vtpms', {}, undefined, '?limit=1');
    await send('GET /vtpms', {}, undefined, '?limit=0');
    await send('GET /vtpms/{id}', one);
    await send('GET /vtpms/{id}', unknown);
    await send('GET /vtpms/{id}', { id: 'x' });
    await send('POST /vtpms/{id}/retire', one);
    await send('POST /vtpms/{id}/retire', unknown);
    await send('POST /vtpms/{id}/retire', { id: 'x' });
    const shown = JSON.parse((await send('GET /vtpms/{id}', one)).text) as { erasure: object | null };
    assert.ok(shown.erasure);
    await send('GET /vtpms');
    await send('GET /health');
    await send('GET /platform');

    await send('POST /platform/requests', {}, { label: '' });
    await send('POST /platform/approvals', {}, {});
    const approval = await host.signed('first');
    await send('POST /platform/requests', {}, { label: 'x' });
    const authority = host.authority.publicKey;
    await send('POST /platform/policy', {}, { authority });
    await send('POST /platform/approvals', {}, { approval, authority });
    await send('POST /platform/policy', {}, { authority });
    await send('POST /platform/policy', {}, {});
    await send('GET /platform');
    const survivor = await host.signed('second', { next: true });
    await send('POST /platform/revocations', {}, { survivors: [] });
    await send('POST /platform/revocations', {}, { survivors: [survivor] });
    await send('POST /platform/rotations', {}, {});
    await send('POST /platform/rotations', {}, { colour: 'red' });
    await send('GET /platform');

    await send('GET /migrations');
    const unheardOf = { migration: 'ab'.repeat(16) };
    for (const names of [unheardOf, { migration: 'x' }]) {
      await send('GET /migrations/{migration}', names);
      await send('POST /migrations/{migration}/resolve', names, {});
      await send('POST /migrations/{migration}/accept', names, {});
      await send('POST /migrations/{migration}/refuse', names, { code: 'c', message: 'm' });
      await send('POST /migrations/{migration}/cancel', names, {});
    }

    const own = JSON.parse((await send('GET /identity')).text) as { identity: string };
    const [identity, fingerprint] = otherHost(own.identity);
    const peer = { name: 'b', identity, addresses: ['192.0.2.7:7799', '[2001:db8::7]:7799'] };
    await send('POST /peers', {}, peer);
    await send('POST /peers', {}, { ...peer, ekFingerprint: 'ab'.repeat(32) });
    await send('POST /peers', {}, { ...peer, identity: 'x'.repeat(1024 * 1024) });
    const added = { ...peer, ekFingerprint: fingerprint, approveCurrent: true, authority, maySend: false };
    await send('POST /peers', {}, added);
    await send('POST /peers', {}, added);
    await send('GET /peers');
    const platform = [{ pcrSelection: 'sha256:7', pcrDigest: unknown.digest }];
    const b = { name: 'b' };
    await send('PATCH /peers/{name}', b, { approve: platform, mayReceive: false, authority: null });
    await send('PATCH /peers/{name}', b, { withdraw: platform, addresses: [] });
    await send('PATCH /peers/{name}', b, { identity });
    await send('PATCH /peers/{name}', b, { identity: otherHost(own.identity, new LyingTpm())[0] });
    await send('PATCH /peers/{name}', b, { withdraw: platform });
    await send('PATCH /peers/{name}', b, {});
    await send('PATCH /peers/{name}', { name: 'c' }, { addresses: [] });
    const rescued = await rescueRequests(testVtpm().id);
    for (const query of ['', '?accept-rollback=1', '?accept-rollback=yes', '?accept-rollback=yes']) {
      for (const body of Object.values(rescued)) await send('POST /rescue', {}, body, query);
    }
    await send('POST /rescue', {}, Buffer.alloc(600_000));
    await send('DELETE /peers/{name}', b);
    await send('DELETE /peers/{name}', b);

    for (const query of ['', '?tail=5', '?tail=0']) await send('GET /audit', {}, undefined, query);
    for (const query of ['', '?from=2&to=3', '?from=3&to=2']) {
      await send('GET /audit/export', {}, undefined, query);
    }
    await send('GET /audit/verify');
    const { audit } = host.manager.paths;
    const log = readFileSync(audit, 'utf8');
    writeFileSync(audit, log.replace('"action":"init"', '"action":"stop"'));
    await send('GET /audit');
    await send('GET /audit/verify');
    writeFileSync(audit, log);
  });

  it('says what a locked manager answers', async () => {
    await host.manager.stop();
    await host.extend('other firmware');
    assert.equal((await host.manager.start()).status, 'locked');
    const names = { id: testVtpm().id, digest: 'ab'.repeat(32), migration: 'ab'.repeat(16), name: 'b' };
    for (const { call, operation } of operations) {
      if (!operation.responses['503']) {
        if (call.startsWith('GET ')) assert.equal((await send(call)).status, 200, call);
        continue;
      }
      const body = call === 'POST /platform/policy' ? { pcrSelection: 'sha256:7' } : {};
      const answer = await send(call, names, call.startsWith('POST ') ? body : undefined);
      assert.equal(answer.status, 503, call);
      assert.equal((JSON.parse(answer.text) as { error: { code: string } }).error.code, 'locked', call);
    }
  });

  it('says nothing of an answer that was not seen here', () => {
    for (const { call, operation } of operations) {
      const ofTwoHosts = call.includes('{migration}')
        ? OF_TWO_HOSTS
        : call === 'DELETE /peers/{name}'
          ? ['409']
          : [];
      const documented = Object.keys(operation.responses).filter((code) => !ofTwoHosts.includes(code));
      assert.deepEqual([...(seen.get(call) ?? [])].sort(), documented.sort(), call);
    }
  });

  it('is all that there is: other calls are refused, and other methods by name', async () => {
    const methods = ['GET', 'POST', 'PUT', 'DELETE', 'PATCH', 'HEAD'];
    for (const [template, known] of Object.entries(description.paths)) {
      const path = template.replaceAll(/\{\w+\}/g, 'x');
      const allowed = Object.keys(known).map((method) => method.toUpperCase());
      for (const method of methods.filter((each) => !allowed.includes(each))) {
        const answer = await raw(method, path);
        assert.equal(answer.status, 405, `${method} ${path}`);
        assert.deepEqual(answer.allow?.split(', ').sort(), allowed.sort(), `${method} ${path}`);
      }
    }
    for (const path of ['/', '/nothing', '/vtpms/x/y', '/vtpms/x/retire/y', '/healthy', '/Health']) {
      const { status, text } = await raw('GET', path);
      assert.equal(status, 404, path);
      check(['components', 'schemas', 'Error'], JSON.parse(text));
    }
  });
});
