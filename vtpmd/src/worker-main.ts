import { createWorkerLog } from './worker/log.js';
import { runWorker } from './worker/worker.js';

// The terminal's interrupt is for the supervisor, which stops its workers in order.
process.on('SIGINT', () => {});
// Without a listener this signal opens Node's debugger.
process.on('SIGUSR1', () => {});
// Part of the measured command line: nothing in the worker can choose it.
const isLocked = !process.argv.includes('--no-seccomp');
runWorker({ manager: 3, control: 4, descriptors: 5 }, createWorkerLog('vtpmd'), isLocked);
