import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import type { ControlRig } from './control-rig.js';
import { getRandom, pcrExtend, pcrRead, readClock } from './tpm-commands.js';
import { CMD, type ControlCommand, u32 } from './vmm.js';

const STARTUP_CLEAR = '80010000000c000001440000';
const FAILURE = '80010000000a00000101';
const ZERO = Buffer.alloc(32);

const code = (answer: Buffer): number => answer.readUInt32BE(6);
const pcrOf = (answer: Buffer): Buffer => answer.subarray(-32);
const resets = (answer: Buffer): number => answer.readUInt32BE(10 + 16);
const sha256 = (...parts: Uint8Array[]): Buffer =>
  parts.reduce((hash, part) => hash.update(part), createHash('sha256')).digest();

/** A VMM and its guest, who know exactly what each answer must be. */
export class ExactVmm {
  #resets: number | undefined;

  constructor(private readonly rig: ControlRig) {}

  async ask(command: ControlCommand, body: Uint8Array, expected: string): Promise<void> {
    const full = expected.padEnd(2 * CMD[command][1], '0');
    assert.equal(await this.rig.vmm.ask(command, body), full, command);
  }

  async transmit(command: Uint8Array | string): Promise<Buffer> {
    assert.ok(this.rig.vmm.data);
    return this.rig.vmm.data.transmit(command);
  }

  /** All commands in an order in which each one has something to lose. */
  async round(): Promise<void> {
    const { vmm, tcti } = this.rig;
    if (!vmm.data) assert.equal(await vmm.setDataFd(), 0);
    await this.ask('GET_CAPABILITY', u32(), '000000000001ffff');
    await this.ask('STOP', u32(), '00000000');
    await this.ask('SET_BUFFERSIZE', u32(0xf80), '0000000000000f8000000af800001000');
    assert.equal((await this.transmit(getRandom())).toString('hex'), FAILURE);
    assert.equal((await tcti.client.transmit(getRandom())).toString('hex'), FAILURE);
    await this.ask('INIT', u32(0), '00000000');
    await this.ask('SET_BUFFERSIZE', u32(0), '0000000000000f8000000af800001000');
    await this.#startUp();
    const digest = randomBytes(32);
    await this.#expectPcr(5, ZERO);
    await this.transmit(pcrExtend(5, digest));
    const pcr = sha256(ZERO, digest);
    await this.#measure();
    await this.#locality();
    await this.ask('STORE_VOLATILE', u32(), '00000000');
    await this.ask('CANCEL_TPM_CMD', u32(), '00000000');
    await this.ask('GET_CONFIG', u32(), '00000000');
    const info = await vmm.answer('GET_INFO', u32(0, 7, 0, 0));
    JSON.parse((await vmm.control.bytes(info.readUInt32BE(8))).subarray(0, -1).toString());
    await this.#expectPcr(5, pcr);
    // The state goes out, comes back in, and is what it was.
    const permanent = await this.#blob(1);
    const volatile = await this.#blob(2);
    assert.equal(await vmm.getBlob(3), 0x800);
    await this.#bringIn(permanent, volatile);
    await this.#expectPcr(5, pcr);
    assert.equal(resets(await this.transmit(readClock())), this.#resets);
    // Taken out, and the VM goes on here all the same.
    await this.#blob(1);
    await this.ask('LOCK_STORAGE', u32(10), '00000000');
    await this.transmit(pcrExtend(5, digest));
    await this.#expectPcr(5, sha256(pcr, digest));
    await this.ask('SHUTDOWN', u32(), '00000000');
    await this.ask('GET_TPMESTABLISHED', u32(), '0000000a');
  }

  /** One Startup more than before: no power-on came twice, and none was lost. */
  async #startUp(): Promise<void> {
    assert.equal(code(await this.transmit(STARTUP_CLEAR)), 0);
    const count = resets(await this.transmit(readClock()));
    if (this.#resets !== undefined) assert.equal(count, this.#resets + 1, 'resets');
    this.#resets = count;
  }

  async #measure(): Promise<void> {
    const parts = [randomBytes(1000), randomBytes(200), randomBytes(5000)];
    await this.ask('HASH_START', u32(), '00000000');
    for (const part of parts) {
      await this.ask('HASH_DATA', Buffer.concat([u32(part.length), part]), '00000000');
    }
    await this.ask('HASH_END', u32(), '00000000');
    await this.#expectPcr(17, sha256(ZERO, sha256(...parts)));
    await this.ask('GET_TPMESTABLISHED', u32(), '0000000001000000');
    await this.ask('RESET_TPMESTABLISHED', Buffer.from([4]), '00000000');
    await this.ask('GET_TPMESTABLISHED', u32(), '0000000000000000');
  }

  async #locality(): Promise<void> {
    const extend = pcrExtend(20, randomBytes(32));
    await this.ask('SET_LOCALITY', Buffer.from([2, 0, 0, 0]), '00000000');
    assert.equal(code(await this.transmit(extend)), 0, 'locality 2');
    await this.ask('SET_LOCALITY', Buffer.from([0]), '00000000');
    assert.notEqual(code(await this.transmit(extend)), 0, 'locality 0');
  }

  /**
   * A state that came in the clear is in the memory of the worker that took it, until INIT: where that one is killed the rest
   * is refused, and the VMM begins again. A reference is all that a worker needs.
   */
  async #bringIn(permanent: Buffer, volatile: Buffer): Promise<void> {
    const { vmm } = this.rig;
    for (;;) {
      const { kills } = this.rig;
      await this.ask('STOP', u32(), '00000000');
      const results = [await vmm.setBlob(1, permanent), await vmm.setBlob(2, volatile)];
      results.push(await vmm.result('INIT', u32(1)));
      if (results.every((result) => result === 0)) return;
      const isExplained = this.rig.mode === 'plain' && this.rig.kills > kills;
      assert.ok(isExplained, `SET_STATEBLOB, SET_STATEBLOB, INIT: ${results.join(', ')}`);
    }
  }

  async #blob(type: number): Promise<Buffer> {
    const blob = await this.rig.vmm.getBlob(type);
    assert.ok(Buffer.isBuffer(blob), `GET_STATEBLOB ${type}: ${blob}`);
    return blob;
  }

  async #expectPcr(pcr: number, expected: Buffer): Promise<void> {
    const answer = await this.transmit(pcrRead(pcr));
    assert.equal(pcrOf(answer).toString('hex'), expected.toString('hex'), `PCR ${pcr}`);
  }
}
