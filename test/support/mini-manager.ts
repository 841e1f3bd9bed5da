import { createHash, randomBytes } from 'node:crypto';
import type { Socket } from 'node:net';
import grpc from '@grpc/grpc-js';
import { bootId, monotonicMs } from 'vtpm-common/clock';
import {
  type BoxKeyPair,
  boxKeyPair,
  bytesEqual,
  decode,
  encode,
  LOAD_PATH,
  type LoadGrant,
  type LoadRequest,
  type LoadResponse,
  type ManagerFrame,
  openBox,
  SAVE_PATH,
  type SessionCipher,
  type StateUse,
  sealBox,
  sessionCipher,
  signDelegation,
  signingKeyFromSeed,
  signTicket,
  type Ticket,
  uuidToBytes,
  type Verb,
  verifyTicketChain,
  type WorkerFrame,
} from 'vtpm-proto';

export const VTPM = 'b5a3f0a2-7d0e-4a43-9a6e-2f1c4d5e6f70';

interface Committed {
  readonly permanent: Buffer;
  readonly digest: Buffer;
  /** The TPM is suspended. */
  readonly volatile?: Buffer | undefined;
  readonly use?: StateUse | undefined;
  readonly vmRunId?: Uint8Array;
}

type SaveCall = grpc.ServerDuplexStream<WorkerFrame, ManagerFrame>;

/**
 * The manager's side of Load and Save on the real gRPC library, with its records in memory. It lets a test hold
 * acknowledgements, cut links and say what a manager says rarely.
 */
export class MiniManager {
  readonly keys: BoxKeyPair = boxKeyPair();
  /** Of the one VM run that there is. */
  checkpointKey: Buffer = randomBytes(32);
  /** Committed saves of the session, oldest first. */
  readonly saves: Committed[] = [];
  referenceKey: Buffer = randomBytes(32);
  epoch = 0n;
  /** The next Load must name the reference that the TPM is suspended under: nothing else is decided. */
  awaitsReference = false;
  /** Frames as they came. */
  readonly received: WorkerFrame['type'][] = [];
  /** While true, saves are neither committed nor acknowledged. */
  holdSaves = false;
  /** While true, saves are committed, and not acknowledged. */
  holdAcks = false;
  refuseLoad: { code: grpc.status; reason: string } | undefined;
  /** Makes each acknowledgement name another digest. */
  lieAboutDigest = false;
  readonly #server = new grpc.Server();
  #injector: grpc.ConnectionInjector | undefined;
  #cipher: SessionCipher | undefined;
  #sessionId = Buffer.alloc(16);
  #vmRunId: Uint8Array = Buffer.alloc(16);
  #call: SaveCall | undefined;
  #held: { sequence: bigint; body: Buffer }[] = [];
  #committed = 0n;
  #controlFrames = 0n;
  #baseGeneration = 0n;
  #wasLoaded: () => void = () => {};
  /** Resolves with the first Load that is granted. */
  readonly loaded = new Promise<void>((resolve) => {
    this.#wasLoaded = resolve;
  });
  readonly #sockets = new Set<Socket>();
  readonly #waiters: { type: WorkerFrame['type']; resolve: () => void }[] = [];

  constructor() {
    this.#server.addService(
      {
        Load: {
          path: LOAD_PATH,
          requestStream: false,
          responseStream: false,
          requestSerialize: (value: LoadRequest) => encode('LoadRequest', value),
          requestDeserialize: (bytes) => decode('LoadRequest', bytes),
          responseSerialize: (value: LoadResponse) => encode('LoadResponse', value),
          responseDeserialize: (bytes) => decode('LoadResponse', bytes),
        },
        Save: {
          path: SAVE_PATH,
          requestStream: true,
          responseStream: true,
          requestSerialize: (value: WorkerFrame) => encode('WorkerFrame', value),
          requestDeserialize: (bytes) => decode('WorkerFrame', bytes),
          responseSerialize: (value: ManagerFrame) => encode('ManagerFrame', value),
          responseDeserialize: (bytes) => decode('ManagerFrame', bytes),
        },
      },
      {
        Load: (
          call: grpc.ServerUnaryCall<LoadRequest, LoadResponse>,
          done: grpc.sendUnaryData<LoadResponse>,
        ) => this.#load(call.request, done),
        Save: (call: SaveCall) => this.#save(call),
      },
    );
    this.#injector = this.#server.createConnectionInjector(grpc.ServerCredentials.createInsecure());
  }

  /** Takes a connected socket as the manager's end of a link. */
  accept(socket: Socket): void {
    this.#sockets.add(socket);
    socket.on('close', () => this.#sockets.delete(socket));
    this.#injector?.injectConnection(socket);
  }

  identity(
    publicKey: string,
    startup: 'clear' | 'none' = 'clear',
    verbs: readonly Verb[] = ['MANUFACTURE', 'COLD'],
    vmRunId: Buffer = randomBytes(16),
  ) {
    const toolstack = signingKeyFromSeed(randomBytes(32));
    const delegate = signingKeyFromSeed(randomBytes(32));
    const vtpmUuid = uuidToBytes(VTPM);
    const vmUuid = randomBytes(16);
    const signed = signDelegation(toolstack, {
      format: 1,
      toolstackKey: toolstack.publicKey,
      delegateKey: delegate.publicKey,
      vtpmUuid,
      vmUuid,
      verbs: [...verbs],
    });
    const ticket = signTicket(
      delegate,
      {
        format: 1,
        managerId: this.keys.publicKey,
        vtpmUuid,
        vmUuid,
        vmRunId,
        workerPublicKey: Buffer.from(publicKey, 'hex'),
        imageDigest: randomBytes(32),
        isolation: 'none',
        expectedEpoch: this.epoch,
        verbs: [...verbs],
        bootId: bootId(),
        expiresAtMonotonicMs: monotonicMs() + 60_000n,
      },
      signed,
    );
    return {
      type: 'identity',
      ticket: encode('SignedTicket', ticket).toString('base64'),
      managerKey: Buffer.from(this.keys.publicKey).toString('hex'),
      startup,
    };
  }

  /** Resolves when the next frame of this type came. */
  next(type: WorkerFrame['type']): Promise<void> {
    return new Promise((resolve) => this.#waiters.push({ type, resolve }));
  }

  /** Commits and acknowledges what `holdSaves` or `holdAcks` kept back. */
  release(): void {
    this.holdSaves = this.holdAcks = false;
    for (const { sequence, body } of this.#held.splice(0)) {
      if (sequence > this.#committed) this.#commit(sequence, body);
      this.#acknowledge(sequence);
    }
  }

  /** Its vTPM is another manager's from now on. */
  moveTo(destination: MiniManager): void {
    destination.saves.push(...this.saves);
    destination.referenceKey = this.referenceKey;
    destination.awaitsReference = true;
  }

  /** Breaks every link. */
  cut(): void {
    this.#held = [];
    this.#call = undefined;
    for (const socket of this.#sockets) socket.destroy();
  }

  send(type: 'FREEZE' | 'THAW', suspend = false): void {
    const payload = suspend ? encode('Freeze', { suspend }) : new Uint8Array(0);
    this.#write(type, ++this.#controlFrames, payload);
  }

  fence(reason: string): void {
    this.#write(
      'FENCED',
      ++this.#controlFrames,
      encode('Fenced', { reason, message: 'another epoch owns the vTPM' }),
    );
  }

  stop(): void {
    this.cut();
    this.#server.forceShutdown();
  }

  #load(request: LoadRequest, done: grpc.sendUnaryData<LoadResponse>): void {
    if (this.refuseLoad) {
      const metadata = new grpc.Metadata();
      metadata.set('vtpm-reason', this.refuseLoad.reason);
      done({ code: this.refuseLoad.code, details: `${this.refuseLoad.reason}: not today – é`, metadata });
      return;
    }
    const { ticket } = verifyTicketChain(request.ticket!);
    const claim = openBox('LoadClaim', request, ticket.workerPublicKey, this.keys);
    if (this.awaitsReference && !isSame(claim.referenceDigest, this.saves.at(-1)?.use?.digest)) {
      const metadata = new grpc.Metadata();
      metadata.set('vtpm-reason', 'wrong-reference');
      done({ code: grpc.status.FAILED_PRECONDITION, details: 'another reference', metadata });
      return;
    }
    this.epoch++;
    this.#sessionId = randomBytes(16);
    const sessionKey = randomBytes(32);
    this.#cipher = sessionCipher(sessionKey, this.#sessionId, this.epoch);
    this.#committed = 0n;
    this.#baseGeneration = BigInt(this.saves.length);
    const grant: Omit<LoadGrant, 'direction'> = {
      loadId: claim.loadId,
      sessionId: this.#sessionId,
      sessionKey,
      epoch: this.epoch,
      generation: this.#baseGeneration,
      permanent: this.saves.at(-1)?.permanent ?? Buffer.alloc(0),
      manufacture: this.saves.length === 0,
      checkpointKey: this.checkpointKey,
      referenceKey: this.referenceKey,
      arrived: false,
      ...this.#suspended(ticket),
    };
    this.#vmRunId = ticket.vmRunId;
    this.awaitsReference = false;
    this.#wasLoaded();
    done(null, sealBox('LoadGrant', grant, ticket.workerPublicKey, this.keys));
  }

  #suspended({ verbs, vmRunId }: Ticket): Pick<LoadGrant, 'suspended'> & Partial<Pick<LoadGrant, 'arrived'>> {
    const last = this.saves.at(-1);
    if (!last?.volatile || !last.use || !verbs.includes('RESUME')) return {};
    const { volatile, use } = last;
    return {
      suspended: { volatile, referenceDigest: use.digest, generation: this.#baseGeneration },
      arrived: last.vmRunId !== undefined && bytesEqual(last.vmRunId, vmRunId),
    };
  }

  #save(call: SaveCall): void {
    call.on('error', () => {});
    call.on('end', () => call.end());
    call.on('data', (frame: WorkerFrame) => {
      const payload = this.#cipher!.openWorker(frame);
      this.received.push(frame.type);
      if (frame.type === 'HELLO' || frame.type === 'RESUME') {
        this.#call = call;
        this.#acknowledge(frame.sequence);
      } else if (frame.type === 'SAVE') {
        const held = { sequence: frame.sequence, body: payload };
        if (!this.holdSaves) this.#commit(held.sequence, held.body);
        if (this.holdSaves || this.holdAcks) this.#held.push(held);
        else this.#acknowledge(frame.sequence);
      }
      for (const waiter of this.#waiters.filter(({ type }) => type === frame.type)) {
        this.#waiters.splice(this.#waiters.indexOf(waiter), 1);
        waiter.resolve();
      }
    });
  }

  #commit(sequence: bigint, body: Buffer): void {
    const { permanent, volatile, use } = decode('SaveBody', body);
    this.saves.push({
      permanent: Buffer.from(permanent!),
      digest: createHash('sha256').update(body).digest(),
      volatile: volatile && Buffer.from(volatile),
      ...{ use, vmRunId: this.#vmRunId },
    });
    this.#committed = sequence;
  }

  #acknowledge(sequence: bigint): void {
    const digest = this.#committed > 0n ? this.saves.at(-1)!.digest : Buffer.alloc(0);
    const ack = {
      generation: this.#baseGeneration + this.#committed,
      digest: this.lieAboutDigest ? randomBytes(32) : digest,
      committed: this.#committed,
    };
    this.#write('ACK', sequence, encode('Ack', ack));
  }

  #write(type: ManagerFrame['type'], sequence: bigint, payload: Uint8Array): void {
    this.#call?.write(this.#cipher!.sealManager(type, sequence, payload));
  }
}

function isSame(one: Uint8Array | undefined, other: Uint8Array | undefined): boolean {
  return one !== undefined && other !== undefined && Buffer.from(one).equals(other);
}
