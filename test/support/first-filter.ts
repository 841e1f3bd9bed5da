import { setCloseOnExec } from 'vtpm-common/exec';
import { koffi } from 'vtpm-common/libc';
import { seccompFilter } from 'vtpm-common/seccomp/filter';
import { installFilter } from 'vtpm-common/seccomp/install';

// A worker's node without the sandbox around it, under the first filter that the sandbox would put on it: a node that
// found more (Node 24: io_uring) uses that, and the second filter comes too late for it. Arguments: node's.
const execve = koffi
  .load('libc.so.6')
  .func('int execve(const char *path, const char **arguments, const char **environment)');
const environment = Object.entries(process.env).map(([name, value]) => `${name}=${value}`);
// Node closes the standard streams too.
for (const fd of [0, 1, 2, 3, 4, 5]) setCloseOnExec(fd, false);
installFilter(seccompFilter('start'));
// At once: this node has io_uring itself.
execve(process.execPath, [process.execPath, ...process.argv.slice(2), null], [...environment, null]);
process.abort();
