import assert from 'node:assert/strict';
import { existsSync, readFileSync } from 'node:fs';
import { LibvirtHost, PACKAGED_DROPIN } from '../support/libvirt-host.js';
import { until } from '../support/until.js';

const VM = '0b8f7a52-3c1d-4f0e-9a6b-2f3c4d5e6f70';
const EMULATOR = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>";

describe("Debian's libvirt", function () {
  this.timeout(300_000);
  let libvirt: LibvirtHost;

  before(async () => {
    libvirt = await LibvirtHost.create();
  });
  after(() => libvirt?.destroy());

  const exec = (vtpm: string, ...command: string[]) => libvirt.vtpmctl('exec', vtpm, '--', ...command);
  const stateOf = async (vtpm: string): Promise<string> =>
    (JSON.parse(await libvirt.vtpmctl('--json', 'show', vtpm)) as { state: string }).state;
  /** PCRs 0 to 7, when the firmware has measured all that it measures. */
  const measured = (vtpm: string): Promise<string> =>
    until('the firmware has measured', async () => {
      const read = await exec(vtpm, 'tpm2_pcrread', 'sha256:0,1,2,3,4,5,6,7').catch(() => '');
      return read !== '' && !/0x0{64}/.test(read) && read;
    });

  it('<backend type="external">: the domain boots with the vTPM whose element vtpmctl printed', async () => {
    await libvirt.vtpmctl('create', 'web1', '--doors', 'tcti,control', '--socket-owner', 'libvirt-qemu:kvm');
    await libvirt.vtpmctl('start', 'web1');
    await libvirt.define(
      'web1',
      'aaaaaaaa-3c1d-4f0e-9a6b-2f3c4d5e6f70',
      await libvirt.vtpmctl('libvirt-xml', 'web1'),
    );
    await libvirt.virsh('start', 'web1');
    const first = await measured('web1');
    const sixteen = () => exec('web1', 'tpm2_pcrread', 'sha256:16');
    await exec('web1', 'tpm2_pcrextend', `16:sha256=${'11'.repeat(32)}`);
    assert.doesNotMatch(await sixteen(), /0x0{64}/);
    await libvirt.virsh('reset', 'web1');
    await until('the TPM is reset', async () => /0x0{64}/.test(await sixteen().catch(() => '')));
    assert.equal(await measured('web1'), first);
    await libvirt.virsh('destroy', 'web1');
    assert.equal(await stateOf('web1'), 'running', 'libvirt does not end what it did not start');
    await libvirt.virsh('start', 'web1');
    assert.equal(await measured('web1'), first);
    await libvirt.virsh('destroy', 'web1');
    await libvirt.virsh('undefine', 'web1');
  });

  it('<backend type="emulator">: with the drop-in in PATH its swtpm is a vTPM of the manager, and stays the same', async () => {
    await libvirt.define('web2', VM, EMULATOR);
    await libvirt.virsh('start', 'web2');
    const { vmUuid, dropin } = JSON.parse(await libvirt.vtpmctl('--json', 'show', 'web2'));
    assert.equal(vmUuid, VM);
    assert.equal(dropin.place, `/var/lib/libvirt/swtpm/${VM}/tpm2`);
    assert.equal(dropin.uid, Number((await libvirt.host.succeed('id', '-u', 'tss')).trim()));
    const running = await libvirt.host.succeed('sh', '-c', 'cat /proc/[0-9]*/cmdline | tr "\\0" " "');
    assert.ok(
      running.includes(`${PACKAGED_DROPIN}/swtpm socket --ctrl type=unixio,path=/run/libvirt/qemu/swtpm/`),
    );
    await libvirt.virsh('destroy', 'web2');
    await until('the TPM is off', async () => (await stateOf('web2')) === 'stopped');
    // A second door, so that the test can look.
    await libvirt.vtpmctl('set', 'web2', '--doors', 'tcti,control');
    await libvirt.virsh('start', 'web2');
    const look = async () => ({
      pcrs: await measured('web2'),
      key: await exec('web2', 'tpm2_readpublic', '-c', '0x81010001'),
      handles: await exec('web2', 'tpm2_getcap', 'handles-nv-index'),
    });
    const before = await look();
    assert.match(before.key, /^name: 000b[0-9a-f]{64}$/m);
    assert.deepEqual(before.handles.match(/0x\w+/g), ['0x1C00002', '0x1C00016', '0x1C08000']);
    await libvirt.virsh('destroy', 'web2');
    await libvirt.virsh('start', 'web2');
    assert.deepEqual(await look(), before, 'the same TPM, and the same firmware');
    // QEMU is killed: nobody says SHUTDOWN.
    await libvirt.host.succeed('sh', '-c', 'kill -9 $(cat /run/libvirt/qemu/web2.pid)');
    await until('the TPM is off', async () => (await stateOf('web2')) === 'stopped');
    await until('libvirt sees it', async () =>
      (await libvirt.virsh('domstate', 'web2')).includes('shut off'),
    );
    await libvirt.virsh('start', 'web2');
    assert.deepEqual(await look(), before);
    await libvirt.virsh('destroy', 'web2');
    const log = readFileSync(libvirt.host.path('/var/log/swtpm/libvirt/qemu/web2-swtpm.log'), 'utf8');
    assert.match(log, /its certificate in NV index 0x1c00002/);
    assert.match(log, /vTPM web2 is on, token in/);
    await libvirt.virsh('undefine', 'web2');
    assert.ok(!existsSync(libvirt.host.path(`/var/lib/libvirt/swtpm/${VM}`)), 'libvirt removed the token');
    assert.equal(await stateOf('web2'), 'stopped', 'the vTPM is the operator’s to delete');
    // A domain of that UUID again: its place is known, and its token is not there.
    await libvirt.define('web2', VM, EMULATOR);
    await assert.rejects(libvirt.virsh('start', 'web2'), /swtpm_setup/);
    const refused = readFileSync(libvirt.host.path('/var/log/swtpm/libvirt/qemu/web2-swtpm.log'), 'utf8');
    assert.match(
      refused,
      /is the place of vTPM web2 and its token is not there; vtpmctl dropin web2 .* makes a new one/,
    );
    await libvirt.vtpmctl('delete', 'web2', '--yes');
    await libvirt.virsh('start', 'web2');
    await libvirt.virsh('destroy', 'web2');
    await libvirt.virsh('undefine', 'web2');
  });

  it('a domain with a secret for its TPM is told that there are no file keys', async () => {
    const secret = 'bbbbbbbb-3c1d-4f0e-9a6b-2f3c4d5e6f70';
    const xml = `<secret ephemeral='no' private='yes'><uuid>${secret}</uuid><usage type='vtpm'><name>key</name></usage></secret>`;
    await libvirt.host.succeed('sh', '-c', `printf %s "$0" > /root/secret.xml`, xml);
    await libvirt.virsh('secret-define', '/root/secret.xml');
    await libvirt.virsh('secret-set-value', secret, Buffer.from('a passphrase').toString('base64'));
    const encrypted = EMULATOR.replace(
      "version='2.0'/>",
      `version='2.0'><encryption secret='${secret}'/></backend>`,
    );
    await libvirt.define('web3', 'cccccccc-3c1d-4f0e-9a6b-2f3c4d5e6f70', encrypted);
    await assert.rejects(libvirt.virsh('start', 'web3'), /passphrase|pwd|swtpm/);
    await libvirt.virsh('undefine', 'web3');
  });
});
