import { randomBytes } from 'node:crypto';
import { request } from 'node:http';
import grpc from '@grpc/grpc-js';
import { bootId, monotonicMs, type Paths } from 'vtpm-common';
import {
  decode,
  encode,
  MIGRATE_PATH,
  type MigrateCommand,
  type MigrateMode,
  type MigratePhase,
  type MigrateProgress,
  signMigrateOrder,
  uuidToBytes,
} from 'vtpm-proto';
import { MANAGER_ID, OTHER_HOST, toolstackKey } from './supervisor-fixture.js';

type Call = grpc.ServerDuplexStream<MigrateCommand, MigrateProgress>;
type CommandName = keyof MigrateCommand;

/** One order at the manager, in the hands of a test. */
export class OrderedCall {
  readonly commands: CommandName[] = [];
  readonly closed: Promise<void>;
  readonly #call: Call;
  readonly #waiters: { name: CommandName; resolve: () => void }[] = [];

  constructor(call: Call) {
    this.#call = call;
    this.closed = new Promise((resolve) => call.on('close', () => resolve()));
    call.on('error', () => {});
    call.on('data', (command: MigrateCommand) => {
      for (const name of ['order', 'reaped', 'cancel'] as const) {
        if (!command[name]) continue;
        this.commands.push(name);
        for (const waiter of this.#waiters.filter((one) => one.name === name)) waiter.resolve();
      }
    });
  }

  /** Resolves when it was said, once or more. */
  async heard(name: CommandName): Promise<void> {
    if (this.commands.includes(name)) return;
    await new Promise<void>((resolve) => this.#waiters.push({ name, resolve }));
  }

  say(phase: MigratePhase, more: Partial<MigrateProgress> = {}): void {
    const none = {
      bytesSent: 0n,
      bytesTotal: 0n,
      downtimeUs: 0n,
      elapsedUs: 1n,
      reason: '',
      message: '',
      checks: [],
    };
    this.#call.write({ ...none, phase, ...more });
  }

  end(phase: MigratePhase, more: Partial<MigrateProgress> = {}): void {
    this.say(phase, more);
    this.#call.end();
  }

  refuse(code: grpc.status, reason: string, message: string): void {
    const metadata = new grpc.Metadata();
    metadata.set('vtpm-reason', reason);
    this.#call.emit('error', { code, details: message, metadata });
  }
}

/** Migrate on the toolstack's socket, on the real gRPC library. */
export class StubToolstackSocket {
  readonly #server = new grpc.Server();
  readonly #calls: OrderedCall[] = [];
  #waiting: ((call: OrderedCall) => void)[] = [];

  async start(paths: Paths): Promise<void> {
    const method = {
      path: MIGRATE_PATH,
      requestStream: true,
      responseStream: true,
      requestSerialize: (value: MigrateCommand) => encode('MigrateCommand', value),
      requestDeserialize: (bytes: Buffer) => decode('MigrateCommand', bytes),
      responseSerialize: (value: MigrateProgress) => encode('MigrateProgress', value),
      responseDeserialize: (bytes: Buffer) => decode('MigrateProgress', bytes),
    };
    this.#server.addService(
      { Migrate: method },
      {
        Migrate: (call: Call) => {
          const ordered = new OrderedCall(call);
          const waiting = this.#waiting.shift();
          if (waiting) waiting(ordered);
          else this.#calls.push(ordered);
        },
      },
    );
    await new Promise<void>((resolve, reject) => {
      const address = `unix:${paths.manager.toolstackSocket}`;
      this.#server.bindAsync(address, grpc.ServerCredentials.createInsecure(), (error) =>
        error ? reject(error) : resolve(),
      );
    });
  }

  next(): Promise<OrderedCall> {
    const call = this.#calls.shift();
    return call ? Promise.resolve(call) : new Promise((resolve) => this.#waiting.push(resolve));
  }

  stop(): void {
    this.#server.forceShutdown();
  }
}

export interface TestOrder {
  readonly migration: string;
  /** Body of POST /vtpms/:vtpm/migrate. */
  readonly body: { readonly order: string };
}

/** An order as vtpmctl signs it. */
export function testOrder(
  vtpm: { readonly id: string; readonly vmUuid: string },
  mode: MigrateMode,
  dryRun = false,
): TestOrder {
  const migrationId = randomBytes(16);
  const signed = signMigrateOrder(toolstackKey, {
    format: 1,
    managerId: Buffer.from(MANAGER_ID, 'hex'),
    toolstackKey: toolstackKey.publicKey,
    vtpmUuid: uuidToBytes(vtpm.id),
    vmUuid: uuidToBytes(vtpm.vmUuid),
    destination: Buffer.from(OTHER_HOST, 'hex'),
    expectedEpoch: 1n,
    leastGeneration: 1n,
    migrationId,
    bootId: bootId(),
    expiresAtMonotonicMs: monotonicMs() + 60_000n,
    mode,
    dryRun,
    description: Buffer.from('{}'),
  });
  return {
    migration: migrationId.toString('hex'),
    body: { order: encode('SignedMigrateOrder', signed).toString('base64') },
  };
}

/** The lines of an answer, as they come. */
export class Lines {
  readonly all: Record<string, unknown>[] = [];
  readonly ended: Promise<number>;
  #wake: () => void = () => {};

  constructor(socketPath: string, path: string, body: object) {
    this.ended = new Promise((resolve, reject) => {
      const call = request({ socketPath, method: 'POST', path, agent: false }, async (response) => {
        let pending = '';
        for await (const chunk of response.setEncoding('utf8') as AsyncIterable<string>) {
          const lines = (pending + chunk).split('\n');
          pending = lines.pop() ?? '';
          for (const line of lines) this.all.push(JSON.parse(line) as Record<string, unknown>);
          this.#wake();
        }
        resolve(response.statusCode ?? 0);
      });
      call.on('error', reject);
      call.end(JSON.stringify(body));
    });
  }

  async phase(name: string): Promise<Record<string, unknown>> {
    for (;;) {
      const found = this.all.find(({ phase }) => phase === name);
      if (found) return found;
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
  }
}
