import { closeSync } from 'node:fs';
import { isDoorKind, type Visitor } from '../channels/doors.js';
import { Inherited, type Left } from '../checkpoint/left.js';
import type { ControlChannel, SupervisorMessage } from './control-channel.js';
import type { Log } from './log.js';

/** Who has the connections: a TPM's doors, one that is lost, or who stands in for one that is on its way. */
export interface Host {
  open(visitor: Visitor, onClosed: () => void): void;
  /** The data channel that was offered is not kept. */
  dataChannelRefused(): void;
}

/** The connections that the supervisor passes on, and whose they are. */
export class Visits {
  readonly #control: Pick<ControlChannel, 'send'>;
  readonly #log: Log;
  #host: Host | undefined;
  /** Connections that the worker before this one had. */
  #inherited: Inherited | undefined;

  constructor(control: Pick<ControlChannel, 'send'>, log: Log) {
    this.#control = control;
    this.#log = log;
  }

  /** Those that come from now on are its; undefined: they are refused. */
  set host(host: Host | undefined) {
    this.#host = host;
  }

  get host(): Host | undefined {
    return this.#host;
  }

  /** Resolves with all connections of the worker before this one. */
  async inherit(left: Left): Promise<readonly Visitor[]> {
    this.#inherited = new Inherited(left.resumes?.connections ?? 0);
    const visitors = await this.#inherited.all;
    this.#inherited = undefined;
    return visitors;
  }

  open({ door, id, peer, fd }: SupervisorMessage & { type: 'connection' }): void {
    const target = this.#host ?? this.#inherited;
    if (!target || !isDoorKind(door)) {
      closeSync(fd);
      this.#log('warn', 'a connection was refused', { door, id });
      this.closed(id);
      return;
    }
    target.open({ kind: door, id, fd, peer }, () => this.closed(id));
  }

  readonly closed = (id: number): void => this.#control.send({ type: 'connection-closed', id });
}
