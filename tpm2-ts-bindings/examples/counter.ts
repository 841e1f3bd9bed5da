// A counter in the TPM that only goes up and needs a password: made at the first run, one more at each.
import {
  createPrimary,
  defineNvIndex,
  inSession,
  mask,
  NV_Increment,
  NV_Read,
  NvAttribute,
  openTpm,
  permanent,
  Rh,
  readNvIndex,
  srkTemplate,
  whileLoaded,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';

const [path = '/dev/tpmrm0', password = 'example'] = process.argv.slice(2);
const { AUTHREAD, AUTHWRITE, COUNTER, NO_DA } = NvAttribute;
const nvIndex = 0x01800f00;
const authValue = Buffer.from(password);
const tpm = await openTpm(path);
try {
  await whileLoaded(tpm, createPrimary(tpm, srkTemplate()), (srk) =>
    // One session for everything: opening a salted one costs more than the commands in it.
    inSession(tpm, { kind: 'hmac', salt: srk, encrypt: 'both' }, async (session) => {
      let index = await readNvIndex(tpm, nvIndex, authValue);
      if (index === undefined) {
        const attributes = mask(AUTHREAD, AUTHWRITE, COUNTER, NO_DA);
        const owner = withPassword(permanent(Rh.OWNER));
        const space = { nvIndex, attributes, dataSize: 8, authValue, sessions: [session] };
        index = await defineNvIndex(tpm, owner, space);
        console.log('made');
      }
      await tpm.run(NV_Increment, { authHandle: withSession(index, session), nvIndex: index }, {});

      // The first increment changes the index's Name, which the session's HMAC covers.
      index = (await readNvIndex(tpm, nvIndex, authValue)) ?? index;
      const { data } = await tpm.run(
        NV_Read,
        { authHandle: withSession(index, session), nvIndex: index },
        { size: 8, offset: 0 },
      );
      console.log(`counter: ${data.readBigUInt64BE()}`);
    }),
  );
} finally {
  await tpm.close();
}
