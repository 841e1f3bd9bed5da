import assert from 'node:assert/strict';
import { once } from 'node:events';
import { performServerHandshake, type ServerHttp2Stream } from 'node:http2';
import { duplexPair } from 'node:stream';
import { encode, frameMessage, type ManagerFrame, type WorkerFrame } from 'vtpm-proto';
import { type ManagerLink, openManagerLink } from 'vtpmd/manager-link/manager-link';

const NOTHING = new Uint8Array(0);
const HELLO: WorkerFrame = {
  ...{ type: 'HELLO', sequence: 1n, vtpmUuid: NOTHING, sessionId: NOTHING },
  ...{ nonce: NOTHING, sealed: Buffer.from('hello') },
};
const ACK: ManagerFrame = { type: 'ACK', sequence: 1n, nonce: NOTHING, sealed: Buffer.from('welcome') };

describe('the Save stream of a link', () => {
  let link: ManagerLink;
  const calls: ServerHttp2Stream[] = [];
  let onCall: (call: ServerHttp2Stream) => void;
  beforeEach(() => {
    const [here, there] = duplexPair();
    calls.length = 0;
    onCall = () => undefined;
    performServerHandshake(there).on('stream', (call) => {
      call.on('error', () => undefined);
      calls.push(call);
      onCall(call);
    });
    link = openManagerLink(here);
  });
  afterEach(() => link.close());

  function saved(): Promise<Buffer> {
    return new Promise((resolve, reject) => {
      const stream = link.openSave((frame) => resolve(Buffer.from(frame.sealed)), reject);
      stream.send(HELLO);
    });
  }
  const begun = () =>
    new Promise<void>((resolve) => {
      onCall = () => resolve();
    });
  function welcome(call: ServerHttp2Stream): void {
    call.respond({ ':status': 200, 'content-type': 'application/grpc' });
    call.once('data', () => call.write(frameMessage(encode('ManagerFrame', ACK))));
  }

  it('is the one that was prepared', async () => {
    const isBegun = begun();
    link.prepareSave();
    await isBegun;
    welcome(calls[0]!);
    assert.equal(String(await saved()), 'welcome');
    assert.equal(calls.length, 1);
  });

  it('is another one where the manager did not wait so long', async () => {
    const isBegun = begun();
    link.prepareSave();
    await isBegun;
    const [given] = calls;
    given!.respond({ ':status': 200, 'grpc-status': '3', 'grpc-message': 'no HELLO' }, { endStream: true });
    await once(given!, 'close');
    onCall = welcome;
    assert.equal(String(await saved()), 'welcome');
    assert.equal(calls.length, 2);
  });
});
