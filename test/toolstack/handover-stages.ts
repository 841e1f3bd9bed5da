// A small program that becomes itself again. It says on its standard output, one JSON line each, what is true before and after.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { connect, createServer, type Server, type Socket } from 'node:net';
import { lockFile, socketFd } from 'vtpm-common';
import { replaceProcess, setCloseOnExec } from 'vtpm-common/exec';
import { AdoptedProcess } from 'vtpm-toolstack/supervisor/handover/adopted-process';
import { type ProcessId, processId } from 'vtpm-toolstack/supervisor/processes';
import { findProgram } from 'vtpm-toolstack/supervisor/sandbox';

interface Kept {
  listener: number;
  children: ProcessId[];
}

const [, script = '', stage = '', directory = '', text = '{}'] = process.argv;
const socketPath = `${directory}/door.sock`;

function say(what: object): void {
  process.stdout.write(`${JSON.stringify(what)}\n`);
}

/** But standard error, which is the test's, whatever that is. */
function descriptors(): string[] {
  return readdirSync('/proc/self/fd').flatMap((fd) => {
    try {
      if (fd === '2') return [];
      return [readlinkSync(`/proc/self/fd/${fd}`)];
    } catch {
      return [];
    }
  });
}

async function ask(): Promise<string> {
  const [answer] = (await once(connect(socketPath), 'data')) as [Buffer];
  return answer.toString();
}

async function before(): Promise<void> {
  const server = createServer((socket) => socket.end('before'));
  await once(server.listen(socketPath), 'listening');
  const secret = createServer();
  await once(secret.listen(`${directory}/not-kept.sock`), 'listening');
  const lock = lockFile(`${directory}/lock`) ?? -1;
  const sandbox = ['--unshare-all', '--die-with-parent', '--ro-bind', '/', '/', '--proc', '/proc'];
  const commands: [string, string[]][] = [
    ['/bin/sh', ['-c', 'read line; exit 7']],
    ['/bin/sleep', ['1000']],
    [findProgram('bwrap'), [...sandbox, 'sleep', '1000']],
  ];
  const children = commands.map(([file, args]) =>
    spawn(file, args, { stdio: ['pipe', 'ignore', 'ignore'], detached: true }),
  );
  const stdin = children[0]?.stdin as unknown as Socket;
  const ids = children.map((child) => processId(child.pid ?? -1) as ProcessId);
  const listener = socketFd(server);
  const kept: Kept = { listener, children: ids };
  try {
    replaceProcess(`${directory}/absent`, [], [listener]);
  } catch (error) {
    const after = spawn('/bin/ls', ['-l', '/proc/self/fd'], { stdio: ['ignore', 'pipe', 'ignore'] });
    let listing = '';
    for await (const chunk of after.stdout) listing += String(chunk);
    say({
      refused: (error as Error).message,
      answer: await ask(),
      inherited: (listing.match(/socket:/g) ?? []).length,
    });
  }
  delete process.env.TAKEN_OUT;
  // As if a library had opened it without a thought of other programs.
  setCloseOnExec(socketFd(secret), false);
  say({ pid: process.pid, descriptors: descriptors().length });
  // Dies while the program changes: nobody has reaped it.
  process.kill(ids[1]?.pid ?? -1, 'SIGKILL');
  replaceProcess(
    process.execPath,
    [script, 'after', directory, JSON.stringify({ ...kept, stdin: socketFd(stdin), lock })],
    [listener, socketFd(stdin), lock],
  );
}

async function after(): Promise<void> {
  const opened = descriptors();
  const { listener, children, stdin } = JSON.parse(text) as Kept & { stdin: number };
  for (const fd of [listener, stdin]) setCloseOnExec(fd, true);
  const server: Server = createServer((socket) => socket.end('after'));
  await once(server.listen({ fd: listener }), 'listening');
  const adopted = children.map((id) => new AdoptedProcess(id));
  const stranger = new AdoptedProcess(processId(1) as ProcessId);
  say({
    pid: process.pid,
    sockets: opened.filter((target) => target.startsWith('socket:')).length,
    lock: opened.includes(`${directory}/lock`),
    environment: [process.env.TAKEN_OUT, process.env.LISTEN_FDS],
    answer: await ask(),
    stranger: await stranger.exited,
    died: await adopted[1]?.exited,
  });
  // One of libuv's own ends too, and is libuv's.
  const own = spawn('/bin/sh', ['-c', 'exit 3']);
  const [status] = (await once(own, 'exit')) as [number];
  const first = adopted[0] as AdoptedProcess;
  (await import('node:fs')).closeSync(stdin);
  const ended = await first.exited;
  const zombies = children.slice(0, 2).filter(({ pid }) => {
    try {
      return readFileSync(`/proc/${pid}/stat`) !== undefined;
    } catch {
      return false;
    }
  });
  say({ own: status, ended, hasExited: first.hasExited, zombies: zombies.length, sandbox: children[2] });
  setInterval(() => undefined, 1000);
}

await (stage === 'before' ? before() : after());
