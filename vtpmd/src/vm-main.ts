import { serveGuest } from './vm/guest.js';
import { openPort } from './vm/port.js';
import { createWorkerLog } from './worker/log.js';
import { runWorker } from './worker/worker.js';

/** The port to the host, which the init script opened. */
const PORT = 3;
/** As in a sandbox. The VM has no other user, and root could drive the VM's devices. */
const WORKER_ID = 4242;

const log = createWorkerLog('vtpmd');
const port = openPort(PORT);
if (process.getuid?.() === 0) {
  process.setgroups?.([]);
  process.setgid?.(WORKER_ID);
  process.setuid?.(WORKER_ID);
}

serveGuest(port, {
  // The second filter would take away the socket pairs that stand for channels.
  run: (ends, end) => runWorker(ends, log, false, end),
  // The VM ends with its only program.
  failed: (error) => {
    log('error', error.message, { reason: error.reason });
    process.exit(1);
  },
});
