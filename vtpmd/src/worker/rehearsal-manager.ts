import { createHash, randomBytes } from 'node:crypto';
import { performServerHandshake, type ServerHttp2Stream } from 'node:http2';
import type { Duplex } from 'node:stream';
import {
  type BoxKeyPair,
  decode,
  encode,
  frameMessage,
  LOAD_PATH,
  MessageReader,
  openBox,
  type SessionCipher,
  sealBox,
  sessionCipher,
  type WorkerFrame,
} from 'vtpm-proto';

/**
 * The manager's half of a rehearsal: it lets a new TPM be made for whoever asks, or has one, and acknowledges what it gets
 * without keeping it. It believes everything, and nobody but this process can reach it.
 */
export function playManager(
  stream: Duplex,
  keys: BoxKeyPair,
  workerKey: Uint8Array,
  kept: KeptTpm | undefined,
): void {
  const part = new RehearsalManager(keys, workerKey, kept);
  performServerHandshake(stream).on('stream', (call, headers) => {
    const reader = new MessageReader();
    const isLoad = headers[':path'] === LOAD_PATH;
    call.respond({ ':status': 200, 'content-type': 'application/grpc' }, { waitForTrailers: true });
    call.on('wantTrailers', () => call.sendTrailers({ 'grpc-status': '0' }));
    call.on('error', () => {});
    call.on('data', (chunk: Buffer) => {
      for (const message of reader.push(chunk)) {
        if (isLoad) part.load(call, message);
        else part.save(call, decode('WorkerFrame', message));
      }
    });
  });
}

/** A TPM that was made before. */
export interface KeptTpm {
  readonly permanent: Buffer;
  /** A serialised SuspendedState, of one that comes from another host. */
  readonly suspended?: Buffer;
}

const EPOCH = 1n;

class RehearsalManager {
  readonly #sessionKey = randomBytes(32);
  readonly #sessionId = randomBytes(16);
  readonly #cipher: SessionCipher;
  #generation = 0n;

  constructor(
    private readonly keys: BoxKeyPair,
    private readonly workerKey: Uint8Array,
    private readonly kept: KeptTpm | undefined,
  ) {
    if (kept) this.#generation = 1n;
    this.#cipher = sessionCipher(this.#sessionKey, this.#sessionId, EPOCH);
  }

  load(call: ServerHttp2Stream, message: Buffer): void {
    const { loadId } = openBox('LoadClaim', decode('LoadRequest', message), this.workerKey, this.keys);
    const { permanent = new Uint8Array(0), suspended } = this.kept ?? {};
    const grant = {
      loadId,
      sessionId: this.#sessionId,
      sessionKey: this.#sessionKey,
      epoch: EPOCH,
      generation: this.#generation,
      permanent,
      manufacture: !this.kept,
      checkpointKey: new Uint8Array(0),
      arrived: suspended !== undefined,
      ...(suspended && {
        suspended: {
          volatile: suspended,
          referenceDigest: new Uint8Array(32),
          generation: this.#generation,
        },
      }),
    };
    const answer = sealBox('LoadGrant', grant, this.workerKey, this.keys);
    call.end(frameMessage(encode('LoadResponse', answer)));
  }

  save(call: ServerHttp2Stream, frame: WorkerFrame): void {
    const payload = this.#cipher.openWorker(frame);
    const isSave = frame.type === 'SAVE';
    if (isSave) this.#generation++;
    const ack = encode('Ack', {
      generation: this.#generation,
      digest: isSave ? createHash('sha256').update(payload).digest() : new Uint8Array(0),
      committed: isSave ? frame.sequence : 0n,
    });
    const answer = this.#cipher.sealManager('ACK', frame.sequence, ack);
    call.write(frameMessage(encode('ManagerFrame', answer)));
  }
}
