import assert from 'node:assert/strict';
import { createConnection } from 'node:net';
import { join } from 'node:path';
import type { Transport } from 'tpm2-ts-bindings';
import { TpmClient } from './tpm-client.js';
import type { Host } from './two-hosts.js';
import { u32, Vmm } from './vmm.js';

const STARTUP_CLEAR = '80010000000c000001440000';
const READ_CLOCK = '80010000000a00000181';
const FAILURE = '80010000000a00000101';
const PERMANENT = 1;
const VOLATILE = 2;
const SAVESTATE = 3;
const RETRY = 0x800;

/** What QEMU's stream carries of a TPM. */
export interface Carried {
  readonly permanent: Buffer;
  readonly volatile: Buffer;
}

/** What QEMU does with its TPM, over a real control socket. Its guest's commands go where the VM is. */
export class MovingVm implements Transport {
  constructor(
    readonly name: string,
    public vmm: Vmm,
  ) {}

  /** A new vTPM that only a VMM powers on, and a VM that boots with it. */
  static async create(host: Host, name: string): Promise<MovingVm> {
    const { installation } = host;
    await installation.ctlJson(...['create', name, '--doors', 'control,tpm', '--startup', 'none']);
    await installation.ctlJson('start', name);
    return MovingVm.boot(host, name);
  }

  /** Powers the TPM on, as firmware begins. */
  static async boot(host: Host, name: string): Promise<MovingVm> {
    const vm = new MovingVm(name, connect(host, name));
    assert.equal(await vm.vmm.powerOn(0xf80), 0);
    await vm.vmm.data!.transmit(STARTUP_CLEAR);
    return vm;
  }

  /** QEMU with `-incoming`, which has nothing yet. */
  static async incoming(host: Host, name: string): Promise<Vmm> {
    const vmm = connect(host, name);
    assert.equal(await vmm.setDataFd(), 0);
    assert.equal((await vmm.data!.transmit(READ_CLOCK)).toString('hex'), FAILURE);
    assert.equal(await vmm.ask('GET_CAPABILITY'), '000000000001ffff');
    for (const size of [0, 0xf80]) {
      assert.equal(await vmm.result('STOP'), 0);
      assert.equal(await vmm.result('SET_BUFFERSIZE', u32(size)), 0);
    }
    return vmm;
  }

  /** QEMU's pre_save: the VM is stopped. */
  async takeOut(): Promise<Carried> {
    const permanent = await this.vmm.getBlob(PERMANENT);
    const volatile = await this.vmm.getBlob(VOLATILE);
    assert.equal(await this.vmm.getBlob(SAVESTATE), RETRY);
    assert.ok(Buffer.isBuffer(permanent), `GET_STATEBLOB permanent: ${permanent}`);
    assert.ok(Buffer.isBuffer(volatile), `GET_STATEBLOB volatile: ${volatile}`);
    return { permanent, volatile };
  }

  /** QEMU's post_load. @returns the result of INIT */
  static async bringIn(vmm: Vmm, { permanent, volatile }: Carried): Promise<number> {
    assert.equal(await vmm.result('STOP'), 0);
    assert.equal(await vmm.setBlob(PERMANENT, permanent), 0);
    assert.equal(await vmm.setBlob(VOLATILE, volatile), 0);
    return await vmm.result('INIT', u32(1));
  }

  /** The VM goes on there. */
  goOn(vmm: Vmm): void {
    this.vmm.close();
    this.vmm = vmm;
  }

  transmit(command: Uint8Array): Promise<Buffer> {
    assert.ok(this.vmm.data, 'the VM has no TPM');
    return this.vmm.data.transmit(command);
  }

  async close(): Promise<void> {
    this.vmm.close();
  }
}

function connect({ installation }: Host, name: string): Vmm {
  const path = join(installation.paths.supervisor.doors, name, 'control.sock');
  return new Vmm(new TpmClient(createConnection({ path, allowHalfOpen: true })));
}
