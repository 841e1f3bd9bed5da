import type { Socket } from 'node:net';
import { peerCredentials, socketFd } from 'vtpm-common';
import { isAlive, type ProcessId, processId } from './processes.js';

/**
 * The processes behind the connections of one vTPM. tpm2-tss connects anew for every command, so what a client left in
 * the TPM can only be flushed when its process is gone; and a sandboxed worker cannot see processes of the host.
 */
export class DoorClients {
  readonly #clients: Map<number, ProcessId>;

  constructor(clients: readonly ProcessId[] = []) {
    this.#clients = new Map(clients.map((client) => [client.pid, client]));
  }

  all(): ProcessId[] {
    return [...this.#clients.values()];
  }

  /** @returns the client's process id; undefined where it cannot be known (it ended, or lives in another namespace) */
  add(socket: Socket): number | undefined {
    const { pid } = peerCredentials(socketFd(socket));
    const client = pid > 0 ? processId(pid) : undefined;
    if (!client) return undefined;
    this.#clients.set(pid, client);
    return pid;
  }

  /** Those that ended since the last time. */
  takeGone(): number[] {
    const gone = [...this.#clients.values()].filter((client) => !isAlive(client)).map(({ pid }) => pid);
    for (const pid of gone) this.#clients.delete(pid);
    return gone;
  }
}
