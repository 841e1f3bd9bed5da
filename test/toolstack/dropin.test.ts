import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import {
  chmodSync,
  closeSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { connect, Socket } from 'node:net';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import fc from 'fast-check';
import { sendDescriptor, socketFd, socketPair } from 'vtpm-common';
import { koffi } from 'vtpm-common/libc';
import { createVtpm } from 'vtpm-toolstack/dropin/creation';
import { resolvePlace } from 'vtpm-toolstack/dropin/state-place';
import { type LinkEvents, SupervisorLink } from 'vtpm-toolstack/dropin/supervisor-link';
import { digestOf, newSecret, readToken } from 'vtpm-toolstack/dropin/token';
import { dropin, SwtpmDropin } from '../support/dropin.js';
import { REPOSITORY, run } from '../support/installation.js';
import { until as eventually } from '../support/until.js';
import {
  buildStubImage,
  connectDoor,
  exchange,
  removeDirectory,
  StubManager,
  SupervisorProcess,
  temporaryDirectory,
  until,
} from './supervisor-fixture.js';

const NOBODY_LISTENS: LinkEvents = {
  disconnected: () => undefined,
  ended: () => undefined,
  lost: () => undefined,
};
const makeSocket = koffi.load('libc.so.6').func('int socket(int domain, int type, int protocol)');
/** Domain and type: AF_UNIX, AF_INET and AF_NETLINK; SOCK_DGRAM, SOCK_SEQPACKET and SOCK_RAW. */
const NO_STREAMS = [
  [1, 2],
  [1, 5],
  [2, 2],
  [16, 3],
] as const;
const STRANGER = 54321;
const isRoot = process.getuid?.() === 0;

describe('the drop-in for swtpm', function () {
  this.timeout(60_000);
  let image: string;
  let manifest: string;
  let home: string;
  let supervisor: SupervisorProcess;
  let manager: StubManager;
  let state = '';
  let sockets = '';
  let copy = '';

  before(async () => {
    image = temporaryDirectory();
    manifest = await buildStubImage(image);
    home = temporaryDirectory();
    chmodSync(home, 0o711);
    // The toolstack key of the fixture, where vtpmctl looks for it.
    mkdirSync(join(home, 'toolstack'), { mode: 0o700 });
    writeFileSync(join(home, 'toolstack/toolstack.key'), Buffer.alloc(32, 7), { mode: 0o600 });
    supervisor = await new SupervisorProcess(home, manifest, [
      ...['--log-format', 'json', '--dropin-users', String(STRANGER)],
    ]).ready();
    manager = new StubManager(supervisor.paths);
    await manager.start();
  });
  after(async () => {
    await supervisor.end('SIGTERM');
    await manager.stop();
    removeDirectory(home);
    removeDirectory(image);
  });
  beforeEach(() => {
    const directory = mkdtempSync(join(home, 't'));
    state = join(directory, 'state');
    sockets = join(directory, 'sockets');
    copy = join(directory, 'copy');
    for (const path of [state, sockets, copy]) mkdirSync(path);
  });

  const control = (): string => join(sockets, 'control');
  const server = (): string => join(sockets, 'server');
  const tokenPath = (directory = state): string => join(directory, 'vtpm-manager.token');
  const token = (): { id: string; vmUuid: string; secret: string } =>
    JSON.parse(readFileSync(tokenPath(), 'utf8'));

  /** @param more arguments */
  function swtpm(directory = state, ...more: string[]): SwtpmDropin {
    return new SwtpmDropin(supervisor.paths.run, [
      ...['--tpmstate', `dir=${directory}`, '--ctrl', `type=unixio,path=${control()},mode=0600`],
      ...['--server', `type=unixio,path=${server()}`, '--pid', `file=${join(sockets, 'pid')}`, ...more],
    ]);
  }

  /** One whose vTPM is on and has a client on each channel. */
  async function served(...more: string[]) {
    const command = swtpm(state, ...more);
    const data = await reached(server());
    assert.equal(await exchange(data, 'command'), 'command');
    const vmm = await connectDoor(control());
    assert.equal(await exchange(vmm, 'request'), 'request');
    return { command, data, vmm };
  }

  // biome-ignore lint/suspicious/noExplicitAny: as the answers are.
  async function vtpm(): Promise<any> {
    return (await supervisor.call('GET', `/vtpms/${token().id}`)).body;
  }
  const isOff = () => until(async () => (await vtpm()).state === 'stopped');

  /** One of a command that was killed may still be there, without anybody behind it. */
  function reached(path: string): Promise<Socket> {
    return eventually(path, () => connectDoor(path).catch(() => undefined));
  }

  /** As the command does it. */
  async function refusedAt(directory: string, pattern: RegExp): Promise<void> {
    const place = resolvePlace({ path: directory, isFile: false });
    const link = await SupervisorLink.open(supervisor.paths.supervisor.dropinSocket, NOBODY_LISTENS);
    const start = async () => {
      const found = readToken(place) ?? (await createVtpm(link, place, { name: undefined, uuid: undefined }));
      await link.start({ ...found, place: place.place });
    };
    await assert.rejects(start(), pattern).finally(() => link.close());
  }

  it('makes a vTPM for an empty directory, serves what connects, and ends with it in order', async () => {
    const { command, data, vmm } = await served();
    const { doors, state: kind, dropin: binding } = await vtpm();
    assert.deepEqual([doors, kind], [['control'], 'running']);
    assert.deepEqual(binding, { place: state, uid: process.getuid?.() });
    assert.equal(statSync(tokenPath()).mode & 0o777, 0o600);
    assert.equal(statSync(control()).mode & 0o777, 0o600);
    assert.equal(Number(readFileSync(join(sockets, 'pid'), 'utf8')), command.child.pid);
    const gone = Promise.all([once(data, 'close'), once(vmm, 'close')]);
    assert.equal(await command.end('SIGTERM'), 0);
    await gone;
    assert.equal((await vtpm()).state, 'stopped');
    assert.deepEqual([control(), server(), join(sockets, 'pid')].filter(existsSync), []);
  });

  it('starts the same vTPM from the same directory, however often', async () => {
    const { id } = await (async () => {
      const { command } = await served();
      await command.end('SIGTERM');
      return token();
    })();
    const { command } = await served();
    assert.equal((await vtpm()).id, id);
    await command.end('SIGTERM');
    assert.equal(manager.records.get(id)?.epoch, 2);
  });

  it('I-3 a copied directory is not a second TPM: while the first runs, and when it is off', async () => {
    const { command, data } = await served();
    const { name } = await vtpm();
    const other = join(sockets, 'other');
    const second = await dropin(
      'swtpm',
      supervisor.paths.run,
      'socket',
      '--tpm2',
      '--tpmstate',
      `dir=${state}`,
      '--ctrl',
      `type=unixio,path=${other}`,
    );
    assert.equal(second.code, 1);
    assert.match(second.stderr, new RegExp(`^swtpm: vTPM ${name} runs already, .*\n$`));
    assert.ok(!existsSync(other), 'its socket is gone with it');
    copyFileSync(tokenPath(), tokenPath(copy));
    await refusedAt(copy, /a copied directory is not a second TPM/);
    assert.equal(await exchange(data, 'still there'), 'still there');
    await command.end('SIGTERM');
    await refusedAt(copy, new RegExp(`copy of the token of vTPM ${name}, which is in ${state}`));
    assert.equal((await vtpm()).state, 'stopped');
    // The operator says so where it was moved, and the old place is void then.
    const moved = await ctl('dropin', name, copy);
    assert.equal(moved.code, 0, moved.stderr);
    await refusedAt(state, /is not that of vTPM/);
    const next = swtpm(copy);
    assert.equal(await exchange(await reached(server()), 'moved'), 'moved');
    assert.equal(await next.end('SIGTERM'), 0);
  });

  it('refuses a token that was changed, is of another VM, is gone, or that others may read', async () => {
    const { command } = await served();
    await command.end('SIGTERM');
    const { name } = await vtpm();
    const right = token();
    const write = (change: object): void =>
      writeFileSync(tokenPath(), `${JSON.stringify({ format: 1, ...right, ...change })}\n`);
    write({ secret: newSecret() });
    await refusedAt(state, new RegExp(`not that of vTPM ${name}; vtpmctl dropin ${name}`));
    write({ vmUuid: randomUUID() });
    await refusedAt(state, new RegExp(`vTPM ${name} belongs to VM ${right.vmUuid}`));
    write({ id: randomUUID() });
    await refusedAt(state, /not on this host or was deleted/);
    write({ format: 2 });
    await refusedAt(state, /has format 2, this version knows 1/);
    write({});
    chmodSync(tokenPath(), 0o640);
    await refusedAt(state, /chmod 600/);
    rmSync(tokenPath());
    await refusedAt(state, new RegExp(`place of vTPM ${name} and its token is not there`));
    assert.ok(!existsSync(tokenPath()), 'nothing was made in its place');
  });

  it('I-9 a directory with state of swtpm does not get a new TPM in its place', async () => {
    writeFileSync(join(state, 'tpm2-00.permall'), 'state');
    await refusedAt(state, /holds the state of a TPM of swtpm \(tpm2-00\.permall\)/);
    assert.ok(!existsSync(tokenPath()));
  });

  it('a user who is not named is not served, and one who is has no right to the tokens of others', async function () {
    if (!isRoot) this.skip();
    const { command } = await served();
    await command.end('SIGTERM');
    const path = supervisor.paths.supervisor.dropinSocket;
    await assert.rejects(
      as(54399, () => SupervisorLink.open(path, NOBODY_LISTENS)),
      /user 54399 .*dropin-users/,
    );
    const link = await as(STRANGER, () => SupervisorLink.open(path, NOBODY_LISTENS));
    const { id, vmUuid, secret: of } = token();
    await assert.rejects(
      link.start({ id, vmUuid, secret: of, place: state }),
      /is for user 0, not for user 54321/,
    );
    // But a vTPM of his own he may have, and root may start it too.
    const secret = newSecret();
    const own = { id: randomUUID(), vmUuid: randomUUID(), place: join(copy, 'own') };
    await link.request({ type: 'create', ...own, secretSha256: digestOf(secret), name: 'own' });
    await link.start({ ...own, secret });
    link.close();
    const isOffAgain = async () => (await supervisor.call('GET', '/vtpms/own')).body.state === 'stopped';
    await until(isOffAgain);
    const root = await SupervisorLink.open(path, NOBODY_LISTENS);
    await root.start({ ...own, secret });
    await root.request({ type: 'stop' });
    root.close();
  });

  it('its end, however it comes, powers the TPM off', async () => {
    const { command, data } = await served();
    const gone = once(data, 'close');
    await command.end('SIGKILL');
    await isOff();
    await gone;
    // The sockets of one that was killed are in nobody's way.
    const next = await served();
    await next.command.end('SIGTERM');
  });

  it('ends when the vTPM is stopped', async () => {
    const { command } = await served();
    const { status } = await supervisor.call('POST', `/vtpms/${token().id}/stop`);
    assert.equal(status, 200);
    assert.equal(await command.end(), 0);
  });

  it('with --terminate it ends with the last client of the data channel, and with no other', async () => {
    const { command, data, vmm } = await served('--terminate');
    vmm.destroy();
    const other = await connectDoor(server());
    assert.equal(await exchange(other, 'a'), 'a');
    data.destroy();
    // Each takes the way that the news of that end took.
    const more = [];
    for (const text of ['b', 'c', 'd']) {
      const next = await connectDoor(server());
      assert.equal(await exchange(next, text), text);
      more.push(next);
    }
    assert.equal(await exchange(other, 'e'), 'e');
    for (const socket of [other, ...more]) socket.destroy();
    assert.equal(await command.end(), 0);
    assert.equal((await vtpm()).state, 'stopped');
  });

  it('has one client at a time on the control channel: the next one waits', async () => {
    const { command, vmm } = await served();
    const next = await connectDoor(control());
    next.write('waits');
    let isAnswered = false;
    const answer = once(next, 'data').finally(() => {
      isAnswered = true;
    });
    // Clients of the data channel who come later do not wait behind it.
    for (const text of ['a', 'b']) assert.equal(await exchange(await connectDoor(server()), text), text);
    assert.equal(await exchange(vmm, 'first'), 'first');
    assert.equal(isAnswered, false);
    vmm.destroy();
    assert.equal(String(await answer), 'waits');
    await command.end('SIGTERM');
  });

  it('takes descriptors of its caller: a listening or connected control channel, a data channel, the pid', async () => {
    const [mine, theirs] = socketPair();
    const [myData, theirData] = socketPair();
    const pid = join(sockets, 'pid');
    const file = openSync(pid, 'w');
    const command = new SwtpmDropin(
      supervisor.paths.run,
      ['--tpmstate', `dir=${state}`, '--ctrl', 'type=unixio,clientfd=3', '--fd', '4', '--pid', 'fd=5'],
      [theirs, theirData, file],
    );
    for (const fd of [theirs, theirData, file]) closeSync(fd);
    assert.equal(await exchange(new Socket({ fd: mine }), 'request'), 'request');
    assert.equal(await exchange(new Socket({ fd: myData }), 'command'), 'command');
    assert.equal(Number(readFileSync(pid, 'utf8')), command.child.pid);
    assert.equal(await command.end('SIGTERM'), 0);
  });

  it('serves TCP ports of this host', async () => {
    const tcp = new SwtpmDropin(supervisor.paths.run, [
      ...['--tpmstate', `dir=${state}`, '--ctrl', 'type=tcp,port=0', '--pid', `file=${join(sockets, 'pid')}`],
    ]);
    await tcp.made(join(sockets, 'pid'));
    const port = await eventually('a port', () => portOf(tcp.child.pid ?? -1));
    const vmm = connect(port, '127.0.0.1');
    await once(vmm, 'connect');
    assert.equal(await exchange(vmm, 'request'), 'request');
    assert.equal(await tcp.end('SIGTERM'), 0);
  });

  it('--daemon returns when the sockets are there, and what stays is in the file of --pid', async () => {
    const pid = join(sockets, 'pid');
    const log = join(sockets, 'log');
    const { code, stderr } = await dropin(
      ...([
        'swtpm',
        supervisor.paths.run,
        'socket',
        '--tpm2',
        '--tpmstate',
        `dir=${state}`,
        '--daemon',
      ] as const),
      ...[
        '--ctrl',
        `type=unixio,path=${control()}`,
        '--pid',
        `file=${pid}`,
        '--log',
        `file=${log},prefix=vm1 `,
      ],
    );
    assert.equal(code, 0, stderr);
    assert.ok(existsSync(control()) && existsSync(pid));
    assert.equal(await exchange(await connectDoor(control()), 'request'), 'request');
    process.kill(Number(readFileSync(pid, 'utf8')), 'SIGTERM');
    await isOff();
    await until(() => !existsSync(pid));
    assert.match(readFileSync(log, 'utf8'), /^vm1 .*vTPM swtpm-[0-9a-f]{8} is on/m);
    const refused = await dropin(
      'swtpm',
      supervisor.paths.run,
      'socket',
      '--tpm2',
      '--daemon',
      '--tpmstate',
      'dir=/nowhere',
      '--ctrl',
      `type=unixio,path=${control()}`,
    );
    assert.equal(refused.code, 1);
    assert.match(refused.stderr, /\/nowhere, does not exist/);
  });

  it('refuses a place for a socket that is too long or holds something else, and leaves nothing there', async () => {
    const file = join(sockets, 'file');
    writeFileSync(file, 'kept');
    for (const [path, why] of [
      [file, /nobody can listen at .*file \(EADDRINUSE\)/],
      [join(sockets, 'x'.repeat(100)), /a unix socket takes 107; choose a shorter path/],
    ] as const) {
      const command = swtpm(state, '--ctrl', `type=unixio,path=${path}`);
      assert.equal(await command.end(), 1);
      assert.match(command.stderr, why);
    }
    assert.equal(readFileSync(file, 'utf8'), 'kept');
    assert.deepEqual(readdirSync(sockets), ['file']);
  });

  it('goes on over an upgrade of the supervisor: clients, those who come later, and its end', async () => {
    const { command, data, vmm } = await served();
    const before = (await vtpm()).worker.pid;
    const waiting = await connectDoor(control());
    waiting.write('waits');
    for (let round = 0; round < 2; round++) {
      const { status, body } = await supervisor.call('POST', '/upgrade');
      assert.equal(status, 200, JSON.stringify(body));
      assert.equal(await exchange(data, `data ${round}`), `data ${round}`);
      assert.equal(await exchange(vmm, `vmm ${round}`), `vmm ${round}`);
      const late = await connectDoor(server());
      assert.equal(await exchange(late, 'late'), 'late');
    }
    const answer = once(waiting, 'data');
    vmm.destroy();
    assert.equal(String(await answer), 'waits');
    assert.equal((await vtpm()).worker.pid, before);
    assert.equal(await command.end('SIGTERM'), 0);
    assert.equal((await vtpm()).state, 'stopped');
  });

  it('a vTPM of the drop-in is started by its swtpm alone, until it is told otherwise', async () => {
    const { command } = await served();
    await command.end('SIGTERM');
    const { name } = await vtpm();
    const { status, body } = await supervisor.call('POST', `/vtpms/${name}/start`);
    assert.equal(status, 400);
    assert.match(body.error.message, /is started by swtpm with the token in/);
    const refused = await ctl('set', name, '--doors', 'tpm');
    assert.equal(refused.code, 1);
    assert.match(refused.stderr, new RegExp(`vtpmctl dropin ${name} --remove first`));
    assert.equal((await ctl('set', name, '--doors', 'tpm,control')).code, 0);
    const removed = await ctl('dropin', name, '--remove');
    assert.equal(removed.code, 0, removed.stderr);
    assert.equal((await ctl('set', name, '--doors', 'tpm')).code, 0);
    assert.equal((await supervisor.call('POST', `/vtpms/${name}/start`)).status, 200);
    await refusedAt(state, /is not started by swtpm; vtpmctl dropin/);
  });

  it('I-10 whatever is sent to its socket, and whatever is passed, the supervisor goes on', async () => {
    const path = supervisor.paths.supervisor.dropinSocket;
    const { command, data } = await served();
    const word = fc.constantFrom(
      'type',
      'start',
      'create',
      'token',
      'connection',
      'door',
      'control',
      'session',
      'ok',
    );
    const value: fc.Arbitrary<unknown> = fc.letrec((tie) => ({
      value: fc.oneof(
        fc.oneof(word, fc.string(), fc.integer(), fc.boolean(), fc.constant(null)),
        fc.dictionary(word, tie('value'), { maxKeys: 4 }),
      ),
    })).value;
    const line = fc.oneof(
      fc.string(),
      value.map((item) => JSON.stringify(item)),
    );
    await fc.assert(
      fc.asyncProperty(fc.array(line, { maxLength: 4 }), async (lines) => {
        const socket = await connectDoor(path);
        socket.on('error', () => undefined);
        socket.end(`${lines.join('\n')}\n`);
        socket.resume();
        await once(socket, 'close');
      }),
      { numRuns: 50 },
    );
    // A file in the place of a client, and a client that never came.
    const link = await SupervisorLink.open(path, NOBODY_LISTENS);
    const other = { id: randomUUID(), vmUuid: randomUUID(), place: join(home, 'other') };
    const secret = newSecret();
    await link.request({ type: 'create', ...other, secretSha256: digestOf(secret), name: 'other' });
    await link.start({ ...other, secret });
    const file = openSync(tokenPath(), 'r');
    await assert.rejects(link.pass('control', file), /is no socket/);
    closeSync(file);
    // Sockets that are no connections.
    const open = () => readdirSync(`/proc/${supervisor.pid}/fd`).length;
    const before = open();
    for (const [domain, type] of NO_STREAMS) {
      const odd = Number(makeSocket(domain, type, 0));
      for (let times = 0; times < 16; times++)
        await assert.rejects(link.pass('control', odd), /no stream socket/);
      closeSync(odd);
    }
    assert.ok(open() < before + 16, 'none stays open');
    await assert.rejects(link.request({ type: 'connection', door: 'tpm' }), /no descriptor came/);
    await assert.rejects(link.start({ ...other, secret }), /has a vTPM already/);
    link.close();
    assert.equal(await exchange(data, 'nobody else notices'), 'nobody else notices');
    await command.end('SIGTERM');
  });

  it('I-10 who does not wait for answers is cut off', async () => {
    const lost = { id: randomUUID(), vmUuid: randomUUID(), secret: newSecret(), place: '/nowhere' };
    assert.deepEqual(await asked(16, { type: 'inspect', token: lost }), { answers: 16, isCutOff: false });
    const { answers, isCutOff } = await asked(60, { type: 'inspect', token: lost });
    assert.ok(isCutOff, `${answers} answers`);
  });

  it('of two creations for one place at once one is refused', async () => {
    const links = await Promise.all([0, 1].map(() => open()));
    const made = await Promise.allSettled(links.map((link) => link.request(creation(copy))));
    const refused = made.filter(({ status }) => status === 'rejected');
    assert.equal(refused.length, 1);
    assert.match(String((refused[0] as PromiseRejectedResult).reason), /is being made for .*copy already/);
    for (const link of links) link.close();
  });

  it("a place that another user names is in nobody's way, and names are told to no other user", async function () {
    if (!isRoot) this.skip();
    const stranger = await as(STRANGER, open);
    const secret = newSecret();
    await stranger.request(creation(copy));
    const link = await open();
    const own = creation(copy, secret);
    const { name } = await link.request(own);
    await assert.rejects(link.request(creation(copy)), new RegExp(`place of vTPM ${name} `));
    const { id, vmUuid, place } = own;
    const start = stranger.start({ id, vmUuid, place, secret: newSecret() });
    await assert.rejects(
      start,
      (error: Error) => error.message.includes(id) && !error.message.includes(`${name}`),
    );
    for (const each of [stranger, link]) each.close();
  });

  it('who is refused does not keep the connection', async function () {
    if (!isRoot) this.skip();
    const path = supervisor.paths.supervisor.dropinSocket;
    const socket = await as(54399, async () => {
      const connected = connect({ path, allowHalfOpen: true });
      await once(connected, 'connect');
      return connected;
    });
    let isOver = false;
    socket.on('error', () => {
      isOver = true;
    });
    socket.resume();
    await once(socket, 'end');
    await until(() => {
      if (!isOver) socket.write('x');
      return isOver;
    });
  });

  it('an upgrade waits for the request under way, not for those behind it', async () => {
    const socket = await connectDoor(supervisor.paths.supervisor.dropinSocket);
    socket.on('error', () => undefined);
    await once(socket, 'data');
    const requests = Array.from({ length: 12 }, (_, n) =>
      creation(join(copy, `${n}`), newSecret(), `queued-${n}`),
    );
    socket.write(requests.map((request) => `${JSON.stringify(request)}\n`).join(''));
    const { status, body } = await supervisor.call('POST', '/upgrade');
    assert.equal(status, 200, JSON.stringify(body));
    const { body: last } = await supervisor.call('GET', '/vtpms/queued-11');
    assert.equal(last.error?.code, 'unknown-vtpm');
    socket.destroy();
  });

  it('a connection for descriptors is lent to the session that it names, of the same user, only', async () => {
    const socket = await connectDoor(supervisor.paths.supervisor.dropinSocket);
    await once(socket, 'data');
    const request = JSON.stringify({ type: 'descriptors', session: '0'.repeat(32) });
    assert.match(await exchange(socket, `${request}\n`), /there is no such session/);
    // It is a session still, and what is passed on it is nobody's.
    sendDescriptor(socketFd(socket), 0);
    socket.destroy();
  });

  it('ends when its supervisor does, which waits for nobody: the last of these tests', async () => {
    const { command } = await served();
    const path = supervisor.paths.supervisor.dropinSocket;
    const idle = connect({ path, allowHalfOpen: true });
    await once(idle, 'data');
    await supervisor.end('SIGTERM');
    assert.equal(await command.end(), 0);
    idle.destroy();
  });

  const open = () => SupervisorLink.open(supervisor.paths.supervisor.dropinSocket, NOBODY_LISTENS);

  function creation(place: string, secret = newSecret(), name = 'made') {
    const ids = { id: randomUUID(), vmUuid: randomUUID() };
    return { type: 'create' as const, ...ids, place, name, secretSha256: digestOf(secret) };
  }

  /** So many times at once, until there are as many answers or none can come. */
  async function asked(times: number, request: object) {
    const socket = await connectDoor(supervisor.paths.supervisor.dropinSocket);
    socket.on('error', () => undefined);
    const lines = createInterface(socket);
    let answers = -1;
    lines.on('line', () => {
      // The greeting comes first.
      if (++answers === times) lines.close();
    });
    socket.write(`${JSON.stringify(request)}\n`.repeat(times));
    await Promise.race([once(lines, 'close'), once(socket, 'close')]);
    const isCutOff = answers < times;
    socket.destroy();
    return { answers, isCutOff };
  }

  function ctl(...args: string[]) {
    return run(process.execPath, [
      join(REPOSITORY, 'toolstack/bin/vtpmctl.js'),
      '--home',
      home,
      '--run-dir',
      supervisor.paths.run,
      ...args,
    ]);
  }
});

/** Who connects is who this process is at that time. */
async function as<T>(uid: number, work: () => Promise<T>): Promise<T> {
  process.seteuid?.(uid);
  try {
    return await work();
  } finally {
    process.seteuid?.(0);
  }
}

/** The TCP port that a process listens at. */
function portOf(pid: number): number | undefined {
  const inodes = readdirSync(`/proc/${pid}/fd`).map((fd) => {
    try {
      return readlinkSync(`/proc/${pid}/fd/${fd}`);
    } catch {
      // It was closed meanwhile.
      return '';
    }
  });
  // proc(5), /proc/net/tcp: number, local address and port in hex, …, state (0A: listening) …, inode.
  for (const line of readFileSync(`/proc/${pid}/net/tcp`, 'utf8').split('\n')) {
    const [, local, , kind, , , , , , inode] = line.trim().split(/\s+/);
    if (kind === '0A' && inodes.includes(`socket:[${inode}]`))
      return Number.parseInt(local?.split(':')[1] ?? '', 16);
  }
  return undefined;
}
