import assert from 'node:assert/strict';
import { once } from 'node:events';
import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net';
import { peerUid } from 'vtpm-toolstack/supervisor/peer-uid';

describe('whose a connection over the loopback interface is', () => {
  let server: Server;
  beforeEach(async () => {
    server = createServer({ pauseOnConnect: true, allowHalfOpen: true }).listen(0, '127.0.0.1');
    await once(server, 'listening');
  });
  afterEach(() => server.close());

  async function accepted(): Promise<{ here: Socket; there: Socket }> {
    const there = connect({
      port: (server.address() as AddressInfo).port,
      host: '127.0.0.1',
      allowHalfOpen: true,
    });
    const [[here]] = await Promise.all([once(server, 'connection'), once(there, 'connect')]);
    return { here, there };
  }

  it('is its user while it is open, also where this end has said its last', async () => {
    const { here, there } = await accepted();
    assert.equal(peerUid(here), process.getuid?.());
    there.resume();
    here.end();
    await once(there, 'end');
    assert.equal(peerUid(here), process.getuid?.());
    there.destroy();
    here.destroy();
  });

  it('is nobody where it is closed, whatever it has sent: the kernel shows it as of root', async () => {
    for (let times = 0; times < 20; times++) {
      const { here, there } = await accepted();
      there.write('x');
      there.destroy();
      await once(there, 'close');
      assert.equal(peerUid(here), undefined);
      here.destroy();
    }
  });
});
