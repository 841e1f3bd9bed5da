import { isLocality, type TpmEngine } from '../engine/engine.js';
import type { Actions, Outcome, VmmState } from './actions.js';
import { CAPABILITIES } from './commands.js';
import type { DataChannel } from './data-channel.js';
import { ControlRefusal, RESULT } from './results.js';

export const DONE: Outcome = { result: RESULT.Success };

/** Most of GET_INFO's text that one answer has. */
const MOST_INFO_BYTES = 3 * 1024;
/** Of SET_BUFFERSIZE: no change, only the sizes. */
const ASK = 0;

export interface CommonParts {
  readonly engine: Pick<TpmEngine, 'bufferSizes' | 'setBufferSize' | 'info'>;
  readonly isOn: () => boolean;
  readonly vmm: VmmState;
  readonly data: DataChannel;
  /** The TPM's buffers have another size from its next power-on on. */
  bufferSizeChanged(): void;
}

type CommonName =
  | 'GET_CAPABILITY'
  | 'GET_CONFIG'
  | 'SET_LOCALITY'
  | 'SET_DATAFD'
  | 'SET_BUFFERSIZE'
  | 'GET_INFO';

/** The commands that are the same with and without a TPM. */
export function commonActions({
  engine,
  isOn,
  vmm,
  data,
  bufferSizeChanged,
}: CommonParts): Pick<Actions, CommonName> {
  return {
    GET_CAPABILITY: () => ({ ...DONE, words: [CAPABILITIES] }),
    // No key of swtpm's is in use.
    GET_CONFIG: () => DONE,
    SET_LOCALITY: ({ body }) => {
      const locality = body.readUInt8(0);
      if (!isLocality(locality))
        throw new ControlRefusal(RESULT.BadLocality, `there is no locality ${locality}`);
      vmm.locality = locality;
      return DONE;
    },
    SET_DATAFD: async (_request, asker) => {
      await data.set(asker);
      return DONE;
    },
    SET_BUFFERSIZE: ({ body }) => {
      const wanted = body.readUInt32BE(0);
      if (wanted !== ASK) {
        if (isOn()) {
          throw new ControlRefusal(RESULT.BadOrdinal, 'the TPM is on: its buffers stay as they are');
        }
        engine.setBufferSize(wanted);
        bufferSizeChanged();
      }
      const { size, least, most } = engine.bufferSizes;
      return { ...DONE, words: [size, least, most] };
    },
    GET_INFO: ({ body }) => {
      const flags = body.readBigUInt64BE(0);
      const offset = body.readUInt32BE(8);
      const text = Buffer.from(`${engine.info(Number(flags & 0x7fffffffn))}\0`);
      if (offset >= text.length) throw new ControlRefusal(RESULT.BadParameter, 'an offset behind the end');
      const content = text.subarray(offset, offset + MOST_INFO_BYTES);
      return { ...DONE, words: [text.length, content.length], content };
    },
  };
}
