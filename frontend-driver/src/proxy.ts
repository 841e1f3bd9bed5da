import { closeSync, openSync } from 'node:fs';
import type { Duplex } from 'node:stream';
import type { TpmChannel, TransmitOptions } from './channel.js';
import { deviceStream } from './device-stream.js';
import { FrontendError } from './error.js';
import { asBuffer, HEADER_BYTES } from './framing.js';
import { systemCalls } from './system-calls.js';

const VTPMX = '/dev/vtpmx';
/** linux/vtpm_proxy.h: _IOWR(0xa1, 0, struct vtpm_proxy_new_dev). */
const VTPM_PROXY_IOC_NEW_DEV = 0xc014a100;
const VTPM_PROXY_FLAG_TPM2 = 1;
/** The kernel's own command on this channel: header, then one byte of locality. */
const TPM2_CC_SET_LOCALITY = 0x20001000;

const TPM_RC_SUCCESS = 0;
const TPM_RC_FAILURE = 0x101;
const TPM_RC_LOCALITY = 0x907;
const TPM_RC_RETRY = 0x922;

export interface KernelTpm {
  /** As in `/dev/tpm<number>`. */
  readonly number: number;
  /** Commands of the kernel and its programs come out, answers go in. The device is gone when it is closed. */
  readonly stream: Duplex;
}

/** Makes a TPM of this kernel's, `/dev/tpmN`, that somebody else answers for. @throws FrontendError `unreachable` */
export function newKernelTpm(path = VTPMX): KernelTpm {
  let control: number;
  try {
    control = openSync(path, 'r+');
  } catch (cause) {
    const isMissing = (cause as NodeJS.ErrnoException).code === 'ENOENT';
    throw new FrontendError(
      'unreachable',
      isMissing
        ? `there is no ${path}: this kernel has no tpm_vtpm_proxy, or it is not loaded (modprobe tpm_vtpm_proxy)`
        : `${path} cannot be opened: ${(cause as Error).message}`,
      cause,
    );
  }
  try {
    const { koffi, ioctl } = systemCalls();
    // struct vtpm_proxy_new_dev: u32 flags, then out: TPM number, descriptor, major, minor.
    const device = Buffer.alloc(20);
    device.writeUInt32LE(VTPM_PROXY_FLAG_TPM2, 0);
    if (Number(ioctl(control, VTPM_PROXY_IOC_NEW_DEV, device)) !== 0) {
      throw new FrontendError('unreachable', `${path} makes no TPM (errno ${koffi.errno()})`);
    }
    return { number: device.readUInt32LE(4), stream: deviceStream(device.readUInt32LE(8)) };
  } finally {
    closeSync(control);
  }
}

/**
 * A vTPM as the kernel's proxy driver wants it: it asks for a locality by a command of its own, which never reaches the vTPM,
 * and it must hear something to each command. One whose answer is lost is told as TPM_RC_FAILURE, because whether it ran is
 * not known; one that could not be sent as TPM_RC_RETRY.
 */
export function forKernel(channel: TpmChannel, localities: readonly number[] = [0]): TpmChannel {
  let locality = 0;
  return {
    canCancel: channel.canCancel,
    ended: channel.ended,
    close: () => channel.close(),
    async transmit(command: Uint8Array, options: TransmitOptions = {}): Promise<Buffer> {
      const bytes = asBuffer(command);
      if (bytes.length > HEADER_BYTES && bytes.readUInt32BE(6) === TPM2_CC_SET_LOCALITY) {
        const wanted = bytes.readUInt8(HEADER_BYTES);
        if (!localities.includes(wanted)) return answer(TPM_RC_LOCALITY);
        locality = wanted;
        return answer(TPM_RC_SUCCESS);
      }
      try {
        return await channel.transmit(command, { ...options, locality });
      } catch (error) {
        if (!(error instanceof FrontendError)) throw error;
        if (error.code === 'lost') return answer(TPM_RC_FAILURE);
        if (error.code === 'unreachable') return answer(TPM_RC_RETRY);
        throw error;
      }
    },
  };
}

/** Of nothing but a header. */
function answer(code: number): Buffer {
  const bytes = Buffer.alloc(HEADER_BYTES);
  bytes.writeUInt16BE(0x8001, 0);
  bytes.writeUInt32BE(HEADER_BYTES, 2);
  bytes.writeUInt32BE(code, 6);
  return bytes;
}
