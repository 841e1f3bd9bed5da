// Says whose TPM it is and takes 32 random bytes from it.
import { openTpm, Pt, readProperty, readRandom } from 'tpm2-ts-bindings';

const tpm = await openTpm(process.argv[2] ?? '/dev/tpmrm0');
try {
  const manufacturer = Buffer.alloc(4);
  manufacturer.writeUInt32BE((await readProperty(tpm, Pt.MANUFACTURER)) ?? 0);
  const random = await readRandom(tpm, 32);
  console.log(`manufacturer: ${manufacturer.toString('latin1').replace(/\0+$/, '')}`);
  console.log(`random: ${random.toString('hex')}`);
} finally {
  await tpm.close();
}
