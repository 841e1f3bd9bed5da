// A worker without a TPM: it speaks the control protocol and echoes what guests send. Over its manager link it talks
// lines of JSON with the stub manager of supervisor-fixture.ts. Runs inside of the real sandbox, as a worker image.
import { randomBytes } from 'node:crypto';
import { closeSync, fstatSync } from 'node:fs';
import { Socket } from 'node:net';
import { receiveDescriptor } from 'vtpm-common/libc';
import { seccompFilter } from 'vtpm-common/seccomp/filter';
import { installFilter } from 'vtpm-common/seccomp/install';
import { CheckpointMemory } from 'vtpmd/checkpoint/memory';

const control = new Socket({ fd: 4 });
let link: Socket;
let memory: { readonly map: CheckpointMemory; readonly inode: number } | undefined;
let isHanging = false;

function say(message: object): void {
  control.write(`${JSON.stringify(message)}\n`);
}

function lines(socket: Socket, take: (message: Record<string, string>) => void): void {
  let pending = '';
  socket.setEncoding('utf8');
  socket.on('data', (chunk: string) => {
    const parts = (pending + chunk).split('\n');
    pending = parts.pop() ?? '';
    for (const part of parts) take(JSON.parse(part) as Record<string, string>);
  });
}

/** The manager greets first, as an HTTP/2 server does: a greeting that is lost is a link that is broken. */
function useLink(fd: number, isFirst: boolean): void {
  link = new Socket({ fd });
  link.on('error', () => {});
  link.on('close', () => say({ type: 'link-lost' }));
  lines(link, (message) => {
    if (message.type === 'greeting') {
      if (isFirst) say({ type: 'ready', publicKey: randomBytes(32).toString('hex'), libtpms: '0.9.2' });
      else say({ type: 'link-up' });
    } else if (message.type === 'failed') {
      control.write(`${JSON.stringify(message)}\n`, () => process.exit(1));
    } else {
      say(message);
    }
  });
}

/** The memory and both ends of a pipe, or of two where there is a control door. */
function takeCheckpoint({ control: hasTwo }: { control?: boolean }): void {
  const fd = receiveDescriptor(5) ?? -1;
  for (let end = 0; end < (hasTwo ? 4 : 2); end++) closeSync(receiveDescriptor(5) ?? -1);
  memory = { map: CheckpointMemory.map(fd), inode: fstatSync(fd).ino };
  closeSync(fd);
}

/** The supervisor reads how often; whoever writes it may lie. */
function saysThatItAnswered(): void {
  memory?.map.marks.piped(Date.now());
}

function serve(id: number, fd: number): void {
  const guest = new Socket({ fd });
  guest.on('error', () => {});
  guest.on('close', () => say({ type: 'connection-closed', id }));
  guest.on('data', (data) => {
    const text = data.toString();
    if (text === 'crash') process.exit(7);
    if (text === 'rise') saysThatItAnswered();
    if (text === 'babble') control.write('{"type":"connection-closed"}\n');
    if (text === 'half') control.write('{"type":"link');
    if (text === 'rest') control.write('-up"}\n');
    if (text === 'hang') isHanging = true;
    // What its VMM waits for is done by a TPM.
    if (text === 'init')
      say({ type: 'vmm-calls', request: 'INIT', referenceDigest: null, bufferSize: 0, locality: 0 });
    if (text === 'who') {
      guest.write(`${id}`);
      return;
    }
    guest.write(data);
  });
}

lines(control, (message) => {
  if (message.checkpoint) takeCheckpoint(message.checkpoint as unknown as { control?: boolean });
  if (message.type === 'lost') say({ type: 'lost' });
  if (message.type === 'stand-in') say({ type: 'standing-in' });
  if (message.type === 'identity') link.write(`${JSON.stringify({ ...message, memory: memory?.inode })}\n`);
  if (message.type === 'rehearse') say({ type: 'rehearsed' });
  if (message.type === 'link') useLink(receiveDescriptor(5) ?? -1, false);
  if (message.type === 'connection') serve(Number(message.id), receiveDescriptor(5) ?? -1);
  if (message.type === 'stop' && !isHanging) {
    control.write(`${JSON.stringify({ type: 'stopped' })}\n`, () => process.exit(0));
  }
});
control.on('close', () => process.exit(2));
if (!process.argv.includes('--no-seccomp')) installFilter(seccompFilter('serve'));
useLink(3, true);
