/**
 * A worker in a VM without the VM: the relay's side in this process, the VM's only program as its child, and a socket pair
 * for the port between them. What it inherits is what a worker inherits.
 */
import { spawn } from 'node:child_process';
import { closeSync } from 'node:fs';
import { Socket } from 'node:net';
import { fileURLToPath } from 'node:url';
import { socketPair } from 'vtpm-common/libc';
import { serveRelay } from 'vtpmd/vm/relay';

const program = fileURLToPath(new URL('../../../vtpmd/dist/bundle/vm-guest.cjs', import.meta.url));
const [ours, theirs] = socketPair();
const guest = spawn(process.execPath, ['--no-warnings', program], { stdio: ['ignore', 2, 2, theirs] });
closeSync(theirs);
process.stderr.write(`guest ${guest.pid}\n`);

function end(status: number): void {
  guest.kill('SIGKILL');
  process.exit(status);
}

serveRelay(
  new Socket({ fd: ours }),
  { manager: 3, control: 4, descriptors: 5 },
  { exited: end, abandoned: () => end(2), failed: () => end(1) },
);
