import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { type AddressInfo, createServer } from 'node:net';
import { connect as connectTls } from 'node:tls';
import { tlsIdentity } from 'vtpm-manager/peer/certificate';
import { tlsOptions } from 'vtpm-manager/peer/tls';
import { Host, makeAuthority } from '../manager/platform-fixture.js';
import { freePort } from '../support/free-port.js';
import { type Finished, run } from '../support/installation.js';
import { ManagerInstallation } from '../support/manager-process.js';
import { startSwtpm } from '../support/swtpm.js';
import { until } from '../support/until.js';
import { Maker } from '../tpm2-ts-bindings/maker.js';
import { vtpmctl } from './cli-fixture.js';

interface Shown {
  readonly identity: string;
  readonly hostId: string;
  readonly endorsement: { readonly fingerprint: string; readonly isCertified: boolean };
  readonly platform: { readonly pcrSelection: string; readonly pcrDigest: string };
  readonly listening: readonly { readonly address: string; readonly failure: string | null }[];
}

interface ShownPeer {
  readonly name: string;
  readonly hostId: string;
  readonly addresses: readonly string[];
  readonly platforms: readonly { readonly pcrSelection: string; readonly pcrDigest: string }[];
  readonly authority: string | null;
  readonly maySend: boolean;
  readonly mayReceive: boolean;
  readonly provenAt: string | null;
}

const ctl = (host: Host, ...args: string[]): Promise<Finished> =>
  run(process.execPath, [
    ...[vtpmctl, '--home', host.manager.home, '--run-dir', `${host.manager.home}/run`],
    ...args,
  ]);

async function done(host: Host, ...args: string[]): Promise<Finished> {
  const finished = await ctl(host, ...args);
  assert.equal(finished.code, 0, `${args.join(' ')}: ${finished.stderr}`);
  return finished;
}

const json = async <T>(host: Host, ...args: string[]): Promise<T> =>
  JSON.parse((await done(host, '--json', ...args)).stdout) as T;

async function identityOf(host: Host): Promise<Shown> {
  const { status, body } = await host.manager.admin('GET', '/identity');
  assert.equal(status, 200, JSON.stringify(body));
  return body as unknown as Shown;
}

async function refusedWith(said: RegExp, host: Host, ...args: string[]): Promise<void> {
  const { code, stderr } = await ctl(host, ...args);
  assert.notEqual(code, 0, args.join(' '));
  assert.match(stderr, said, args.join(' '));
}

describe('vtpmctl peer', () => {
  let a: Host;
  let b: Host;
  let port: number;
  let ofB: Shown;
  let file: string;

  before(async () => {
    [a, b] = await Promise.all([Host.create(), Host.create()]);
    port = await freePort('127.0.0.1', '::1');
    await Promise.all([
      a.manager.start(),
      b.manager.start({ args: ['--peer-listen', `127.0.0.1:${port}, [::1]:${port}`] }),
    ]);
    ofB = await identityOf(b);
    file = b.file('b.peer', `${ofB.identity}\n`);
  });
  after(async () => {
    await Promise.all([a.destroy(), b.destroy()]);
  });
  afterEach(async () => {
    await a.manager.admin('DELETE', '/peers/b');
  });

  const add = (...more: string[]) =>
    json<ShownPeer>(a, 'peer', 'add', 'b', file, '--ek-fingerprint', ofB.endorsement.fingerprint, ...more);

  it('prints the identity alone, and beside it what to compare and what to type next', async () => {
    const { stdout, stderr } = await done(b, 'peer', 'identity');
    assert.match(stdout, /^\{"vtpm-peer":1,.*\}\n$/);
    assert.match(stderr, new RegExp(`EK fingerprint +${ofB.endorsement.fingerprint}`));
    assert.match(
      stderr,
      new RegExp(`vtpmctl peer add NAME FILE --address 127.0.0.1:${port} --ek-fingerprint`),
    );
    assert.deepEqual(ofB.listening, [
      { address: `127.0.0.1:${port}`, failure: null },
      { address: `[::1]:${port}`, failure: null },
    ]);
    assert.deepEqual((await identityOf(a)).listening, []);
    assert.deepEqual(Object.keys(await json<Shown>(b, 'peer', 'identity')), Object.keys(ofB));
  });

  it('makes the attestation key once, which is in the audit log, and keeps it over a restart', async () => {
    const keyOf = (text: string) => (JSON.parse(text) as { attestationKey: string }).attestationKey;
    assert.equal(keyOf((await identityOf(b)).identity), keyOf(ofB.identity));
    await b.manager.stop();
    await b.manager.start({ args: ['--peer-listen', `127.0.0.1:${port}, [::1]:${port}`] });
    const again = await identityOf(b);
    assert.equal(keyOf(again.identity), keyOf(ofB.identity));
    assert.equal(again.hostId, ofB.hostId);
    const log = readFileSync(b.manager.paths.audit, 'utf8');
    assert.equal(log.split('"action":"peer-identity"').length - 1, 1);
  });

  it('never takes the word of the file for whose TPM it is', async () => {
    await refusedWith(
      /by what the TPM of b is known: --ek-ca FILE.*--ek-fingerprint HEX/,
      a,
      'peer',
      'add',
      'b',
      file,
    );
    const { identity, endorsement } = ofB;
    const named = { name: 'b', identity };
    for (const given of [named, { ...named, ekCa: 'x', ekFingerprint: endorsement.fingerprint }]) {
      const { status, body } = await a.manager.admin('POST', '/peers', given);
      assert.equal(status, 400, JSON.stringify(body));
    }
    await refusedWith(
      new RegExp(
        `has the fingerprint ${ofB.endorsement.fingerprint} and not the one that was given.*peer-ek`,
      ),
      ...([a, 'peer', 'add', 'b', file, '--ek-fingerprint', 'ab'.repeat(32)] as const),
    );

    // This chip has no certificate, and an authority that vouches for nothing.
    const ca = a.file('ca.pem', tlsIdentity(randomBytes(32)).certificate);
    await refusedWith(/has no certificate.*--ek-fingerprint/, a, 'peer', 'add', 'b', file, '--ek-ca', ca);
    assert.deepEqual((await a.manager.admin('GET', '/peers')).body, { peers: [] });
  });

  it("takes a TPM under its maker's authority, and under no other", async () => {
    const maker = new Maker();
    const tpm = await startSwtpm();
    const c = new ManagerInstallation();
    try {
      await maker.manufacture(tpm);
      await c.init(`unix:${tpm.socket}`);
      await c.start();
      const { identity, endorsement } = (await c.admin('GET', '/identity')).body as unknown as Shown;
      assert.equal(endorsement.isCertified, true);
      const of = [a, 'peer', 'add', 'b', a.file('c.peer', identity), '--ek-ca'] as const;
      const stranger = a.file('stranger.pem', tlsIdentity(randomBytes(32)).certificate);
      await refusedWith(/no trusted root vouches for it.*peer-ek/, ...of, stranger);
      const ca = a.file('maker.pem', `${maker.issuer}${maker.root}`);
      assert.match((await done(...of, ca)).stdout, /known by +CN=swtpm-localca/);
    } finally {
      await c.remove();
      await tpm.stop();
      maker.remove();
    }
  });

  it('refuses what is no identity, its own, and one that is there already', async () => {
    const pin = ['--ek-fingerprint', ofB.endorsement.fingerprint];
    const changed = b.file('changed', ofB.identity.replace(/"tlsKey":"../, '"tlsKey":"00'));
    await refusedWith(/changed on its way/, a, 'peer', 'add', 'b', changed, ...pin);

    await refusedWith(/FILE: ENOENT/, a, 'peer', 'add', 'b', '/nothing', ...pin);
    await refusedWith(/FILE: .*is empty/, a, 'peer', 'add', 'b', b.file('empty', ''), ...pin);
    await refusedWith(/identity of this host; add it on the other one/, b, 'peer', 'add', 'me', file, ...pin);

    await refusedWith(
      /is no address; it is HOST:PORT/,
      a,
      'peer',
      'add',
      'b',
      file,
      ...pin,
      '--address',
      '192.0.2.7',
    );
    await add();
    await refusedWith(/host id already: b.*vtpmctl peer remove b/, a, 'peer', 'add', 'c', file, ...pin);
  });

  it('approves the platform of the identity only where it is asked to', async () => {
    assert.deepEqual((await add()).platforms, []);
    const { stderr } = await done(a, 'peer', 'show', 'b');
    assert.match(stderr, /no platform of it is approved.*vtpmctl peer approve b --current FILE/);
    await done(a, 'peer', 'approve', 'b', '--current', file);
    const { pcrSelection, pcrDigest } = ofB.platform;
    const platform = `${pcrSelection}=${pcrDigest}`;
    assert.match((await done(a, 'peer', 'show', 'b')).stdout, new RegExp(`platform +${platform} since`));
    await done(a, 'peer', 'approve', 'b', '--withdraw', platform);
    await refusedWith(/is not approved for b/, a, 'peer', 'approve', 'b', '--withdraw', platform);
    const two = `${pcrSelection}=${'cd'.repeat(32)}`;
    const both = await json<ShownPeer>(a, 'peer', 'approve', 'b', '--pcrs', platform, '--pcrs', two);
    assert.deepEqual(
      both.platforms.map((one) => `${one.pcrSelection}=${one.pcrDigest}`),
      [platform, two],
    );
    await refusedWith(
      /is no platform; it is SELECTION=DIGEST/,
      a,
      'peer',
      'approve',
      'b',
      '--pcrs',
      'sha256:7',
    );

    await refusedWith(/is not the identity of b/, a, 'peer', 'approve', 'b', '--current', await ownFile());
  });

  async function ownFile(): Promise<string> {
    return a.file('a.peer', (await identityOf(a)).identity);
  }

  it('says of each what is proven of it and what it may, and changes that', async () => {
    const authority = a.file('authority.pem', makeAuthority().publicKey);
    const peer = await add(
      '--approve-current',
      '--no-send',
      '--address',
      `[::1]:${port}`,
      '--address',
      'b.example:1',
    );
    assert.equal(peer.provenAt, null);
    assert.deepEqual([peer.maySend, peer.mayReceive], [false, true]);
    assert.deepEqual(peer.addresses, [`[::1]:${port}`, 'b.example:1']);
    const { stdout } = await done(a, 'peer', 'list');
    assert.match(
      stdout,
      /^NAME +ADDRESS +PROVEN +PLATFORM +VTPMS +HOST ID\nb .*not yet +1 approved +go +[0-9a-f]{16}\n$/,
    );
    const changed = await json<ShownPeer>(
      ...([a, 'peer', 'change', 'b', '--send', '--no-receive', '--authority', authority] as const),
      ...['--address', '127.0.0.1:1'],
    );
    assert.deepEqual([changed.maySend, changed.mayReceive], [true, false]);
    assert.deepEqual(changed.addresses, ['127.0.0.1:1']);
    assert.match(changed.authority ?? '', /BEGIN PUBLIC KEY/);
    assert.match((await done(a, 'peer', 'show', 'b')).stdout, /authority +SHA-256 [0-9a-f]{64}/);
    const without = await json<ShownPeer>(a, 'peer', 'change', 'b', '--no-authority');
    assert.deepEqual([without.authority, without.maySend, without.mayReceive], [null, true, false]);
    await refusedWith(/say what to change/, a, 'peer', 'change', 'b');
    const nowhere = await ctl(a, 'peer', 'change', 'b', '--address', 'b.example');
    assert.equal(nowhere.code, 2);
    assert.match(nowhere.stderr, /--address: "b.example" is no address; it is HOST:PORT/);

    const blunt = await ctl(a, 'peer', 'add', 'c', authority, '--ek-fingerprint', 'aa');
    assert.deepEqual([blunt.code, /--ek-fingerprint is 64 hex/.test(blunt.stderr)], [2, true], blunt.stderr);

    await refusedWith(/vtpmctl peer list/, a, 'peer', 'show', 'c');
  });

  it('writes each change into the audit log, done or refused', async () => {
    await add();
    await done(a, 'peer', 'change', 'b', '--no-send');
    await done(a, 'peer', 'remove', 'b');
    await refusedWith(/no peer b/, a, 'peer', 'remove', 'b');
    const { entries } = await json<{ entries: { action: string; verdict: string }[] }>(
      ...([a, 'audit', 'tail', '--lines', '7'] as const),
    );
    assert.deepEqual(
      entries.map(({ action, verdict }) => `${action} ${verdict}`),
      [
        ...['peer-add intended', 'peer-add done', 'peer-change intended', 'peer-change done'],
        ...['peer-remove intended', 'peer-remove done', 'peer-remove refused'],
      ],
    );
  });

  it('is not spoken to by a host that was not added: it is in the log', async () => {
    const stranger = tlsIdentity(randomBytes(32));
    const socket = connectTls({
      ...tlsOptions(stranger),
      port,
      host: '127.0.0.1',
      rejectUnauthorized: false,
    });
    socket.on('error', () => undefined);
    let came = 0;
    socket.on('data', (chunk: Buffer) => {
      came += chunk.length;
    });
    await once(socket, 'close');
    assert.equal(came, 0);
    const entry = await until('the log has it', async () => {
      const text = readFileSync(b.manager.paths.audit, 'utf8');
      return text.split('\n').find((line) => line.includes('"peer-connect"'));
    });
    assert.match(entry, new RegExp(`"refused".*"unknown-peer".*${stranger.publicKey.toString('hex')}`));
  });
});

describe('the setting peer-listen', () => {
  let host: Host;
  before(async () => {
    host = await Host.create();
  });
  after(() => host.destroy());

  it('that is no address stops the manager at its start, by name', async () => {
    for (const [value, said] of [
      ['192.0.2.7', /"192.0.2.7" is no address; it is HOST:PORT/],

      ['host;rm:1', /--peer-listen is HOST:PORT, several with commas/],
    ] as const) {
      const { code, stderr } = await host.manager.run('--peer-listen', value);
      assert.equal(code, 1, stderr);
      assert.match(stderr, said);
    }
  });

  it('whose address cannot be had does not keep the manager from serving, is shown, and is tried again', async () => {
    const squatter = createServer();
    squatter.listen(0, '127.0.0.1');
    await once(squatter, 'listening');
    const address = `127.0.0.1:${(squatter.address() as AddressInfo).port}`;
    assert.equal((await host.manager.start({ args: ['--peer-listen', address] })).status, 'ready');
    const shown = await identityOf(host);
    assert.match(shown.listening[0]?.failure ?? '', /EADDRINUSE/);
    assert.match(host.manager.stderr, /no other host is listened for here.*peer-listen/);
    squatter.close();
    await once(squatter, 'close');
    await until('it listens', async () => {
      const { listening } = await identityOf(host);
      return listening[0]?.failure === null;
    });
  });
});
