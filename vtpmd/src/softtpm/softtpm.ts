import { rmSync } from 'node:fs';
import { createServer, type Server } from 'node:net';
import { dirname, join } from 'node:path';
import { privateDirectory } from 'vtpm-common/files';
import { forbidCoreDumps, lockFile } from 'vtpm-common/libc';
import { checkSocketPath } from 'vtpm-common/paths';
import { TpmConnection } from '../channels/tpm-connection.js';
import { responseCode, shutdownClear, startupClear, TPM_RC_SUCCESS } from '../engine/command.js';
import { startEngine } from '../engine/start.js';
import { VtpmdError } from '../error.js';
import { CommandQueue } from '../worker/command-queue.js';
import type { Log } from '../worker/log.js';
import { runOwnCommand } from '../worker/own-command.js';
import { readStateFile, stateFilePath, writeStateFile } from './state-file.js';

export interface SoftTpmOptions {
  /** Directory of the state and its lock. */
  readonly state: string;
  /** Path of the unix socket. */
  readonly socket: string;
  /** Makes a new TPM where there is none; without it an absent state is an error. A TPM that is there is kept. */
  readonly create: boolean;
  readonly log: Log;
  /** The TPM cannot make its state durable and answers nothing any more: end the process. */
  readonly onFailure: (error: VtpmdError) => void;
}

export interface SoftTpm {
  /** Shutdown(CLEAR), durable, then closed. */
  stop(): Promise<void>;
}

/**
 * The embedded TPM: a TPM 2.0 in software, its state in a file that is synced before an answer leaves. It listens when
 * this resolves, Startup(CLEAR) is done.
 * @throws VtpmdError `state-missing`, `state-corrupt`, `newer-format`, `in-use`, `engine`
 */
export async function startSoftTpm(options: SoftTpmOptions): Promise<SoftTpm> {
  forbidCoreDumps();
  privateDirectory(options.state);
  const lock = join(options.state, 'lock');
  // Kept open: the lock ends with the process.
  if (lockFile(lock) === undefined) {
    throw new VtpmdError('in-use', `another vtpm-softtpm runs on ${options.state}`);
  }
  const path = stateFilePath(options.state);
  const permanent = readStateFile(path);
  if (!permanent && !options.create) {
    throw new VtpmdError(
      'state-missing',
      `there is no TPM in ${options.state}; restore its state, or make a new TPM with --create`,
    );
  }
  const engine = startEngine({ permanent, manufacture: !permanent });
  if (engine.storedAtStart) writeStateFile(path, engine.storedAtStart);
  const queue = new CommandQueue({
    engine,
    persist: (state) => {
      writeStateFile(path, state);
      return undefined;
    },
    onFailure: options.onFailure,
  });
  const answer = await runOwnCommand(queue, startupClear());
  if (responseCode(answer) !== TPM_RC_SUCCESS) {
    throw new VtpmdError('startup-failed', `Startup was answered 0x${responseCode(answer).toString(16)}`);
  }
  const connections = new Set<TpmConnection>();
  const server = createServer({ allowHalfOpen: true }, (socket) => {
    const connection = new TpmConnection(socket, queue, {
      onClosed: () => connections.delete(connection),
    });
    connections.add(connection);
  });
  await listen(server, options.socket);
  options.log('info', 'listening', { socket: options.socket, isNew: !permanent });
  return {
    async stop() {
      server.close();
      await runOwnCommand(queue, shutdownClear(), 'stop');
      for (const connection of connections) connection.close();
      engine.terminate();
    },
  };
}

/** Owner only: whoever reaches this socket is the TPM's owner. */
function listen(server: Server, path: string): Promise<void> {
  checkSocketPath(path);
  privateDirectory(dirname(path));
  // The lock is held: a socket that is left here is nobody's.
  rmSync(path, { force: true });
  return new Promise((resolve, reject) => {
    const mask = process.umask(0o177);
    server.once('error', reject);
    server.listen(path, () => {
      server.removeListener('error', reject);
      resolve();
    });
    process.umask(mask);
  });
}
