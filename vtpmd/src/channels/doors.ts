import { closeSync } from 'node:fs';
import type { AnswerPipe } from '../checkpoint/answer-pipe.js';
import type { CheckpointKeeper } from '../checkpoint/keeper.js';
import type { CheckpointMemory } from '../checkpoint/memory.js';
import type { DataConnection } from '../control/data-channel.js';
import type { VmmDoors } from '../control/vmm-doors.js';
import { flushContext } from '../engine/command.js';
import type { TpmEngine } from '../engine/engine.js';
import { VtpmdError } from '../error.js';
import { Mssim, type Power } from '../mssim/mssim.js';
import { RingConnection } from '../ring/ring-connection.js';
import type { CommandQueue } from '../worker/command-queue.js';
import type { HandleOwner, HandleOwners } from './handle-owners.js';
import { KeptConnection, type KeptConnectionOptions } from './kept-connection.js';
import { serveTctiControl } from './tcti-control.js';
import { TpmConnection, type TpmConnectionOptions } from './tpm-connection.js';

/**
 * The ways in. `tpm`: raw TPM stream. `tcti` and `tcti-ctrl`: what tpm2-tss's swtpm TCTI expects. `control`: swtpm's control
 * protocol, for a VMM, and `vmm-data` the stream that it gives its commands. `mssim` and `mssim-platform`: the TCG
 * simulator's two ports. `ring`: pages shared with a frontend.
 */
const DOOR_KINDS = [
  'tpm',
  'tcti',
  'tcti-ctrl',
  'control',
  'vmm-data',
  'mssim',
  'mssim-platform',
  'ring',
] as const;
export type DoorKind = (typeof DOOR_KINDS)[number];

export function isDoorKind(text: string): text is DoorKind {
  return DOOR_KINDS.some((kind) => kind === text);
}

/** TCP has no offset that outlives the worker, see KeptConnection: its clients connect again. */
export function endsWithWorker(kind: DoorKind): boolean {
  return kind === 'mssim' || kind === 'mssim-platform';
}

/** The client of connections whose process the supervisor could not see. */
const NOBODY_KNOWS = 0;

/** How a command came that has no answer yet. */
type Taken = 'bare' | 'framed' | undefined;
/** Marks, beside the number of a connection, that its answer goes into a frame. */
export const TAKEN_FRAMED = 0x8000_0000;

/** Which connections have no answer yet, where the supervisor can see it. */
class TakenNotes {
  readonly #connections: (number | undefined)[];

  constructor(private readonly words: Uint32Array) {
    this.#connections = new Array<number | undefined>(words.length).fill(undefined);
  }

  /** @returns undefined where all words are in use: that connection is not noted */
  open(connection: number): number | undefined {
    const word = this.#connections.indexOf(undefined);
    if (word < 0) return undefined;
    this.#connections[word] = connection;
    return word;
  }

  set(word: number, taken: Taken): void {
    const connection = this.#connections[word] ?? 0;
    this.words[word] = taken === undefined ? 0 : taken === 'framed' ? connection | TAKEN_FRAMED : connection;
  }

  close(word: number): void {
    this.words[word] = 0;
    this.#connections[word] = undefined;
  }
}

/** What connections need that outlive this worker. */
export interface Kept {
  readonly keeper: CheckpointKeeper;
  readonly pipe: AnswerPipe;
  readonly memory: CheckpointMemory;
}

export interface DoorsOptions {
  /** Where connections outlive this worker. */
  readonly kept?: Kept | undefined;
  /** Where they do, and nothing else of it. */
  readonly taken?: Uint32Array | undefined;
  /** For doors from which the TPM is turned on and off. */
  readonly power?: Power;
  /** Where a VMM powers the TPM. */
  readonly vmm?: VmmDoors | undefined;
}

/** A connection as the supervisor passes it. */
export interface Visitor {
  readonly kind: DoorKind;
  readonly id: number;
  readonly fd: number;
  /** Process id of the client as the supervisor sees it: from within a sandbox it cannot be seen. */
  readonly peer: number | undefined;
}

/**
 * All connections of guests, whatever door they came through, in front of one queue.
 *
 * Clients of the tcti door share the TPM's few slots, so what one leaves loaded is flushed when it is gone. tpm2-tss
 * opens a new connection for every command (and one more, without a command, when it starts), so a client is a process,
 * and it is gone when the process is. Who keeps a connection for several commands is gone with the connection.
 */
export class Doors {
  readonly #engine: TpmEngine;
  readonly #queue: CommandQueue;
  readonly #owners: HandleOwners;
  /** Of a worker before this one, until they are opened here. */
  readonly #adopted = new Set<number>();
  readonly #kept: Kept | undefined;
  readonly #power: Power | undefined;
  /** Made with the first of its clients. */
  #mssim: Mssim | undefined;
  readonly #taken: TakenNotes | undefined;
  readonly #vmm: VmmDoors | undefined;

  constructor(
    engine: TpmEngine,
    queue: CommandQueue,
    owners: HandleOwners,
    { kept, taken, power, vmm }: DoorsOptions = {},
  ) {
    this.#vmm = vmm;
    this.#taken = taken && new TakenNotes(taken);
    this.#power = power;
    this.#engine = engine;
    this.#queue = queue;
    this.#owners = owners;
    this.#kept = kept;
  }

  /** Serves the connected socket `fd`, which is closed with the connection. */
  open({ kind, id, fd, peer }: Visitor, onClosed: () => void): void {
    try {
      switch (kind) {
        case 'tpm':
          if (this.#kept) this.#openKept(this.#kept, fd, { id, onClosed });
          else this.#openTaking(fd, id, { onClosed });
          return;
        case 'tcti':
          this.#openTcti(fd, { client: peer ?? NOBODY_KNOWS, connection: id }, onClosed);
          return;
        case 'tcti-ctrl': {
          const client = peer ?? NOBODY_KNOWS;
          const cancel = (): void => {
            if (this.#queue.current?.owner?.client === client) this.#engine.cancel();
          };
          serveTctiControl(fd, { established: this.#engine.established, cancel }, onClosed);
          return;
        }
        case 'ring': {
          const parts = { id, queue: this.#queue, keeping: this.#kept };
          new RingConnection(fd, parts, onClosed).start(this.#adopted.delete(id));
          return;
        }
        case 'control':
          if (!this.#vmm) break;
          this.#vmm.control.open(id, fd, onClosed);
          return;
        case 'vmm-data':
          if (!this.#vmm) break;
          this.#openData(this.#vmm, id, fd, onClosed);
          return;
        case 'mssim':
          this.#simulator().openCommandPort(fd, onClosed);
          return;
        case 'mssim-platform':
          this.#simulator().openPlatformPort(fd, onClosed);
          return;
      }
      throw new VtpmdError('protocol', `nobody serves the door "${kind}"`);
    } catch {
      // The peer is gone already, or nobody serves it: the descriptor is of no use.
      closeSync(fd);
      onClosed();
    }
  }

  /** All connections that were open when a worker before this one ended. Of those that are gone nothing stays loaded. */
  adopt(visitors: readonly Visitor[], onClosed: (id: number) => void): void {
    for (const { id } of visitors) this.#adopted.add(id);
    for (const connection of this.#owners.busy) {
      if (!this.#adopted.has(connection)) this.#endOf(connection);
    }
    for (const visitor of visitors) {
      if (endsWithWorker(visitor.kind)) {
        closeSync(visitor.fd);
        onClosed(visitor.id);
      } else {
        this.open(visitor, () => onClosed(visitor.id));
      }
    }
    this.#vmm?.adopted();
  }

  /** The process ended: what it left loaded is flushed. */
  peerGone(client: number): void {
    this.#flush((owner) => owner.client === client);
  }

  /** Nobody is there who loaded anything: all that clients would have been relieved of when they go is flushed. */
  everyoneGone(): void {
    for (const connection of this.#owners.busy) this.#owners.setBusy(connection, false);
    this.#flush(() => true);
  }

  /** The supervisor does not keep what a VMM gave as its data channel. */
  dataChannelRefused(): void {
    this.#vmm?.data.refused();
  }

  #openKept(
    { keeper, pipe }: Kept,
    fd: number,
    options: Omit<KeptConnectionOptions, 'queue' | 'keeper' | 'pipe'>,
  ): KeptConnection {
    const connection = new KeptConnection(fd, { queue: this.#queue, keeper, pipe, ...options });
    connection.start();
    return connection;
  }

  #openData({ data, localities }: VmmDoors, id: number, fd: number, onClosed: () => void): void {
    const options = {
      kind: 'vmm-data' as const,
      localities,
      onClosed: (connection: DataConnection) => {
        data.closed(connection);
        onClosed();
      },
    };
    const connection = this.#kept
      ? this.#openKept(this.#kept, fd, { id, ...options })
      : this.#openTaking(fd, id, options);
    if (!connection.isGone) data.opened(connection);
  }

  /** Takes each command from its socket as it comes. */
  #openTaking(fd: number, id: number, options: Omit<TpmConnectionOptions, 'note'>): TpmConnection {
    const word = this.#taken?.open(id);
    return new TpmConnection(fd, this.#queue, {
      ...options,
      onClosed: (connection) => {
        if (word !== undefined) this.#taken?.close(word);
        options.onClosed(connection);
      },
      ...(word !== undefined && { note: (taken: Taken) => this.#taken?.set(word, taken) }),
    });
  }

  #simulator(): Mssim {
    if (!this.#power) throw new VtpmdError('protocol', 'nobody powers this TPM on');
    this.#mssim ??= new Mssim(this.#engine, this.#queue, this.#power);
    return this.#mssim;
  }

  #endOf(connection: number): void {
    this.#owners.setBusy(connection, false);
    this.#flush((other) => other.connection === connection);
  }

  #openTcti(fd: number, owner: HandleOwner, done: () => void): void {
    const { client, connection } = owner;
    const isAdopted = this.#adopted.delete(connection);
    const onClosed = ({ commands }: { readonly commands: number }): void => {
      if (commands > 1) this.#endOf(connection);
      // Nobody knows this client, but it is new: so the ones before it are taken to be gone.
      else if (commands === 0 && client === NOBODY_KNOWS && !isAdopted) this.peerGone(client);
      done();
    };
    if (!this.#kept) {
      this.#openTaking(fd, connection, { onClosed, owner, kind: 'tcti' });
      return;
    }
    this.#openKept(this.#kept, fd, {
      id: connection,
      owner,
      kind: 'tcti',
      commands: this.#owners.busy.has(connection) ? 2 : 0,
      onClosed,
      onBusy: () => this.#owners.setBusy(connection, true),
    });
  }

  #flush(matches: (owner: HandleOwner) => boolean): void {
    for (const handle of this.#owners.release(matches)) {
      this.#queue.submitFirst({
        command: flushContext(handle),
        isGone: false,
        // A session may be gone already: the TPM ends one whose last command said so.
        answer: () => {},
        dropped: () => {},
      });
    }
  }
}
