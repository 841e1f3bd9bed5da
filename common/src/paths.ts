import { homedir } from 'node:os';
import { join, resolve } from 'node:path';
import { ConfigError } from './config-error.js';

/**
 * Where an installation keeps its things. All state is under `home`, all sockets under `run`, so that two
 * installations run side by side.
 */
export interface Paths {
  readonly home: string;
  readonly run: string;
  readonly config: string;
  /** Of the manager. */
  readonly manager: {
    readonly directory: string;
    readonly lock: string;
    readonly enrolment: string;
    readonly store: string;
    /** The newest segment of the audit log; older ones are beside it, `audit.000001.log`. */
    readonly audit: string;
    /** Signed approvals of platform states; public. */
    readonly approvals: string;
    /** State of the embedded TPM. */
    readonly softtpm: string;
    readonly softtpmSocket: string;
    readonly workerSocket: string;
    readonly toolstackSocket: string;
    readonly adminSocket: string;
  };
  /** Of vtpmctl: the toolstack key and what names the manager. */
  readonly toolstack: { readonly directory: string; readonly key: string; readonly managerIdentity: string };
  readonly supervisor: {
    readonly directory: string;
    readonly lock: string;
    readonly delegateKey: string;
    readonly vtpms: string;
    readonly images: string;
    /** What `image build-vm` made, and the measured copies that relays of workers in VMs run from. */
    readonly vm: string;
    readonly vmImages: string;
    readonly socket: string;
    /** For the drop-in commands: `swtpm` and its companions. */
    readonly dropinSocket: string;
    /** One directory per vTPM name, with its doors. */
    readonly doors: string;
  };
  readonly log: string;
}

export function defaultHome(uid = process.getuid?.() ?? 0, env: NodeJS.ProcessEnv = process.env): string {
  if (uid === 0) return '/var/lib/vtpm-manager';
  return join(env.XDG_STATE_HOME ?? join(homedir(), '.local/state'), 'vtpm-manager');
}

/** `/run/vtpm-manager` for root's default home, otherwise a directory of the home. */
export function defaultRun(home: string, uid = process.getuid?.() ?? 0): string {
  return uid === 0 && home === defaultHome(0) ? '/run/vtpm-manager' : join(home, 'run');
}

export function pathsOf(home: string, run: string = defaultRun(resolve(home))): Paths {
  const base = resolve(home);
  const sockets = resolve(run);
  const manager = join(base, 'manager');
  const toolstack = join(base, 'toolstack');
  const supervisor = join(base, 'supervisor');
  return {
    home: base,
    run: sockets,
    config: join(base, 'config.json'),
    manager: {
      directory: manager,
      lock: join(manager, 'lock'),
      enrolment: join(manager, 'enrolment.json'),
      store: join(manager, 'store'),
      audit: join(manager, 'audit.log'),
      approvals: join(manager, 'approvals.json'),
      softtpm: join(manager, 'softtpm'),
      softtpmSocket: join(sockets, 'manager', 'softtpm.sock'),
      workerSocket: join(sockets, 'manager', 'worker.sock'),
      toolstackSocket: join(sockets, 'manager', 'toolstack.sock'),
      adminSocket: join(sockets, 'manager', 'admin.sock'),
    },
    toolstack: {
      directory: toolstack,
      key: join(toolstack, 'toolstack.key'),
      managerIdentity: join(toolstack, 'manager.json'),
    },
    supervisor: {
      directory: supervisor,
      lock: join(supervisor, 'lock'),
      delegateKey: join(supervisor, 'delegate.key'),
      vtpms: join(supervisor, 'vtpms.json'),
      images: join(supervisor, 'images'),
      vm: join(supervisor, 'vm'),
      vmImages: join(supervisor, 'images', 'vm'),
      socket: join(sockets, 'supervisor.sock'),
      dropinSocket: join(sockets, 'dropin.sock'),
      doors: join(sockets, 'vtpms'),
    },
    log: join(base, 'log'),
  };
}

/** sun_path holds so many bytes and a NUL (unix(7)). */
export const MAX_SOCKET_PATH_BYTES = 107;

/** @throws ConfigError that names the path and what to do */
export function checkSocketPath(path: string): string {
  const length = Buffer.byteLength(path);
  if (length > MAX_SOCKET_PATH_BYTES) {
    throw new ConfigError(
      `the socket path ${path} has ${length} bytes, a unix socket takes ${MAX_SOCKET_PATH_BYTES}; choose a shorter --home or --run-dir`,
    );
  }
  return path;
}
