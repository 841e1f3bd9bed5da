import { closeSync } from 'node:fs';
import fc from 'fast-check';
import { socketPair } from 'vtpm-common/libc';
import { sendNow } from 'vtpm-frontend-driver/system-calls';
import { memoryOf, RawFrontend, SEAL, SETUP } from './raw-frontend.js';
import { getRandom } from './tpm-commands.js';
import { until } from './until.js';

const NOTE = Buffer.of(0);

/** What a hostile frontend does to its page: anything anywhere, and things that look like requests. */
const change = fc.record({
  header: fc.uint8Array({ minLength: 8, maxLength: 8 }),
  state: fc.integer({ min: 0, max: 4 }),
  isRequest: fc.boolean(),
  at: fc.integer({ min: 0, max: 8100 }),
  packet: fc.uint8Array({ maxLength: 64 }),
  notes: fc.integer({ min: 0, max: 5 }),
});
export type PageChange = typeof change extends fc.Arbitrary<infer T> ? T : never;
export const pageChanges = (least: number, most: number): fc.Arbitrary<PageChange[]> =>
  fc.array(change, { minLength: least, maxLength: most });

/** A ring of two pages in the hands of a fuzzer. */
export class FuzzedRing {
  private constructor(
    private readonly frontend: RawFrontend,
    private readonly bytes: Buffer,
    private readonly event: number,
  ) {}

  static async open(path: string): Promise<FuzzedRing> {
    const frontend = await RawFrontend.connect(path);
    const { bytes, event } = frontend.open();
    await until('it is connected', () => frontend.said.includes('state=4'));
    return new FuzzedRing(frontend, bytes, event);
  }

  change({ header, state, isRequest, at, packet, notes }: PageChange): void {
    this.bytes.set(packet, at);
    if (isRequest) {
      this.bytes.set(getRandom(), 8);
      this.bytes.set([getRandom().length, 0, 0, 0, state, 0, 0, 0], 0);
    } else {
      this.bytes.set(header, 0);
      this.bytes[4] = state;
    }
    for (let left = notes; left > 0; left--) sendNow(this.event, NOTE);
  }

  close(): void {
    closeSync(this.event);
    this.frontend.close();
  }
}

/** What is sent at the door: bytes, and of each descriptor what it is. */
export const setups = fc.record({
  message: fc.oneof(
    fc.constant(SETUP),
    fc.string({ maxLength: 600 }),
    fc
      .array(fc.constantFrom('state=3\n', 'feature-protocol-v2=1\n', 'a=b\n', '\n', '=', '\0'))
      .map((parts) => parts.join('')),
  ),
  descriptors: fc.array(fc.constantFrom('memory', 'unsealed', 'odd', 'socket', 'file'), { maxLength: 6 }),
});
export type FuzzedSetup = typeof setups extends fc.Arbitrary<infer T> ? T : never;

/** Sends it, and goes. */
export async function sendSetup(path: string, { message, descriptors }: FuzzedSetup): Promise<void> {
  if (message === '') return;
  const frontend = await RawFrontend.connect(path);
  const own: number[] = [];
  for (const kind of descriptors) {
    if (kind === 'socket') own.push(...socketPair());
    else if (kind === 'file') own.push(memoryOf(8192, 0));
    else own.push(memoryOf(kind === 'odd' ? 8191 : 8192, kind === 'unsealed' ? 0 : SEAL.SHRINK));
  }
  frontend.send(message, own);
  for (const fd of own) closeSync(fd);
  frontend.close();
}
