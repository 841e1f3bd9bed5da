import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { generateKeyPairSync } from 'node:crypto';
import { existsSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { connectGuest } from 'vtpm-quickstart/guest';
import { type Finished, Installation, REPOSITORY, run } from '../support/installation.js';
import { startSwtpm } from '../support/swtpm.js';

const VTPMCTL = join(REPOSITORY, 'toolstack/bin/vtpmctl.js');

describe('vtpmctl platform', () => {
  let host: Installation;
  let desk: string;
  const file = (name: string, content?: string) => {
    const path = join(desk, name);
    if (content !== undefined) writeFileSync(path, content, { mode: 0o600 });
    return path;
  };
  const ok = async (...args: string[]): Promise<string> => {
    const { code, stdout, stderr } = await host.ctl(...args);
    assert.equal(code, 0, `vtpmctl ${args.join(' ')}: ${stderr}`);
    return stdout;
  };
  const fails = async (status: number, pattern: RegExp, ...args: string[]): Promise<void> => {
    const { code, stderr, stdout } = await host.ctl(...args);
    assert.equal(code, status, stdout + stderr);
    assert.match(stderr, pattern);
  };
  /** Without home, daemon or TPM, as where the authority's key is. */
  const elsewhere = (...args: string[]): Promise<Finished> =>
    run(process.execPath, [VTPMCTL, '--home', join(desk, 'nowhere'), ...args]);
  const tools = (program: string, ...args: string[]) =>
    promisify(execFile)(program, args, {
      env: { ...process.env, TPM2TOOLS_TCTI: `swtpm:path=${host.tpm?.socket}`, TSS2_LOG: 'all+NONE' },
    });
  const extend = (digit: string) => tools('tpm2_pcrextend', `16:sha256=${digit.repeat(64)}`);
  const reset = () => tools('tpm2_pcrreset', '16');

  before(async () => {
    desk = mkdtempSync(join(tmpdir(), 'vtpm-desk-'));
    const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
    file('public.pem', publicKey.export({ type: 'spki', format: 'pem' }) as string);
    file('authority.pem', privateKey.export({ type: 'pkcs8', format: 'pem' }) as string);
    const encrypted = { type: 'pkcs8', format: 'pem', cipher: 'aes-256-cbc', passphrase: 'open it' } as const;
    file('encrypted.pem', privateKey.export(encrypted) as string);
    file('passphrase', 'open it\n');
  });
  after(() => rmSync(desk, { recursive: true, force: true }));
  beforeEach(async () => {
    host = await Installation.create({ initArgs: ['--pcrs', 'sha256:16'] });
  });
  afterEach(() => host.destroy());

  const adopt = () =>
    ok(
      ...['platform', 'adopt', '--authority', file('public.pem'), '--key', file('authority.pem')],
      ...['--label', 'firmware 1'],
    );

  it('a firmware update day, signed on another machine', async () => {
    await host.startManager();
    assert.match(
      await ok('platform', 'show'),
      /policy +fixed[\s\S]*PCR sha256:16 +0{64}\n[\s\S]*approved now +yes/,
    );
    // Before there is an authority its first approval is signed elsewhere too.
    file('request.json', await ok('platform', 'predict', '--label', 'firmware 1'));
    const signed = await elsewhere(
      ...['platform', 'sign', '--key', file('encrypted.pem'), '--passphrase-file', file('passphrase')],
      file('request.json'),
    );
    assert.equal(signed.code, 0, signed.stderr);
    assert.match(signed.stderr, /signed +firmware 1[\s\S]*PCR sha256:16 +0{64}/);
    file('approval.json', signed.stdout);
    assert.match(
      await ok(
        ...['platform', 'adopt', '--authority', file('public.pem'), '--approval', file('approval.json')],
      ),
      /authority approves of sha256:16 \(generation 2\)/,
    );
    await host.stopDaemons();
    await extend('a');
    const { stdout } = await tools('tpm2_pcrread', 'sha256:16');
    const next = /0x([0-9A-F]{64})/.exec(stdout)?.[1]?.toLowerCase() ?? '';
    await reset();
    await host.startManager();
    const predicted = await ok('platform', 'predict', '--set', `16=${next}`, '--label', 'firmware 2');
    file('request.json', predicted);
    const approval = await elsewhere(
      ...['platform', 'sign', '--key', file('authority.pem'), file('request.json')],
    );
    file('approval.json', approval.stdout);
    assert.match(await ok('platform', 'approve', file('approval.json')), /approved "firmware 2"; ready/);
    await host.stopDaemons();
    await extend('a');
    assert.equal((await host.startManager()).body.status, 'ready');
    const list = await ok('platform', 'list');
    assert.match(list, /firmware 1 .*ready[\s\S]*firmware 2 .*active/);
    // The old one is revoked; what is good is signed anew and the counter counted.
    await fails(
      2,
      /is called "firmware 3"; there are "firmware 1", "firmware 2"/,
      'platform',
      'revoke',
      'firmware 3',
      '--key',
      file('authority.pem'),
    );
    await fails(1, /stay locked/, 'platform', 'revoke', 'firmware 2', '--key', file('authority.pem'));
    assert.match(
      await ok('platform', 'revoke', 'firmware 1', '--key', file('authority.pem')),
      /revoked +firmware 1\nsurvivors +1/,
    );
    assert.match(await ok('platform', 'list'), /firmware 1 .*revoked[\s\S]*firmware 2 .*active/);
    // The same with survivors that were signed elsewhere.
    file('request.json', await ok('platform', 'predict', '--next', '--label', 'firmware 2 again'));
    const survivor = await elsewhere(
      'platform',
      'sign',
      '--key',
      file('authority.pem'),
      file('request.json'),
    );
    file('survivor.json', survivor.stdout);
    await ok('platform', 'revoke', '--survivors', file('survivor.json'));
    await host.stopDaemons();
    assert.equal((await host.startManager()).body.status, 'ready');
  });

  it('says what is locked and what helps, and unlocks while guests wait', async () => {
    await host.start();
    const door = await host.vtpm('web1');
    await adopt();
    const guest = await connectGuest(door);
    await guest.defineCounter();
    await host.killManager();
    await extend('b');
    assert.equal((await host.startManager()).body.status, 'locked');
    const help = /PCR sha256:16 is [0-9a-f]{16}… .*"firmware 1".*vtpmctl platform approve --key FILE --label/;
    for (const command of [['up'], ['list'], ['show', 'web1'], ['platform', 'rotate']]) {
      await fails(4, help, ...command);
    }
    const json = await host.ctl('--json', 'platform', 'rotate');
    assert.equal((JSON.parse(json.stderr) as { error: { code: string } }).error.code, 'locked');
    assert.match(await ok('platform', 'show'), /approved now +no[\s\S]*locked +.*PCR sha256:16/);
    const pid = await host.workerPid('web1');
    const stepped = guest.increment();
    assert.match(
      await ok('platform', 'approve', '--key', file('authority.pem'), '--label', 'this one'),
      /approved "this one"; active[\s\S]*the manager is unlocked/,
    );
    await stepped;
    assert.equal(await host.workerPid('web1'), pid);
    await guest.close();
    assert.equal((await host.ctlJson('show', 'web1')).state, 'running');
  });

  it('rotates, and says so', async () => {
    await host.startManager();
    const rotated = await host.ctlJson('platform', 'rotate');
    assert.deepEqual(rotated, { generation: 2, policy: 'fixed', pcrSelection: 'sha256:16' });
    assert.match(await ok('platform', 'rotate'), /generation 3/);
    assert.match(await ok('platform', 'adopt', '--pcrs', 'sha256:16,23'), /sha256:16,23 is as now/);
    await host.stopDaemons();
    await tools('tpm2_changeauth', '-c', 'owner', 'secret');
    await host.startManager();
    await fails(1, /--owner-auth-file/, 'platform', 'rotate');
    await ok('platform', 'rotate', '--owner-auth-file', file('owner', 'secret\n'));
  });

  it('refuses wrong usage before anything is asked', async () => {
    for (const [pattern, ...args] of [
      [/--label is missing/, 'predict'],
      [/--set is PCR=HEX/, 'predict', '--label', 'x', '--set', '7:abc', '--pcrs', 'sha256:7'],
      [/--key is missing/, 'sign', file('none.json', '{}')],
      [/damaged|no approval request/, 'sign', '--key', file('authority.pem'), file('none.json', '{}')],
      [/not JSON/, 'sign', '--key', file('authority.pem'), file('text', 'text')],
      [/--passphrase-file/, 'approve', '--key', file('encrypted.pem'), '--label', 'x', '--pcrs', 'sha256:16'],
      [/name a signed approval/, 'approve'],
      [/go with --key/, 'approve', file('none.json'), '--label', 'x'],
      [/name what is to be revoked/, 'revoke', '--key', file('authority.pem')],
      [/--survivors/, 'revoke', 'x'],
      [/say what to adopt/, 'adopt'],
      [/exclude each other/, 'adopt', '--none', '--authority', file('public.pem')],
      [/go together/, 'adopt', '--authority', file('public.pem'), '--label', 'x'],
      [/this is no key/, 'adopt', '--authority', file('text')],
      [/ENOENT/, 'rotate', '--owner-auth-file', file('absent')],
    ] as const) {
      if (args[0] === 'approve' && args[1] === '--key') await host.startManager();
      await fails(2, pattern, 'platform', ...args);
    }
  });
});

describe('the recovery key', () => {
  let desk: string;
  beforeEach(() => {
    desk = mkdtempSync(join(tmpdir(), 'vtpm-desk-'));
  });
  afterEach(() => rmSync(desk, { recursive: true, force: true }));

  const KEY = /vtpm-recovery-1-[0-9a-f]{64}/;

  it('is shown once by init, in text and JSON, or goes into a file', async () => {
    const tpm = await startSwtpm();
    const home = (name: string) => ['--home', join(desk, name), '--log-level', 'error'];
    const init = (name: string, ...args: string[]) =>
      run(process.execPath, [VTPMCTL, ...home(name), 'init', '--tpm', `unix:${tpm.socket}`, ...args]);
    try {
      const text = await init('a');
      const key = KEY.exec(text.stdout)?.[0] ?? '';
      assert.match(text.stdout, /recovery key: vtpm-recovery[\s\S]*shown this once[\s\S]*next: vtpmctl up/);
      const found = await run('grep', ['-rl', key.slice(-64), join(desk, 'a')]);
      assert.equal(found.stdout, '', 'it is on no disk');
      const json = JSON.parse((await init('b', '--json')).stdout) as Record<string, string>;
      assert.match(String(json.recoveryKey), KEY);
      const path = join(desk, 'recovery.key');
      const kept = await init('c', '--recovery-key-file', path);
      assert.equal(kept.code, 0, kept.stderr);
      assert.doesNotMatch(kept.stdout + kept.stderr, KEY);
      assert.match(kept.stdout, /take it away from this host/);
      assert.match(readFileSync(path, 'utf8'), KEY);
      assert.equal(statSync(path).mode & 0o777, 0o600);
      const again = await init('d', '--recovery-key-file', path);
      assert.equal(again.code, 2);
      assert.match(again.stderr, /exists, and is not overwritten/);
      assert.ok(!existsSync(join(desk, 'd', 'manager')));
      // What fails leaves no empty file.
      const other = join(desk, 'other.key');
      assert.equal((await init('e', '--pcrs', 'sha256:99', '--recovery-key-file', other)).code, 2);
      assert.ok(!existsSync(other));
    } finally {
      await tpm.stop();
    }
  });

  it('vtpmctl recover goes over to a new TPM with it, and shows the new one once', async () => {
    const host = await Installation.create({ initArgs: ['--recovery-key-file', join(desk, 'old.key')] });
    const chip = await startSwtpm();
    try {
      await host.start();
      const guest = await connectGuest(await host.vtpm('web1'));
      const endorsement = await guest.endorsement();
      await guest.close();
      const running = await host.ctl('recover');
      assert.match(running.stderr, /in-use|runs/);
      await host.stopDaemons();
      const nothing = await host.ctl('recover');
      assert.match(nothing.stdout, /nothing to recover/);
      const args = ['recover', '--recovery-key-file', join(desk, 'old.key'), '--tpm', `unix:${chip.socket}`];
      const said = await host.ctl(...args);
      assert.equal(said.code, 0, said.stderr);
      assert.match(said.stdout, /goes back from an unknown generation to generation \d+ \(epoch .*\)$/m);
      assert.match(said.stdout, /nothing was changed/);
      const done = await host.ctl(
        ...args,
        '--accept-rollback',
        '--new-recovery-key-file',
        join(desk, 'new.key'),
      );
      assert.equal(done.code, 0, done.stderr);
      assert.match(
        done.stdout,
        /went back .*, and on with \d+, [\s\S]*mark for ever[\s\S]*new\.key: take it away[\s\S]*old recovery key is void/,
      );
      assert.doesNotMatch(done.stdout, KEY);
      assert.match(readFileSync(join(desk, 'new.key'), 'utf8'), KEY);
      await host.start();
      const shown = await host.ctl('show', 'web1');
      assert.match(shown.stdout, /mark +recovered/);
      await host.ctlJson('start', 'web1');
      const again = await connectGuest(host.door('web1'));
      assert.equal(await again.endorsement(), endorsement);
      await again.close();
      await host.stopDaemons();
      const old = await host.ctl('recover', '--recovery-key-file', join(desk, 'old.key'));
      assert.equal(old.code, 1);
      assert.match(old.stderr, /does not open with this key/);
      const wrong = await host.ctl('recover', '--pcrs', 'sha256:7');
      assert.equal(wrong.code, 2);
    } finally {
      await host.destroy();
      await chip.stop();
    }
  });
});
