import { randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { type SigningKey, signDelegation, signingKeyFromSeed, uuidToBytes } from 'vtpm-proto';
import type { Installation } from '../support/installation.js';
import { getRandom } from '../support/tpm-commands.js';
import { until } from '../support/until.js';
import { BlockingClient } from './blocking-client.js';

/** A worker made ahead takes a tenth of a second of a processor, and there may be forty and other work. */
const POOL_LIMIT_MS = 180_000;

/** Starts by the supervisor's API, with as little of a client as there can be. */
export class OwnStarts {
  readonly #toolstack: SigningKey;
  readonly #supervisor: string;
  #delegateKey: Buffer | undefined;
  #count = 0;

  constructor(private readonly installation: Installation) {
    this.#toolstack = signingKeyFromSeed(readFileSync(installation.paths.toolstack.key));
    this.#supervisor = installation.paths.supervisor.socket;
  }

  newName(): string {
    this.#count++;
    return `start-${this.#count}`;
  }

  /** As a toolstack does it, which keeps the key and needs no program for it. */
  async register(name: string): Promise<string> {
    this.#delegateKey ??= Buffer.from(
      String((await this.installation.supervisord('GET', '/health')).body.delegateKey),
      'hex',
    );
    const [id, vmUuid] = [randomUUID(), randomUUID()];
    const { delegation, signature } = signDelegation(this.#toolstack, {
      format: 1,
      toolstackKey: this.#toolstack.publicKey,
      delegateKey: this.#delegateKey,
      vtpmUuid: uuidToBytes(id),
      vmUuid: uuidToBytes(vmUuid),
      verbs: ['MANUFACTURE', 'COLD', 'RESUME'],
    });
    this.ask('POST', '/vtpms', {
      ...{ id, name, vmUuid, isolation: 'sandbox', autostart: false, startup: 'clear' },
      delegation: delegation.toString('base64'),
      delegationSignature: signature.toString('base64'),
    });
    return name;
  }

  /** @returns milliseconds from the request to the answer to the first command */
  start(name: string): number {
    const begin = performance.now();
    this.ask('POST', `/vtpms/${name}/start`);
    this.use(name);
    return performance.now() - begin;
  }

  /** One command. */
  use(name: string): void {
    const client = new BlockingClient(this.installation.door(name));
    client.succeed(getRandom());
    client.close();
  }

  stop(name: string): void {
    this.ask('POST', `/vtpms/${name}/stop`);
  }

  /** The supervisor's entry; what the manager has of it stays. */
  forget(name: string): void {
    this.ask('DELETE', `/vtpms/${name}`);
  }

  ask(method: string, path: string, body?: unknown): string {
    const client = this.begin(method, path, body);
    const answer = client.answered();
    client.close();
    return answer;
  }

  /** To be asked for its answer and closed. */
  begin(method: string, path: string, body?: unknown): BlockingClient {
    const client = new BlockingClient(this.#supervisor);
    client.call(method, path, body === undefined ? undefined : JSON.stringify(body));
    return client;
  }

  /** Resolves when as many workers wait as there shall be. */
  async poolIsFull(): Promise<void> {
    await until(
      'the pool is full',
      async () => {
        const { pool } = (await this.installation.supervisord('GET', '/health')).body as {
          pool: { idle: number; target: number };
        };
        return pool.idle === pool.target ? pool : undefined;
      },
      POOL_LIMIT_MS,
    );
  }
}
