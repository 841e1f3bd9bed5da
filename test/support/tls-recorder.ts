import { createDecipheriv, createHmac } from 'node:crypto';
import { once } from 'node:events';
import { connect, createServer, type Socket } from 'node:net';

/** One TCP connection as somebody on the way recorded it. */
export interface RecordedConnection {
  readonly client: Buffer[];
  readonly server: Buffer[];
}

/** Somebody on the way: hands on what comes to `port`, and keeps it. */
export interface TlsRecorder {
  readonly port: number;
  readonly connections: readonly RecordedConnection[];
  close(): Promise<void>;
}

export async function startTlsRecorder(target: { host: string; port: number }): Promise<TlsRecorder> {
  const connections: RecordedConnection[] = [];
  const open = new Set<Socket>();
  const server = createServer((client) => {
    const there = connect(target);
    const recorded: RecordedConnection = { client: [], server: [] };
    connections.push(recorded);
    for (const [from, to, chunks] of [
      [client, there, recorded.client],
      [there, client, recorded.server],
    ] as const) {
      open.add(from);
      from.on('data', (chunk: Buffer) => chunks.push(chunk));
      from.pipe(to);
      from.on('error', () => to.destroy());
      from.on('close', () => {
        open.delete(from);
        to.destroy();
      });
    }
  }).listen(0, '127.0.0.1');
  await once(server, 'listening');
  return {
    port: (server.address() as { port: number }).port,
    connections,
    async close() {
      for (const socket of open) socket.destroy();
      server.close();
      await once(server, 'close');
    },
  };
}

const RANDOM = { offset: 11, bytes: 32 };
const HANDSHAKE = 22;
const APPLICATION_DATA = 23;
/** RFC 8446, appendix B.4. */
const SUITES: Readonly<Record<number, { cipher: 'aes-128-gcm' | 'aes-256-gcm'; hash: string; key: number }>> =
  {
    4865: { cipher: 'aes-128-gcm', hash: 'sha256', key: 16 },
    4866: { cipher: 'aes-256-gcm', hash: 'sha384', key: 32 },
  };

/**
 * What the two ends said to each other, of a TLS 1.3 connection whose traffic secrets are known.
 * @param keyLog lines as SSLKEYLOGFILE has them @throws Error where a record does not open
 */
export function openTls(
  { client, server }: RecordedConnection,
  keyLog: string,
): { client: Buffer; server: Buffer } {
  const [sent, received] = [recordsOf(Buffer.concat(client)), recordsOf(Buffer.concat(server))];
  const [hello, answer] = [sent[0]?.body, received[0]?.body];
  if (!hello || !answer) throw new Error('no handshake was recorded');
  const random = hello.subarray(RANDOM.offset - 5, RANDOM.offset - 5 + RANDOM.bytes).toString('hex');
  const sessionId = answer.readUInt8(38);
  const suite = SUITES[answer.readUInt16BE(39 + sessionId)];
  if (!suite) throw new Error('a cipher suite that this test does not know');
  const secret = (label: string): Buffer => {
    const line = keyLog.split('\n').find((text) => text.startsWith(`${label} ${random} `));
    if (!line) throw new Error(`the key log has no ${label}`);
    return Buffer.from(line.split(' ')[2] ?? '', 'hex');
  };
  const open = (side: 'CLIENT' | 'SERVER', records: TlsRecord[]): Buffer => {
    const secrets = [secret(`${side}_HANDSHAKE_TRAFFIC_SECRET`), secret(`${side}_TRAFFIC_SECRET_0`)];
    let opener = recordOpener(secrets.shift() as Buffer, suite);
    const plain: Buffer[] = [];
    for (const record of records.filter(({ type }) => type === APPLICATION_DATA)) {
      let opened = opener(record);
      const next = secrets[0];
      if (!opened && next) {
        secrets.shift();
        opener = recordOpener(next, suite);
        opened = opener(record);
      }
      if (!opened) throw new Error('a record does not open');
      if (opened.type === APPLICATION_DATA) plain.push(opened.body);
    }
    return Buffer.concat(plain);
  };
  return { client: open('CLIENT', sent), server: open('SERVER', received) };
}

interface TlsRecord {
  readonly type: number;
  readonly head: Buffer;
  readonly body: Buffer;
}

/** RFC 8446, section 5.1. The last one may be cut off. */
function recordsOf(bytes: Buffer): TlsRecord[] {
  const records: TlsRecord[] = [];
  for (let at = 0; at + 5 <= bytes.length; ) {
    const end = at + 5 + bytes.readUInt16BE(at + 3);
    if (end > bytes.length) break;
    records.push({
      type: bytes.readUInt8(at),
      head: bytes.subarray(at, at + 5),
      body: bytes.subarray(at + 5, end),
    });
    at = end;
  }
  if (records[0]?.type !== HANDSHAKE) throw new Error('this is not TLS');
  return records;
}

/** RFC 8446, sections 5.2, 5.3 and 7.3. The opener gives undefined for a record under another key. */
function recordOpener(
  secret: Buffer,
  suite: { cipher: 'aes-128-gcm' | 'aes-256-gcm'; hash: string; key: number },
): (record: TlsRecord) => { type: number; body: Buffer } | undefined {
  const key = expandLabel(secret, suite.hash, 'key', suite.key);
  const iv = expandLabel(secret, suite.hash, 'iv', 12);
  let sequence = 0n;
  return ({ head, body }) => {
    const nonce = Buffer.from(iv);
    nonce.writeBigUInt64BE(nonce.readBigUInt64BE(4) ^ sequence, 4);
    const decipher = createDecipheriv(suite.cipher, key, nonce).setAAD(head).setAuthTag(body.subarray(-16));
    const inner = decipher.update(body.subarray(0, -16));
    try {
      decipher.final();
    } catch {
      return undefined;
    }
    sequence++;
    let end = inner.length - 1;
    while (inner[end] === 0) end--;
    return { type: inner[end] ?? 0, body: inner.subarray(0, end) };
  };
}

/** HKDF-Expand-Label with no context (RFC 8446, section 7.1); one block of the hash is enough. */
function expandLabel(secret: Buffer, hash: string, label: string, bytes: number): Buffer {
  const name = Buffer.from(`tls13 ${label}`);
  const info = Buffer.concat([Buffer.from([0, bytes, name.length]), name, Buffer.from([0, 1])]);
  return createHmac(hash, secret).update(info).digest().subarray(0, bytes);
}

const DATA = 0;
const PREFACE = 'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n';

/** The gRPC messages of one direction of an HTTP/2 connection (RFC 9113, section 4.1), of all its streams in order. */
export function grpcMessages(bytes: Buffer): Buffer[] {
  let at = bytes.subarray(0, PREFACE.length).toString('latin1') === PREFACE ? PREFACE.length : 0;
  const data: Buffer[] = [];
  while (at + 9 <= bytes.length) {
    const length = bytes.readUIntBE(at, 3);
    // grpc-js pads nothing.
    if (bytes.readUInt8(at + 3) === DATA) data.push(bytes.subarray(at + 9, at + 9 + length));
    at += 9 + length;
  }
  const stream = Buffer.concat(data);
  const messages: Buffer[] = [];
  for (let from = 0; from + 5 <= stream.length; ) {
    const end = from + 5 + stream.readUInt32BE(from + 1);
    messages.push(stream.subarray(from + 5, end));
    from = end;
  }
  return messages;
}
