import { commandCode, type RecordingProxy, startRecordingProxy } from './recording-proxy.js';
import { getRandom } from './tpm-commands.js';

/** What a TPM does with a command instead of executing it: answer with a response code, or not at all. */
export type Fault = number | 'silence';

/** A TPM that fails as it is told. */
export interface FaultyTpm {
  readonly path: string;
  /** Asked about each command before the TPM gets it; `count` is how often this command has come since it was set. */
  fault: (command: number, count: number) => Fault | undefined;
  /** How often a command has come since the last `forget`. */
  times(command: number): number;
  forget(): void;
  close(): Promise<void>;
}

/** @param target the data socket of a TPM that works */
export async function startFaultyTpm(target: string): Promise<FaultyTpm> {
  const counts = new Map<number, number>();
  let pending: Fault | undefined;
  const proxy: RecordingProxy = await startRecordingProxy(target, {
    command(message) {
      const code = commandCode(message);
      const count = (counts.get(code) ?? 0) + 1;
      counts.set(code, count);
      pending = faulty.fault(code, count);
      // What is not executed must change nothing: the TPM gets a command without effect in its place.
      return pending === undefined ? message : getRandom(1);
    },
    response(message) {
      if (pending === undefined) return message;
      if (pending === 'silence') return Buffer.alloc(0);
      const answer = Buffer.from('80010000000a00000000', 'hex');
      answer.writeUInt32BE(pending, 6);
      return answer;
    },
  });
  const faulty: FaultyTpm = {
    path: proxy.path,
    fault: () => undefined,
    times: (command) => counts.get(command) ?? 0,
    forget: () => counts.clear(),
    close: () => proxy.close(),
  };
  return faulty;
}
