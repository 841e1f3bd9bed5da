import type { ServerDuplexStream } from '@grpc/grpc-js';
import type { Logger } from 'vtpm-common';
import { encode, type MigrateCommand } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { MigrationControl } from '../migration/control.js';
import type { SourceProgress } from '../migration/order-progress.js';
import { readMessage } from './messages.js';
import { refusal, statusOf } from './status.js';

/** Milliseconds until the order must be there. */
const ORDER_MS = 10_000;
/** An order, `reaped` and `cancel`: what says more makes no sense. */
const MAX_COMMANDS = 8;
/** An order and its description. */
const MAX_COMMAND_BYTES = 32 * 1024;

type Call = ServerDuplexStream<Buffer, Buffer>;

/** What the toolstack's calls need. */
export type ToolstackService = Pick<MigrationControl, 'migrate'>;

/** One Migrate: the order first, then what the toolstack does and wants; progress until it has ended. */
export class MigrateCall {
  readonly #cancel = new AbortController();
  readonly #reaped: Promise<void>;
  #onReaped: () => void = () => undefined;
  #onLost: (error: ManagerError) => void = () => undefined;
  #commands = 0;
  #isOver = false;
  #timer: NodeJS.Timeout | undefined;

  constructor(
    private readonly call: Call,
    private readonly service: () => ToolstackService,
    private readonly log: Logger,
  ) {
    this.#reaped = new Promise((resolve, reject) => {
      this.#onReaped = resolve;
      this.#onLost = reject;
    });
    this.#reaped.catch(() => undefined);
  }

  serve(): void {
    this.#timer = setTimeout(
      () => this.#refuse(new ManagerError('bad-request', `no order within ${ORDER_MS} ms`)),
      ORDER_MS,
    );
    this.call.on('data', (bytes: Buffer) => {
      try {
        this.#take(bytes);
      } catch (error) {
        this.#refuse(error);
      }
    });
    const lost = (): void => {
      clearTimeout(this.#timer);
      // Whether its worker has ended nobody will say any more; before the freeze it is as if it was cancelled.
      this.#onLost(new ManagerError('migration-aborted', 'the toolstack that gave the order is gone'));
      if (!this.#isOver) this.#cancel.abort();
    };
    this.call.once('cancelled', lost);
    this.call.once('close', lost);
    this.call.once('end', () =>
      this.#onLost(new ManagerError('migration-aborted', 'the toolstack says no more')),
    );
    this.call.on('error', () => undefined);
  }

  #take(bytes: Buffer): void {
    if (this.#isOver) return;
    this.#commands += 1;
    if (this.#commands > MAX_COMMANDS || bytes.length > MAX_COMMAND_BYTES) {
      throw new ManagerError('too-large', 'more than an order and its answers');
    }
    const command = readMessage('MigrateCommand', bytes);
    if (this.#commands === 1) {
      this.#begin(command);
      return;
    }
    if (command.reaped) this.#onReaped();
    if (command.cancel) this.#cancel.abort();
    if (command.order) throw new ManagerError('bad-request', 'one order for each call');
  }

  #begin({ order }: MigrateCommand): void {
    clearTimeout(this.#timer);
    if (!order) throw new ManagerError('bad-request', 'the first command is the order');
    const progress = (value: SourceProgress): void => {
      if (!this.#isOver) this.call.write(encode('MigrateProgress', value));
    };
    this.service()
      .migrate(order, { progress, reaped: this.#reaped }, this.#cancel)
      .then(
        () => this.#end(() => this.call.end()),
        (error: unknown) => this.#refuse(error),
      );
  }

  #refuse(error: unknown): void {
    const reason = refusal(error);
    this.#cancel.abort();
    this.#end(() => {
      this.log.warn({ reason: reason.code }, `an order is refused: ${reason.message}`);
      this.call.emit('error', statusOf(reason));
    });
  }

  #end(how: () => void): void {
    if (this.#isOver) return;
    this.#isOver = true;
    clearTimeout(this.#timer);
    if (!this.call.cancelled) how();
  }
}
