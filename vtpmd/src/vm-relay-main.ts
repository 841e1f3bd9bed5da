import { spawn } from 'node:child_process';
import { closeSync } from 'node:fs';
import { Socket } from 'node:net';
import { forbidCoreDumps, socketPair } from 'vtpm-common/libc';
import { serveRelay } from './vm/relay.js';
import { createWorkerLog } from './worker/log.js';

// The terminal's interrupt is for the supervisor, which stops its workers in order.
process.on('SIGINT', () => {});
// Without a listener this signal opens Node's debugger.
process.on('SIGUSR1', () => {});
forbidCoreDumps();

/** Of the program that runs the VM: its end of the port. */
const PORT_DESCRIPTOR = 3;

const log = createWorkerLog('vtpmd-relay');
const [program, ...args] = process.argv.slice(2);
if (program === undefined) {
  log('error', 'the command line names no program that runs the VM');
  process.exit(1);
}
const [ours, theirs] = socketPair();
const stdio: ('ignore' | 'pipe' | number)[] = ['ignore', 'pipe', 2];
stdio[PORT_DESCRIPTOR] = theirs;
const qemu = spawn(program, args, { stdio, env: {} });
closeSync(theirs);

let status: number | undefined;

/** Ends the VM, and this process once the VM is gone and its last words are written. */
function end(reason: number): void {
  status ??= reason;
  qemu.kill('SIGKILL');
}

qemu.on('error', (error) => {
  log('error', `QEMU cannot be started: ${error.message}`);
  process.exit(1);
});
qemu.on('close', (code, signal) => {
  if (status === undefined) log('error', `the VM ended by itself (QEMU: ${signal ?? `exit status ${code}`})`);
  process.exit(status ?? 1);
});
// The VM's console: its lines end as those of a terminal.
qemu.stdout?.on('data', (chunk: Buffer) =>
  process.stderr.write(chunk.toString('latin1').replaceAll('\r', '')),
);

serveRelay(
  new Socket({ fd: ours }),
  { manager: 3, control: 4, descriptors: 5 },
  {
    exited: end,
    abandoned: () => end(2),
    failed: (error) => {
      // QEMU that ends closes the port too, and has more to say.
      if (error.code === 'link-lost') return;
      log('error', error.message, { reason: error.reason });
      end(1);
    },
  },
);
