import { createHash, randomBytes, randomUUID } from 'node:crypto';
import { Client, type ClientDuplexStream, credentials, type ServiceError } from '@grpc/grpc-js';
import { bootId, monotonicMs } from 'vtpm-common';
import {
  type Ack,
  type BoxKeyPair,
  boxKeyPair,
  decode,
  encode,
  LOAD_PATH,
  type LoadGrant,
  type LoadRequest,
  type ManagerFrame,
  openBox,
  SAVE_PATH,
  type SaveBody,
  type SessionCipher,
  type SignedTicket,
  type SigningKey,
  sealBox,
  sessionCipher,
  signDelegation,
  signingKeyFromSeed,
  signTicket,
  type Ticket,
  ticketDigest,
  uuidToBytes,
  type Verb,
  type WorkerFrame,
} from 'vtpm-proto';

const ALL_VERBS: Verb[] = ['MANUFACTURE', 'COLD', 'RESUME', 'IMPORT', 'EXPORT'];

/** A vTPM with the VM it belongs to, as a test names it. */
export interface TestVtpm {
  readonly id: string;
  readonly uuid: Buffer;
  readonly vmUuid: Buffer;
}

export function testVtpm(id: string = randomUUID()): TestVtpm {
  return { id, uuid: uuidToBytes(id), vmUuid: randomBytes(16) };
}

/** A toolstack with its key, a delegate and one worker image: signs tickets for a manager. */
export class TestToolstack {
  readonly key: SigningKey;
  readonly delegateKey: SigningKey = signingKeyFromSeed(randomBytes(32));
  readonly imageDigest: Buffer;

  /** @param seed of a toolstack key that a manager trusts already @param imageDigest of an image it allows */
  constructor(seed: Uint8Array = randomBytes(32), imageDigest: Buffer = randomBytes(32)) {
    this.key = signingKeyFromSeed(seed);
    this.imageDigest = imageDigest;
  }

  /** A ticket that is good in everything that `changes` does not spoil. */
  ticket(
    managerId: Uint8Array,
    vtpm: TestVtpm,
    workerPublicKey: Uint8Array,
    changes: Partial<Ticket> & { delegatedVerbs?: Verb[] } = {},
  ): SignedTicket {
    const { delegatedVerbs = ALL_VERBS, ...fields } = changes;
    const delegation = signDelegation(this.key, {
      format: 1,
      toolstackKey: this.key.publicKey,
      delegateKey: this.delegateKey.publicKey,
      vtpmUuid: vtpm.uuid,
      vmUuid: vtpm.vmUuid,
      verbs: delegatedVerbs,
    });
    const ticket: Ticket = {
      format: 1,
      managerId,
      vtpmUuid: vtpm.uuid,
      vmUuid: vtpm.vmUuid,
      vmRunId: Buffer.alloc(16, 1),
      workerPublicKey,
      imageDigest: this.imageDigest,
      isolation: 'sandbox',
      expectedEpoch: 0n,
      verbs: ['MANUFACTURE'],
      bootId: bootId(),
      expiresAtMonotonicMs: monotonicMs() + 60_000n,
      ...fields,
    };
    return signTicket(this.delegateKey, ticket, delegation);
  }
}

/** A call that the manager refused. `reason` is the trailer `vtpm-reason`. */
export class RefusedError extends Error {
  override readonly name = 'RefusedError';
  readonly code: number;
  readonly reason: string | undefined;

  constructor(error: ServiceError) {
    super(error.message);
    this.code = error.code;
    this.reason = error.metadata.get('vtpm-reason')[0]?.toString();
  }
}

const pass = (bytes: Buffer): Buffer => bytes;

/** The request that a worker with `keys` makes of its ticket. */
export function loadRequest(
  managerId: Uint8Array,
  ticket: SignedTicket,
  keys: BoxKeyPair,
  referenceDigest?: Uint8Array,
): LoadRequest {
  const claim = {
    ticketDigest: ticketDigest(ticket),
    loadId: randomBytes(16),
    libtpmsVersion: '0.9.2',
    ...(referenceDigest && { referenceDigest }),
  };
  return { ticket, ...sealBox('LoadClaim', claim, managerId, keys) };
}

/** One connection of a worker, spoken over the real grpc-js client: what an honest or a hostile worker can send. */
export class WorkerClient {
  readonly #client: Client;

  constructor(
    socketPath: string,
    readonly managerId: Uint8Array,
    readonly keys: BoxKeyPair = boxKeyPair(),
  ) {
    this.#client = new Client(`unix:${socketPath}`, credentials.createInsecure(), {
      'grpc.use_local_subchannel_pool': 1,
      'grpc.enable_retries': 0,
      'grpc.max_send_message_length': -1,
    });
  }

  /** Any method, any bytes. @throws RefusedError */
  call(path: string, bytes: Buffer): Promise<Buffer> {
    return new Promise((resolve, reject) => {
      this.#client.makeUnaryRequest(path, pass, pass, bytes, (error, answer) => {
        if (error || !answer) reject(error ? new RefusedError(error) : new Error('no answer'));
        else resolve(answer);
      });
    });
  }

  /** An honest Load with this worker's key. @throws RefusedError */
  load(ticket: SignedTicket): Promise<LoadGrant> {
    return this.send(loadRequest(this.managerId, ticket, this.keys));
  }

  async send(request: LoadRequest): Promise<LoadGrant> {
    const answer = decode('LoadResponse', await this.call(LOAD_PATH, encode('LoadRequest', request)));
    return openBox('LoadGrant', answer, this.managerId, this.keys);
  }

  openStream(): SaveStreamClient {
    return new SaveStreamClient(
      this.#client.makeBidiStreamRequest(SAVE_PATH, pass, pass) as ClientDuplexStream<Buffer, Buffer>,
    );
  }

  /** A stream on which the session of `grant` has said HELLO and was answered. */
  async session(vtpm: TestVtpm, grant: LoadGrant): Promise<TestSession> {
    const session = new TestSession(vtpm, grant);
    await session.connect(this.openStream());
    return session;
  }

  close(): void {
    this.#client.close();
  }
}

/** A Save stream at the level of frames. */
export class SaveStreamClient {
  readonly #frames: ManagerFrame[] = [];
  readonly #waiting: ((frame: ManagerFrame | undefined) => void)[] = [];
  isOver = false;
  /** Resolves when the stream has ended: with the refusal, or undefined for OK. */
  readonly ended: Promise<RefusedError | undefined>;

  constructor(private readonly call: ClientDuplexStream<Buffer, Buffer>) {
    call.on('data', (bytes: Buffer) => {
      const frame = decode('ManagerFrame', bytes);
      const waiting = this.#waiting.shift();
      if (waiting) waiting(frame);
      else this.#frames.push(frame);
    });
    this.ended = new Promise((resolve) => {
      let refusal: RefusedError | undefined;
      call.on('error', (error: ServiceError) => {
        refusal = new RefusedError(error);
      });
      call.on('status', () => setImmediate(() => resolve(refusal)));
    });
    void this.ended.then(() => {
      this.isOver = true;
      for (const waiting of this.#waiting.splice(0)) waiting(undefined);
    });
  }

  send(frame: WorkerFrame): void {
    this.sendBytes(encode('WorkerFrame', frame));
  }

  sendBytes(bytes: Buffer): void {
    this.call.write(bytes);
  }

  /** The next frame. @throws the refusal where the stream ended instead */
  async next(): Promise<ManagerFrame> {
    const frame =
      this.#frames.shift() ??
      (await new Promise<ManagerFrame | undefined>((resolve) => this.#waiting.push(resolve)));
    if (frame) return frame;
    throw (await this.ended) ?? new Error('the stream ended');
  }

  /** Reads no more. */
  pause(): void {
    this.call.pause();
  }

  end(): void {
    this.call.end();
  }

  cancel(): void {
    this.call.cancel();
  }
}

/** What a worker keeps of its session over all links. */
export class TestSession {
  readonly cipher: SessionCipher;
  stream: SaveStreamClient | undefined;
  sequence = 0n;
  link = 0n;

  constructor(
    readonly vtpm: TestVtpm,
    readonly grant: LoadGrant,
  ) {
    this.cipher = sessionCipher(grant.sessionKey, grant.sessionId, grant.epoch);
  }

  /** HELLO on the first link, RESUME on later ones. */
  firstFrame(
    changes: Partial<{ lastSent: bigint; lastAcknowledged: bigint; link: bigint }> = {},
  ): WorkerFrame {
    const link = changes.link ?? ++this.link;
    const hello = encode('Hello', {
      lastSent: changes.lastSent ?? this.sequence,
      lastAcknowledged: changes.lastAcknowledged ?? this.sequence,
    });
    return this.cipher.sealWorker(link === 1n ? 'HELLO' : 'RESUME', link, hello, this.vtpm.uuid);
  }

  async connect(stream: SaveStreamClient): Promise<Ack> {
    this.stream = stream;
    stream.send(this.firstFrame());
    return await this.ack();
  }

  /** The next frame, which must be an ACK. */
  async ack(): Promise<Ack> {
    if (!this.stream) throw new Error('no stream');
    const frame = await this.stream.next();
    const payload = this.cipher.openManager(frame);
    if (frame.type !== 'ACK') throw new Error(`${frame.type} instead of ACK`);
    return decode('Ack', payload);
  }

  saveFrame(sequence: bigint, body: Partial<SaveBody>): WorkerFrame {
    return this.cipher.sealWorker('SAVE', sequence, saveBytes(body));
  }

  /** The next save of the session, acknowledged. */
  async save(body: Partial<SaveBody>): Promise<Ack> {
    this.sequence += 1n;
    this.stream?.send(this.saveFrame(this.sequence, body));
    return await this.ack();
  }
}

export function saveBytes(body: Partial<SaveBody>): Buffer {
  return encode('SaveBody', { libtpmsVersion: '0.9.2', ...body });
}

export function sha256(bytes: Uint8Array): Buffer {
  return createHash('sha256').update(bytes).digest();
}
