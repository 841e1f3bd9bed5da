import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import fc from 'fast-check';
import { parseArguments } from 'vtpm-toolstack/dropin/arguments';
import { setupCapabilities, swtpmCapabilities } from 'vtpm-toolstack/dropin/capabilities';
import { nameFor } from 'vtpm-toolstack/dropin/creation';
import { parseOptionValue } from 'vtpm-toolstack/dropin/option-value';
import { DropinRefusal } from 'vtpm-toolstack/dropin/refusal';
import { parseSetupArguments } from 'vtpm-toolstack/dropin/setup-arguments';
import { parseSwtpmArguments } from 'vtpm-toolstack/dropin/swtpm-arguments';
import { isA } from '../support/is-a.js';

const PARTS = { type: 'text', path: 'text', port: 'number', mode: 'mode', disconnect: 'flag' } as const;
const refusal = (pattern: RegExp) => (error: unknown) => {
  assert.ok(isA(error, DropinRefusal), String(error));
  assert.match(error.message, pattern);
  assert.ok(!error.message.includes('\n'), 'one sentence');
  return true;
};

describe('arguments of the drop-in commands', () => {
  const word = fc.stringMatching(/^[^,\0]+$/);
  const given = fc.record(
    {
      type: word,
      path: word,
      port: fc.nat(0xffff_fffe),
      mode: fc.nat(0o777),
      disconnect: fc.constant(true as const),
    },
    { requiredKeys: [], noNullPrototype: true },
  );

  it('a value of parts is read back as it was written, in any order', () => {
    fc.assert(
      fc.property(
        given.filter((parts) => Object.keys(parts).length > 0),
        fc.nat(),
        (parts, turn) => {
          const written = Object.entries(parts).map(([name, value]) => {
            if (name === 'disconnect') return name;
            return `${name}=${name === 'mode' ? Number(value).toString(8).padStart(4, '0') : value}`;
          });
          const from = turn % written.length;
          const text = [...written.slice(from), ...written.slice(0, from)].join(',');
          assert.deepEqual(parseOptionValue('--x', text, PARTS), parts);
        },
      ),
    );
  });

  it('whatever stands in a value, it is read or refused in one sentence', () => {
    const noise = fc.oneof(
      fc.string(),
      fc
        .array(
          fc.constantFrom(
            'type=',
            'path',
            'port',
            '=',
            ',',
            'mode=',
            '0600',
            'fd',
            '99999999999',
            'disconnect',
          ),
        )
        .map((parts) => parts.join('')),
    );
    fc.assert(
      fc.property(noise, (text) => {
        try {
          parseOptionValue('--x', text, PARTS);
        } catch (error) {
          assert.ok(isA(error, DropinRefusal));
        }
      }),
    );
  });

  it('long, short, attached and separate forms of options mean the same', () => {
    const specs = { name: { takes: 'value' }, quiet: { takes: 'nothing' } } as const;
    const short = { n: 'name', q: 'quiet' };
    fc.assert(
      fc.property(fc.array(fc.tuple(word, fc.nat(3))), (items) => {
        const args = items.flatMap(([value, form]) => {
          if (form === 0) return ['--name', value];
          return form === 1 ? [`--name=${value}`] : form === 2 ? ['-n', value] : [`-n${value}`];
        });
        const { options, operands } = parseArguments(['-q', ...args, '--', '--name'], specs, short);
        assert.deepEqual(
          options.get('name') ?? [],
          items.map(([value]) => value),
        );
        assert.deepEqual(operands, ['--name']);
      }),
    );
  });

  it("reads swtpm's command line as libvirt 9 writes it", () => {
    const options = parseSwtpmArguments([
      ...['--ctrl', 'type=unixio,path=/run/libvirt/qemu/swtpm/1-vm-swtpm.sock,mode=0600'],
      ...['--tpmstate', 'dir=/var/lib/libvirt/swtpm/0b8f/tpm2,mode=0600'],
      ...['--log', 'file=/var/log/swtpm/libvirt/qemu/vm-swtpm.log', '--terminate', '--tpm2'],
      ...['--migration', 'release-lock-outgoing,incoming'],
    ]);
    assert.deepEqual(options, {
      state: { path: '/var/lib/libvirt/swtpm/0b8f/tpm2', isFile: false },
      server: undefined,
      control: {
        kind: 'path',
        path: '/run/libvirt/qemu/swtpm/1-vm-swtpm.sock',
        mode: 0o600,
        uid: undefined,
        gid: undefined,
      },
      isOnAtOnce: false,
      isStartedUp: false,
      isIncoming: true,
      terminates: true,
      isDaemon: false,
      pid: undefined,
      log: { path: '/var/log/swtpm/libvirt/qemu/vm-swtpm.log', truncates: false, prefix: '' },
      runAs: undefined,
    });
  });

  it('reads descriptors, ports, a file for the state, and the short options', () => {
    const base = ['--tpm2', '--tpmstate', 'backend-uri=file:///dev/zvol/vm-100-disk-1'];
    const options = parseSwtpmArguments([
      ...base,
      '--ctrl',
      'type=unixio,clientfd=5',
      '-p',
      '2321',
      '-t',
      '-d',
    ]);
    assert.deepEqual(options.state, { path: '/dev/zvol/vm-100-disk-1', isFile: true });
    assert.deepEqual(options.control, { kind: 'descriptor', fd: 5, isConnected: true });
    assert.deepEqual(options.server, { kind: 'port', host: '127.0.0.1', port: 2321, disconnects: true });
    assert.ok(options.terminates && options.isDaemon);
    const other = parseSwtpmArguments([...base, '--ctrl', 'type=unixio,fd=7', '-f', '9', '--pid', 'fd=8']);
    assert.deepEqual(other.control, { kind: 'descriptor', fd: 7, isConnected: false });
    assert.deepEqual(other.server, { kind: 'descriptor', fd: 9, isConnected: true, disconnects: false });
    assert.deepEqual(other.pid, { fd: 8 });
    const started = parseSwtpmArguments([...base, '-f', '9', '--flags', 'startup-clear']);
    assert.ok(started.isOnAtOnce && started.isStartedUp);
    assert.deepEqual(parseSwtpmArguments(['--tpm2', '-f', '9'], { TPM_PATH: '/srv/tpm' }).state, {
      path: '/srv/tpm',
      isFile: false,
    });
  });

  const refused: readonly (readonly [string, readonly string[], RegExp])[] = [
    ['TPM 1.2', [], /add --tpm2/],
    ['file keys', ['--tpm2', '--key', 'pwdfd=4,mode=aes-256-cbc'], /--key: .* leave this option out/],
    [
      'keys of migrations',
      ['--tpm2', '--migration-key=file=/x'],
      /--migration-key: .* leave this option out/,
    ],
    ['no door at all', ['--tpm2', '--tpmstate', 'dir=/x'], /add --ctrl/],
    ['no place', ['--tpm2', '-f', '3'], /--tpmstate is missing/],
    ['a TPM for the network', ['--tpm2', '--server', 'type=tcp,port=1,bindaddr=0.0.0.0'], /bindaddr=127/],
    [
      'localities for every client',
      ['--tpm2', '-f', '3', '--locality', 'allow-set-locality'],
      /control channel/,
    ],
    [
      'two startups',
      ['--tpm2', '-f', '3', '--tpmstate', 'dir=/x', '--flags', 'startup-clear,startup-none'],
      /name one/,
    ],
    [
      'a startup that finds no state',
      ['--tpm2', '-f', '3', '--tpmstate', 'dir=/x', '--flags', 'startup-state'],
      /write startup-clear/,
    ],
    [
      'a startup of TPM 1.2',
      ['--tpm2', '-f', '3', '--tpmstate', 'dir=/x', '--flags', 'startup-deactivated'],
      /1\.2/,
    ],
    [
      'a part that is not known',
      ['--tpm2', '--ctrl', 'type=unixio,paht=/x'],
      /no part "paht"; it takes type, path/,
    ],
    ['an option that is not known', ['--tpm3'], /--tpm3 is not known here/],
    ['another kind of channel', ['--tpm2', '--ctrl', 'type=vsock'], /type=unixio/],
  ];
  for (const [what, args, pattern] of refused) {
    it(`swtpm refuses ${what}, and says what replaces it`, () => {
      assert.throws(() => parseSwtpmArguments(args), refusal(pattern));
    });
  }

  it('reads the calls of swtpm_setup that libvirt makes', () => {
    const uuid = '0b8f7a52-3c1d-4f0e-9a6b-2f3c4d5e6f70';
    const common = ['--tpm2', '--tpm-state', '/d', '--vmid', `web 1:${uuid}`, '--logfile', '/l'];
    const made = parseSetupArguments([
      ...common,
      ...['--createek', '--create-ek-cert', '--create-platform-cert', '--lock-nvram', '--not-overwrite'],
    ]);
    assert.deepEqual(made.vm, { name: 'web 1', uuid });
    assert.ok(
      made.createsKeys && made.createsPlatformCertificate && made.locksNvram && made.ifExists === 'keep',
    );
    const incoming = parseSetupArguments([...common, '--overwrite']);
    assert.ok(incoming.ifExists === 'replace' && !incoming.createsKeys);
    const banks = parseSetupArguments([...common, '--pcr-banks', 'sha384,sha256', '--reconfigure']);
    assert.deepEqual([banks.pcrBanks, banks.isReconfigured], [['sha256', 'sha384'], true]);
    assert.throws(
      () => parseSetupArguments([...common, '--pwdfile-fd', '9', '--cipher', 'aes-256-cbc']),
      refusal(/--pwdfile-fd: .* leave this option out \(in libvirt: the <encryption> element\)/),
    );
    assert.throws(() => parseSetupArguments(['--tpmstate', '/d']), refusal(/add --tpm2/));
    assert.throws(() => parseSetupArguments([...common, '--pcr-banks', 'md5']), refusal(/"md5"/));
  });

  it("a VM's name becomes a name that the supervisor takes, whatever it is", () => {
    fc.assert(
      fc.property(fc.string({ unit: 'grapheme' }), fc.uuid(), (name, id) => {
        assert.match(nameFor(name, id), /^[a-z0-9][a-z0-9._-]{0,62}$/);
      }),
    );
  });

  it("capabilities have the shape of swtpm's, and name only what swtpm itself knows", () => {
    for (const [ours, program, args] of [
      [swtpmCapabilities(), 'swtpm', ['socket', '--tpm2', '--print-capabilities']],
      [setupCapabilities(), 'swtpm_setup', ['--tpm2', '--print-capabilities']],
    ] as const) {
      const mine = JSON.parse(ours) as { type: string; features: string[]; version: string };
      const real = JSON.parse(execFileSync(program, args, { encoding: 'utf8' })) as typeof mine;
      assert.deepEqual(Object.keys(mine), Object.keys(real));
      assert.equal(mine.type, real.type);
      assert.match(mine.version, /^\d+\.\d+\.\d+$/);
      // Newer than the swtpm of Debian 12.
      const later = ['cmdarg-migration'];
      assert.deepEqual(
        mine.features.filter((feature) => !real.features.includes(feature) && !later.includes(feature)),
        [],
      );
      assert.deepEqual(
        mine.features.filter(
          (feature) =>
            /key|pwd|1\.2/.test(feature) && !feature.startsWith('rsa') && !feature.startsWith('tpm2-rsa'),
        ),
        [],
      );
    }
  });
});
