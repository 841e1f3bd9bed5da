import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  createTpm,
  defineNvIndex,
  NV_Write,
  NvAttribute,
  openSocket,
  permanent,
  Rh,
  withPassword,
} from 'tpm2-ts-bindings';
import { openBundle, type StateParts } from 'vtpm-manager/migration/bundle';
import { StateKeys } from 'vtpm-manager/migration/state-key';
import { Transcript } from 'vtpm-manager/migration/transcript';
import { bindingOf } from 'vtpm-manager/peer/tls';
import { decode, type MigrationHello, type MigrationOffer, type PeerMessage, x25519 } from 'vtpm-proto';
import { HostileHost } from '../support/hostile-host.js';
import { migrated } from '../support/migrate.js';
import { grpcMessages, openTls, startTlsRecorder, type TlsRecorder } from '../support/tls-recorder.js';
import { TwoHosts } from '../support/two-hosts.js';

/** What the guest keeps in its TPM. */
const MARKER = randomBytes(64);
const INDEX = 0x01500009;

/** Writes what each 64-byte input of an HMAC was, and the HMAC's key: the state key is made of such a one. */
const LEAK = (file: string): string => `import crypto from 'node:crypto';
import { appendFileSync } from 'node:fs';
import { syncBuiltinESMExports } from 'node:module';
const { createHmac } = crypto;
crypto.createHmac = (hash, key, options) => {
  const hmac = createHmac(hash, key, options);
  const update = hmac.update.bind(hmac);
  hmac.update = (data, encoding) => {
    if (data.length === 64) appendFileSync(${JSON.stringify(file)}, Buffer.from(key).toString('hex') + ' ' + Buffer.from(data).toString('hex') + '\\n');
    update(data, encoding);
    return hmac;
  };
  return hmac;
};
syncBuiltinESMExports();`;

describe('I-7 a migration that was recorded', () => {
  const directory = mkdtempSync(join(tmpdir(), 'vtpm-recorded-'));
  const [keyLog, leaked] = [join(directory, 'keys'), join(directory, 'leaked')];
  let hosts: TwoHosts;
  let recorder: TlsRecorder;
  /** Of both hosts, and what comes of them with what is in the clear within TLS. */
  let longTerm: Buffer[];
  let transcript: Buffer;
  let hello: MigrationHello;
  let offer: MigrationOffer;
  let state: Uint8Array;
  let secrets: { unwrapped: Buffer; shared: Buffer };
  let inner: Buffer;

  before(async () => {
    hosts = await TwoHosts.strangers({
      isLocal: true,
      a: {
        nodeArgs: [
          `--tls-keylog=${keyLog}`,
          ...['--import', `data:text/javascript,${encodeURIComponent(LEAK(leaked))}`],
        ],
      },
    });
    const { a, b } = hosts;
    recorder = await startTlsRecorder({ host: b.place.v4, port: b.place.port });
    await a.know(b, `127.0.0.1:${recorder.port}`);
    await b.know(a);
    await keepMarker(await a.installation.vtpm('web1'));
    await migrated(a, b, 'web1');
    assert.ok(recorder.connections.length > 0, 'nothing was recorded');
    const takenOver = [await HostileHost.takeOver(a), await HostileHost.takeOver(b)];
    const [keyA, keyB] = takenOver.map(({ tlsKey }) => tlsKey) as [Buffer, Buffer];
    const messages = readRecording(recorder, readFileSync(keyLog, 'utf8'));
    inner = messages.bytes;
    ({ transcript, hello, offer, state } = follow(messages.client, messages.server, bindingOf(keyA, keyB)));
    longTerm = (await Promise.all(takenOver.map((host) => host.longTermSecrets()))).flat();
    secrets = leakedSecrets(readFileSync(leaked, 'utf8'), transcript);
    for (const host of takenOver) await host.close();
  });

  after(async () => {
    await recorder?.close();
    await hosts?.destroy();
    rmSync(directory, { recursive: true, force: true });
  });

  it('opens once the secret of the import key and that of the session are both known', () => {
    const parts = opened(secrets.unwrapped, secrets.shared);
    const all = Buffer.concat(Object.values(parts));
    assert.ok(all.includes(MARKER), 'the state is what the guest kept');
  });

  it('does not show what the guest kept, within TLS either', () => {
    assert.ok(!inner.includes(MARKER));
  });

  it('does not open with every long-term key of both hosts', () => {
    const { guesses, shared } = guessable();
    for (const first of guesses) for (const second of [...guesses, ...shared]) assertShut(first, second);
  });

  it('does not open with the secret of the import key, which the TPM alone unwraps, without the session’s', () => {
    const { guesses, shared } = guessable();
    for (const guess of [...guesses, ...shared]) assertShut(secrets.unwrapped, guess);
  });

  it('does not open with the secret of the session, without the TPM’s', () => {
    const { guesses, shared } = guessable();
    for (const guess of [...guesses, ...shared]) assertShut(guess, secrets.shared);
  });

  /** Long-term secrets, and what X25519 makes of them with the keys that both ends sent. */
  function guessable(): { guesses: Buffer[]; shared: Buffer[] } {
    const guesses = [Buffer.alloc(32), ...longTerm];
    const shared = longTerm.flatMap((key) => [x25519(key, hello.sessionKey), x25519(key, offer.sessionKey)]);
    assert.ok(longTerm.length >= 28, 'not all keys of both hosts were tried');
    return { guesses, shared };
  }

  function opened(unwrapped: Buffer, shared: Buffer): StateParts {
    const { migrationId, vtpmUuid, vmUuid, epoch, generation } = hello;
    const names = { identifier: offer.identifier, migrationId, vtpmUuid, vmUuid, epoch };
    const allowed = ['PERMANENT', 'VOLATILE', 'REFERENCE_KEY'] as const;
    const expected = { ...names, leastGeneration: generation, required: ['PERMANENT'] as const, allowed };
    return openBundle(new StateKeys(unwrapped, shared, transcript), expected, state).parts;
  }

  function assertShut(unwrapped: Buffer, shared: Buffer): void {
    assert.throws(() => opened(unwrapped, shared), { code: 'incomplete' });
  }
});

async function keepMarker(door: string): Promise<void> {
  const tpm = createTpm(await openSocket(door));
  const authHandle = withPassword(permanent(Rh.OWNER));
  const attributes = NvAttribute.OWNERWRITE | NvAttribute.OWNERREAD | NvAttribute.NO_DA;
  const nvIndex = await defineNvIndex(tpm, authHandle, {
    nvIndex: INDEX,
    attributes,
    dataSize: MARKER.length,
  });
  await tpm.run(NV_Write, { authHandle, nvIndex }, { data: MARKER, offset: 0 });
  await tpm.close();
}

interface Recording {
  readonly client: PeerMessage[];
  readonly server: PeerMessage[];
  readonly bytes: Buffer;
}

/** Of the connection on which the state went. */
function readRecording({ connections }: TlsRecorder, log: string): Recording {
  for (const connection of connections) {
    const plain = openTls(connection, log);
    const [client, server] = [plain.client, plain.server].map((bytes) =>
      grpcMessages(bytes).map((message) => decode('PeerMessage', message)),
    ) as [PeerMessage[], PeerMessage[]];
    if (client.some(({ type }) => type === 'STATE')) {
      return { client, server, bytes: Buffer.concat([plain.client, plain.server]) };
    }
  }
  throw new Error('no state was recorded');
}

/** The transcript that the state key is over, as whoever recorded all of it makes it. */
function follow(client: readonly PeerMessage[], server: readonly PeerMessage[], binding: Buffer) {
  const said = (messages: readonly PeerMessage[], type: PeerMessage['type']): PeerMessage => {
    const message = messages.find((other) => other.type === type);
    assert.ok(message, `no ${type} was recorded`);
    return message;
  };
  const transcript = new Transcript(binding);
  const [hello, offer] = [said(client, 'HELLO'), said(server, 'OFFER')];
  for (const message of [
    hello,
    offer,
    said(server, 'EVIDENCE'),
    said(client, 'EVIDENCE'),
    said(client, 'SECRET'),
  ]) {
    transcript.add(message);
  }
  return {
    transcript: transcript.digest,
    hello: decode('MigrationHello', hello.payload),
    offer: decode('MigrationOffer', offer.payload),
    state: said(client, 'STATE').payload,
  };
}

function leakedSecrets(text: string, transcript: Buffer): { unwrapped: Buffer; shared: Buffer } {
  const line = text.split('\n').find((other) => other.startsWith(transcript.toString('hex')));
  assert.ok(line, 'the state key was not made of 64 bytes and the transcript');
  const input = Buffer.from(line.split(' ')[1] ?? '', 'hex');
  return { unwrapped: input.subarray(0, 32), shared: input.subarray(32) };
}
