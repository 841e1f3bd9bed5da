/**
 * The store process: LMDB behind the frames of child-protocol.ts. It holds no key. Damaged LMDB files can make the
 * library read or jump anywhere, and then it is this process that ends and not the manager.
 *
 *     node child-main.js DIRECTORY create|open      with descriptor 3: the socket to the manager,
 *                                                   descriptor 4: the lock, held until the process ends
 */
import { Socket } from 'node:net';
import {
  Answer,
  decodeKey,
  decodeList,
  decodeWrites,
  encodeEntries,
  encodeFrame,
  type Frame,
  FrameReader,
  ProtocolError,
  Request,
} from './child-protocol.js';
import { type Environment, EnvironmentError, openEnvironment } from './lmdb-environment.js';

const CHANNEL_FD = 3;
const [directory = '', mode = ''] = process.argv.slice(2);

// The manager's end outlives ours: what was asked before it said "end" is still answered.
const channel = new Socket({ fd: CHANNEL_FD, readable: true, writable: true, allowHalfOpen: true });
channel.on('error', () => process.exit(0));
channel.on('close', () => process.exit(0));
channel.on('end', () => channel.end());

const environment = openOrSay();
if (environment) {
  const reader = new FrameReader();
  channel.on('data', (chunk) => {
    for (const frame of reader.push(chunk)) channel.write(answer(environment, frame));
  });
  channel.write(encodeFrame(Answer.done, 0, []));
}

function openOrSay(): Environment | undefined {
  try {
    return openEnvironment(directory, mode === 'create');
  } catch (error) {
    if (!(error instanceof EnvironmentError)) throw error;
    channel.end(sentence(error, 0));
    return undefined;
  }
}

function answer(environment: Environment, { code, id, body }: Frame): Buffer {
  try {
    switch (code) {
      case Request.get: {
        const entry = environment.get(decodeKey(body));
        return encodeFrame(Answer.done, id, entry ? encodeEntries([entry]) : []);
      }
      case Request.commit:
        return encodeFrame(environment.commit(decodeWrites(body)) ? Answer.done : Answer.stale, id, []);
      case Request.list: {
        const { after, limit } = decodeList(body);
        return encodeFrame(Answer.done, id, encodeEntries(environment.list(after, limit)));
      }
      default:
        throw new ProtocolError(`there is no request ${code}`);
    }
  } catch (error) {
    // Anything else ends the process: the manager must not go on with a store that it cannot know.
    if (!(error instanceof EnvironmentError)) throw error;
    return sentence(error, id);
  }
}

function sentence(error: EnvironmentError, id: number): Buffer {
  return encodeFrame(error.answer, id, [Buffer.from(error.message.slice(0, 500))]);
}
