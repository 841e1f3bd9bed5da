import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import {
  ObjectAttribute as A,
  Alg,
  attestationKeyTemplate,
  type ExpectedQuote,
  formatPcrSelection,
  PCR_Extend,
  type PublicArea,
  parsePcrSelection,
  permanent,
  publicArea,
  publicKeyObject,
  Quote,
  readNvIndex,
  readPcrs,
  rsaSrkTemplate,
  St,
  verifyAttest,
  verifyCertify,
  verifyNvCertify,
  verifyQuote,
  withPassword,
} from 'tpm2-ts-bindings';
import { withPrimary } from '../support/tpm-fixture.js';
import { flip, type Tpm2Tools, withSuiteTools } from '../support/tpm2-tools.js';
import { publicFile, readPcrFile, signatureFile, writePcrFile } from '../support/tpm2-tools-files.js';
import { has } from './make.js';

/** An RSA key for any signing scheme. */
function rsaSigningTemplate(): PublicArea {
  const { value } = rsaSrkTemplate();
  if (value.type !== Alg.RSA) throw new Error('the template is no RSA key');
  return publicArea({
    ...value,
    objectAttributes: (value.objectAttributes & ~(A.restricted | A.decrypt)) | A.sign,
    parameters: { ...value.parameters, symmetric: { algorithm: Alg.NULL } },
  });
}

const SCHEMES = [
  { name: 'ECDSA', scheme: Alg.ECDSA, template: attestationKeyTemplate(), tool: 'ecc256:ecdsa:null' },
  { name: 'RSASSA', scheme: Alg.RSASSA, template: rsaSigningTemplate(), tool: 'rsa2048:rsassa:null' },
  { name: 'RSAPSS', scheme: Alg.RSAPSS, template: rsaSigningTemplate(), tool: 'rsa2048:rsapss:null' },
] as const;
// More registers than one TPML_DIGEST takes, in two banks.
const SELECTION = parsePcrSelection('sha1:0,16+sha256:0,1,2,3,4,5,16,23');

describe('tpm2-ts-bindings and tpm2-tools: quotes and other statements', () => {
  let tools: Tpm2Tools;
  withSuiteTools((made) => {
    tools = made;
  });

  const extend = () =>
    tools.direct((tpm) =>
      tpm.run(
        PCR_Extend,
        { pcrHandle: withPassword(permanent(16)) },
        { digests: [{ hashAlg: Alg.SHA256, digest: randomBytes(32) }] },
      ),
    );
  before(extend);

  for (const { name, scheme, template, tool } of SCHEMES) {
    // checkquote knows of RSA signatures those of PKCS #1 v1.5 only.
    if (scheme !== Alg.RSAPSS)
      it(`${name}: checkquote takes ours, and nothing changed`, async () => {
        const nonce = randomBytes(20);
        await tools.direct((tpm) =>
          withPrimary(tpm, template, async (key) => {
            const { quoted, signature } = await tpm.run(
              Quote,
              { signHandle: withPassword(key) },
              {
                qualifyingData: nonce,
                inScheme: { scheme, hashAlg: Alg.SHA256 },
                pcrSelect: SELECTION,
              },
            );
            tools.write('message', quoted);
            tools.write('other-message', flip(quoted, 60));
            tools.writeAs('signature', signatureFile, signature);
            const pem = publicKeyObject(key.publicArea.value).export({ type: 'spki', format: 'pem' });
            tools.write('key.pem', pem);
            tools.writeAs('key.pub', publicFile, key.publicArea);
            const values = await readPcrs(tpm, SELECTION);
            tools.write('pcrs', writePcrFile(SELECTION, values));
            tools.write('other-pcrs', writePcrFile(SELECTION, values.with(6, flip(values[6]!))));
          }),
        );
        const check = (changed: { key?: string; message?: string; pcrs?: string; nonce?: Buffer } = {}) =>
          `tpm2_checkquote -Q -g sha256 -s signature -u ${changed.key ?? 'key.pem'} -m ${changed.message ?? 'message'} -f ${changed.pcrs ?? 'pcrs'} -q ${(changed.nonce ?? nonce).toString('hex')}`;
        await tools.run(check());
        await tools.run(check({ key: 'key.pub' }));
        await tools.refused(check({ nonce: flip(nonce) }), /nonce/);
        await tools.refused(check({ pcrs: 'other-pcrs' }), /PCR/);
        await tools.refused(check({ message: 'other-message' }), /validating signed message/);
      });

    it(`${name}: we take that of quote, and nothing changed`, async () => {
      const nonce = randomBytes(20);
      const attributes = 'fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign';
      await tools.run(`tpm2_createprimary -Q -C o -G ${tool} -a ${attributes} -c key.ctx`);
      await tools.run('tpm2_readpublic -Q -c key.ctx -o key.pub');
      await tools.run(
        `tpm2_quote -Q -c key.ctx -g sha256 --scheme ${name.toLowerCase()} -l ${formatPcrSelection(SELECTION)} -q ${nonce.toString('hex')} -m message -s signature -o pcrs`,
      );
      const [quoted, signature] = [tools.bytes('message'), tools.read('signature', signatureFile)];
      assert.equal(signature.sigAlg, scheme);
      const { selection, values } = readPcrFile(tools.bytes('pcrs'));
      assert.equal(formatPcrSelection(selection), formatPcrSelection(SELECTION));
      assert.deepEqual(await tools.direct((tpm) => readPcrs(tpm, SELECTION)), values);
      const expected: ExpectedQuote = {
        key: tools.read('key.pub', publicFile).value,
        nonce,
        selection,
        values,
      };
      verifyQuote(quoted, signature, expected);
      const refuses = (message: Buffer, change: Partial<ExpectedQuote>) =>
        assert.throws(() => verifyQuote(message, signature, { ...expected, ...change }), has('malformed'));
      refuses(quoted, { nonce: flip(nonce) });
      refuses(quoted, { selection: selection.slice(1) });
      refuses(flip(quoted), {});
      refuses(quoted, { values: values.toReversed() });
      await extend();
      refuses(quoted, { values: await tools.direct((tpm) => readPcrs(tpm, SELECTION)) });
    });
  }

  it('we take what certify, nvcertify and gettime say, and nothing else', async () => {
    const nonce = randomBytes(20);
    const asked = `-q ${nonce.toString('hex')} -g sha256 -s ecdsa -o signature --attestation message`;
    await tools.run(
      'tpm2_createprimary -Q -C o -G ecc256:ecdsa:null -a sensitivedataorigin|userwithauth|restricted|sign -c key.ctx',
    );
    await tools.run('tpm2_readpublic -Q -c key.ctx -o key.pub -n key.name');
    const key = tools.read('key.pub', publicFile).value;
    const read = () => [tools.bytes('message'), tools.read('signature', signatureFile)] as const;

    // It takes no nonce, and sends these four bytes.
    const certified = { key, nonce: Buffer.from('00ff55aa', 'hex'), name: tools.bytes('key.name') };
    await tools.run('tpm2_certify -Q -c key.ctx -C key.ctx -g sha256 -o message -s signature');
    verifyCertify(...read(), certified);
    assert.throws(
      () => verifyCertify(...read(), { ...certified, name: flip(certified.name) }),
      has('malformed'),
    );
    assert.throws(() => verifyCertify(...read(), { ...certified, nonce }), has('malformed'));

    tools.write('data', 'certified');
    await tools.run('tpm2_nvdefine -Q 0x01500040 -C o -s 9 -a ownerread|ownerwrite');
    await tools.run('tpm2_nvwrite -Q 0x01500040 -C o -i data');
    await tools.run(`tpm2_nvcertify -Q -C key.ctx -c o --size 5 --offset 4 ${asked} 0x01500040`);
    const index = await tools.direct((tpm) => readNvIndex(tpm, 0x01500040));
    assert.ok(index);
    const expected = { key, nonce, name: index.name, offset: 4 };
    assert.equal(verifyNvCertify(...read(), expected).attested.nvContents.toString(), 'ified');
    assert.throws(() => verifyNvCertify(...read(), { ...expected, offset: 0 }), has('malformed'));
    assert.throws(() => verifyCertify(...read(), expected), has('malformed'));

    await tools.run(`tpm2_gettime -Q -c key.ctx ${asked}`);
    const { attested } = verifyAttest(St.ATTEST_TIME, ...read(), { key, nonce });
    assert.ok(attested.time.time > 0n);
    assert.throws(
      () => verifyAttest(St.ATTEST_TIME, ...read(), { key, nonce: flip(nonce) }),
      has('malformed'),
    );
  });
});
