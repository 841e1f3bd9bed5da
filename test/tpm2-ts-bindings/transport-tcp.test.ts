import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { openSwtpm, openTcp, openTpm, readRandom } from 'tpm2-ts-bindings';
import { freePort } from '../support/free-port.js';
import { reapAtExit } from '../support/reap.js';
import { until } from '../support/until.js';
import { has } from './make.js';

/** A connection to find out would take the place of the one client. */
function isListening(port: number): boolean {
  const local = `:${port.toString(16).toUpperCase().padStart(4, '0')}`;
  return ['tcp', 'tcp6'].some((table) =>
    readFileSync(`/proc/net/${table}`, 'utf8')
      .split('\n')
      .map((line) => line.trim().split(/\s+/))
      // 0A is TCP_LISTEN.
      .some((fields) => fields[1]?.endsWith(local) && fields[3] === '0A'),
  );
}

/** On ports that nobody has. swtpm does not take one whose last connection is still remembered: then others. */
async function startTcp(bind: string, directory: string) {
  for (;;) {
    const [data, control] = [await freePort(bind), await freePort(bind)];
    const child = spawn('swtpm', [
      ...['socket', '--tpm2', '--tpmstate', `dir=${directory}`],
      ...['--server', `type=tcp,port=${data},bindaddr=${bind}`],
      ...['--ctrl', `type=tcp,port=${control},bindaddr=${bind}`],
      ...['--flags', 'not-need-init,startup-clear'],
    ]);
    reapAtExit(child);
    const listens = await until('swtpm listens or ends', () =>
      child.exitCode !== null ? 'ended' : isListening(data) && isListening(control) && 'listens',
    );
    if (listens === 'listens') return { child, data, control };
  }
}

describe('tpm2-ts-bindings: TCP transport', () => {
  for (const host of ['127.0.0.1', '::1', 'localhost']) {
    it(`swtpm at ${host}`, async () => {
      const bind = host === 'localhost' ? '127.0.0.1' : host;
      const directory = mkdtempSync(join(tmpdir(), 'vtpm-tcp-'));
      const { child, data, control } = await startTcp(bind, directory);
      const exited = once(child, 'exit');
      try {
        const channels = { data: { host, port: data }, control: { host, port: control } };
        for (const address of [channels.data, channels]) {
          const tpm = await openTpm(address);
          assert.equal((await readRandom(tpm, 32)).length, 32);
          await tpm.close();
        }
        const transport = await openSwtpm(channels);
        assert.equal(await transport.established(), false);
        await transport.shutdown();
        await exited;
      } finally {
        child.kill('SIGKILL');
        await exited;
        rmSync(directory, { recursive: true, force: true });
      }
    });
  }

  it('nobody there: a named error', async () => {
    const port = await freePort('127.0.0.1', '::1');
    await assert.rejects(openTcp({ host: '127.0.0.1', port }), (error: unknown) => {
      assert.match(String(error), new RegExp(`127.0.0.1:${port}: nobody listens there`));
      return has('transport')(error);
    });
    await assert.rejects(openTcp({ host: '::1', port }), /\[::1\]:/);
  });
});
