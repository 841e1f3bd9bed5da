import {
  CreatePrimary,
  createTpm,
  FlushContext,
  GetRandom,
  objectEntity,
  openSession,
  openSocket,
  permanent,
  Rh,
  type Session,
  srkTemplate,
  type Tpm,
  withPassword,
} from 'tpm2-ts-bindings';
import { Installation } from '../support/installation.js';
import { getRandom } from '../support/tpm-commands.js';
import { type RowContext, row, type Suite } from './row.js';
import { interleaved, type Spread } from './statistics.js';

const PLAIN = 'tpm2-ts-bindings, GetRandom';
const ENCRYPTED = 'tpm2-ts-bindings, GetRandom salted and encrypted';
const COUNT = 500;

/** What the typed client adds to the same command as bytes, over the same kind of connection. */
export const clientSuite: Suite = {
  names: [PLAIN, ENCRYPTED],
  async run({ effort, report }: RowContext): Promise<void> {
    const installation = await Installation.create();
    try {
      await installation.start();
      const door = await installation.vtpm('client');
      const transport = await openSocket(door);
      const tpm = createTpm(await openSocket(door));
      const session = await saltedSession(tpm);
      const bytes = getRandom(16);
      const plain = (): Promise<unknown> => tpm.run(GetRandom, {}, { bytesRequested: 16 });
      const encrypted = (): Promise<unknown> => tpm.run(GetRandom, {}, { bytesRequested: 16 }, [session]);
      const raw = (): Promise<unknown> => transport.transmit(bytes);
      for (const each of [plain, encrypted, raw]) await times(each);
      const [a, b, c] = await interleaved(
        effort.rounds,
        [plain, encrypted, raw].map((each) => () => times(each)),
      );
      const peer = { name: 'raw bytes', ...(c as Spread) };
      report(row(PLAIN, 'us', a!, peer, 'both over node:net'));
      report(row(ENCRYPTED, 'us', b!, peer, 'the TPM also checks an HMAC and encrypts'));
      await transport.close();
      await tpm.close();
    } finally {
      await installation.destroy();
    }
  },
};

/** Salted to a storage key of the TPM; what comes back is encrypted. */
async function saltedSession(tpm: Tpm): Promise<Session> {
  const nothing = Buffer.alloc(0);
  const made = await tpm.run(
    CreatePrimary,
    { primaryHandle: withPassword(permanent(Rh.OWNER)) },
    {
      inSensitive: { userAuth: nothing, data: nothing },
      outsideInfo: nothing,
      creationPCR: [],
      inPublic: srkTemplate(),
    },
  );
  const salt = objectEntity(made.objectHandle, made.outPublic);
  const session = await openSession(tpm, { kind: 'hmac', salt, encrypt: 'out' });
  await tpm.run(FlushContext, {}, { flushHandle: made.objectHandle });
  return session;
}

/** Microseconds of `COUNT` round trips, one after the other. */
async function times(transmit: () => Promise<unknown>): Promise<number[]> {
  const out: number[] = [];
  for (let left = COUNT; left > 0; left--) {
    const start = performance.now();
    await transmit();
    out.push((performance.now() - start) * 1000);
  }
  return out;
}
