import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync } from 'node:fs';
import { Socket } from 'node:net';
import { socketPair } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import type { Confinement } from './confinement.js';
import { AdoptedProcess } from './handover/adopted-process.js';
import type { InheritedDescriptors } from './handover/descriptors.js';
import type { WorkerHandOver } from './handover/state.js';

/** The first process of a worker, whoever made it. */
export interface WorkerChild {
  readonly pid: number | undefined;
  readonly hasExited: boolean;
  /** Resolves with how it ended, a sentence without a period. */
  readonly exited: Promise<string>;
  /** SIGKILL. */
  kill(): void;
}

/** What a worker consists of, seen from here. */
export interface WorkerBody {
  readonly child: WorkerChild;
  readonly control: Socket;
  /** Of the channel that descriptors are passed on. */
  readonly descriptors: number;
  /** Its standard error. */
  readonly output: Socket | undefined;
}

/**
 * Makes a worker. @param link connected to the manager's worker socket and never read from here. It is closed here once the
 * worker has it. @throws ToolstackError `internal` where no process can be made
 */
export function makeBody(confinement: Confinement, link: Socket): WorkerBody {
  const [ours, theirs] = descriptorChannel(confinement);
  let child: ChildProcess;
  try {
    // Its own session: an interrupt typed at the supervisor's terminal is for the supervisor, which stops its
    // workers in order.
    const { file, args, env, descriptors } = confinement.command;
    child = spawn(file, args, {
      stdio: ['ignore', 'ignore', 'pipe', link, 'pipe', theirs, ...descriptors],
      env: { ...env },
      detached: true,
    });
  } catch (cause) {
    closeSync(ours);
    void confinement.release();
    throw new ToolstackError('internal', `the worker cannot be started: ${(cause as Error).message}`, {
      cause,
    });
  } finally {
    confinement.started();
    closeSync(theirs);
    link.destroy();
  }
  const made = new MadeProcess(child);
  // Absent, whatever the types say, where the process ran out of descriptors.
  const [, , output, , control] = (child.stdio as ChildProcess['stdio'] | undefined) ?? [];
  if (!control) {
    closeSync(ours);
    void confinement.release();
    throw new ToolstackError(
      'internal',
      'the worker cannot be started: too many open files; raise the limit',
    );
  }
  // Node makes sockets of both.
  return { child: made, control: control as Socket, descriptors: ours, output: asSocket(output) };
}

/**
 * A worker that the program before this one made. Where its control channel is closed it is killed: it could neither be
 * spoken to nor heard.
 * @throws ToolstackError `corrupt`
 */
export function adoptBody(facts: WorkerHandOver, inherited: InheritedDescriptors): WorkerBody {
  const [first] = facts.processes;
  if (!first) throw new ToolstackError('corrupt', 'the worker that is handed over has no process');
  // It is reaped whatever comes of the rest.
  const child = new AdoptedProcess(first);
  const open = (fd: number | null): Socket | undefined =>
    fd === null ? undefined : new Socket({ fd: inherited.takeSocket(fd), readable: true, writable: true });
  const control = open(facts.control);
  const descriptors = inherited.takeSocket(facts.descriptors);
  const output = open(facts.output);
  if (!control) child.kill();
  return { child, control: control ?? new Socket().destroy(), descriptors, output };
}

/** A child that libuv looks after. */
class MadeProcess implements WorkerChild {
  readonly exited: Promise<string>;
  readonly #child: ChildProcess;

  constructor(child: ChildProcess) {
    this.#child = child;
    child.on('error', () => undefined);
    this.exited = once(child, 'exit').then(
      ([code, signal]: unknown[]) => (signal ? `killed by ${signal}` : `exit status ${code}`),
      (error: Error) => `it could not be started: ${error.message}`,
    );
  }

  get pid(): number | undefined {
    return this.#child.pid;
  }

  get hasExited(): boolean {
    return this.#child.exitCode !== null || this.#child.signalCode !== null;
  }

  kill(): void {
    this.#child.kill('SIGKILL');
  }
}

function descriptorChannel(confinement: Confinement): [number, number] {
  try {
    return socketPair();
  } catch (error) {
    void confinement.release();
    throw error;
  }
}

function asSocket(stream: ChildProcess['stdio'][number] | undefined): Socket | undefined {
  return stream instanceof Socket ? stream : undefined;
}
