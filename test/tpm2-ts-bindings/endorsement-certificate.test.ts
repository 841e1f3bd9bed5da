import assert from 'node:assert/strict';
import { randomBytes, type X509Certificate } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import fc from 'fast-check';
import {
  certificateOf,
  certifies,
  type EndorsementKeyName,
  endorsementKeyKind,
  endorsementKeyTemplate,
  GetCapability,
  listEndorsementCertificates,
  NvAttribute as N,
  NV_Read,
  NV_Write,
  NvIndex,
  NvRange,
  PersistentHandle,
  permanent,
  publicKeyObject,
  Rh,
  readEndorsementCertificate,
  readEndorsementChain,
  readEndorsementKeyTemplate,
  readNvContent,
  readObject,
  type Tpm,
  verifyEndorsementCertificate,
  withPassword,
} from 'tpm2-ts-bindings';
import { type RecordingProxy, startRecordingProxy } from '../support/recording-proxy.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { assertNothingLeaked, connectTpm, NOTHING, withPrimary } from '../support/tpm-fixture.js';
import { has, OWNER, says, withNv } from './make.js';
import { Maker } from './maker.js';

/** Where swtpm_setup puts its H-3. */
const SECOND_EK = 0x81010016;
const ENDORSEMENT = permanent(Rh.ENDORSEMENT);

describe('tpm2-ts-bindings: endorsement certificates', () => {
  const DAY = 86_400_000;
  let maker: Maker;
  let stranger: Maker;
  let swtpm: Swtpm;
  let other: Swtpm;
  let tpm: Tpm;
  let bus: RecordingProxy;
  let otherTpm: Tpm;
  /** What becomes of answers of the other TPM. */
  let interposed = (message: Buffer, _code: number): Buffer => message;
  let rsa: X509Certificate;
  let ecc: X509Certificate;

  before(async () => {
    maker = new Maker();
    stranger = new Maker();
    swtpm = await startSwtpm();
    other = await startSwtpm();
    await maker.manufacture(swtpm);
    await stranger.manufacture(other, '--rsa-keysize', '3072');
    tpm = await connectTpm(swtpm.socket);
    bus = await startRecordingProxy(other.socket, {
      response: (message, command) => interposed(message, command.readUInt32BE(6)),
    });
    otherTpm = await connectTpm(bus.path);
    [rsa, ecc] = [await certificate(tpm, 'L-1'), await certificate(tpm, 'H-3')];
  });
  afterEach(() => {
    interposed = (message) => message;
  });
  after(async () => {
    for (const one of [tpm, otherTpm]) {
      if (one !== undefined) await assertNothingLeaked(one);
      await one?.close();
    }
    await bus?.close();
    for (const one of [swtpm, other]) await one?.stop();
    for (const one of [maker, stranger]) one?.remove();
  });

  async function certificate(of: Tpm, name: EndorsementKeyName): Promise<X509Certificate> {
    const found = await readEndorsementCertificate(of, name);
    assert.ok(found, `no certificate for ${name}`);
    return found;
  }
  async function persistent(of: Tpm, handle: number) {
    const found = await readObject(of, handle);
    assert.ok(found);
    return found.publicArea;
  }
  /** An index of ours with these bytes, in as many writes as it takes. */
  const withContent = (handle: number, content: Buffer, body: () => Promise<void>) =>
    withNv(
      tpm,
      { handle, size: content.length, attributes: N.OWNERWRITE | N.OWNERREAD | N.AUTHREAD },
      async (nvIndex, current) => {
        assert.equal(await readNvContent(tpm, handle), undefined, 'never written');
        for (let offset = 0; offset < content.length; offset += 1000) {
          await tpm.run(
            NV_Write,
            { authHandle: withPassword(OWNER), nvIndex: offset === 0 ? nvIndex : await current() },
            { data: content.subarray(offset, offset + 1000), offset },
          );
        }
        await body();
      },
    );
  const refuses = (reason: RegExp) => (error: unknown) =>
    has('malformed')(error) && reason.test(String(error));

  it('the certified keys are those of our templates', async () => {
    assert.deepEqual(await listEndorsementCertificates(tpm), ['L-1', 'H-3']);
    assert.deepEqual(await listEndorsementCertificates(otherTpm), ['H-3', 'H-6']);
    for (const [of, name, handle] of [
      [tpm, 'L-1', PersistentHandle.EK_RSA],
      [tpm, 'H-3', SECOND_EK],
      [otherTpm, 'H-6', 0x8101001c],
      [otherTpm, 'H-3', SECOND_EK],
    ] as const) {
      const theirs = await persistent(of, handle);
      await withPrimary(
        of,
        endorsementKeyTemplate(name),
        async (key) => assert.deepEqual(key.publicArea.bytes, theirs.bytes),
        NOTHING,
        ENDORSEMENT,
      );
      assert.ok(certifies(await certificate(of, name), theirs.value), name);
    }
  });

  it('a template that the maker left in the TPM goes before the default one', async () => {
    const name = 'L-2';
    assert.deepEqual((await readEndorsementKeyTemplate(tpm, name)).bytes, endorsementKeyTemplate(name).bytes);
    // Keys that sign are none of the profile's, so swtpm_setup leaves the templates.
    const signing = await startSwtpm();
    let signingTpm: Tpm | undefined;
    try {
      await maker.manufacture(signing, '--allow-signing');
      signingTpm = await connectTpm(signing.socket);
      for (const [kind, handle] of [
        ['L-1', PersistentHandle.EK_RSA],
        ['H-3', SECOND_EK],
      ] as const) {
        const of: Tpm = signingTpm;
        const template = await readEndorsementKeyTemplate(of, kind);
        assert.notDeepEqual(template.bytes, endorsementKeyTemplate(kind).bytes);
        const made = await withPrimary(
          of,
          template,
          async (key) => key.publicArea.value,
          NOTHING,
          ENDORSEMENT,
        );
        assert.deepEqual(made, (await persistent(of, handle)).value);
        assert.ok(certifies(await certificate(of, kind), made));
      }
    } finally {
      await signingTpm?.close();
      await signing.stop();
    }
    const padded = Buffer.concat([endorsementKeyTemplate('H-2').bytes, Buffer.alloc(50)]);
    await withContent(NvIndex.EK_TEMPLATE_L2, padded, async () =>
      assert.deepEqual(
        (await readEndorsementKeyTemplate(tpm, name)).bytes,
        endorsementKeyTemplate('H-2').bytes,
      ),
    );
    await withContent(NvIndex.EK_TEMPLATE_L2, padded.subarray(0, 50), () =>
      assert.rejects(readEndorsementKeyTemplate(tpm, name), refuses(/EK template in the TPM/)),
    );
  });

  it('a certificate does not fit another TPM, nor another key of the same', async () => {
    const [theirs, second] = [await persistent(otherTpm, SECOND_EK), await persistent(tpm, SECOND_EK)];
    assert.ok(!certifies(ecc, theirs.value));
    assert.ok(!certifies(rsa, second.value));
    assert.ok(certifies(ecc, second.value));
  });

  it('the maker vouches for it, over an issuer, whatever else is in the chain', () => {
    for (const leaf of [rsa, ecc]) {
      const chain = [stranger.issuer, ecc, maker.issuer, maker.issuer];
      const path = verifyEndorsementCertificate(leaf, chain, [stranger.root, maker.root]);
      assert.deepEqual(
        path.map(({ subject }) => subject),
        ['CN=unknown', 'CN=swtpm-localca', 'CN=swtpm-localca-rootca'],
      );
      assert.equal(verifyEndorsementCertificate(leaf, [], [maker.issuer]).length, 2, 'an issuer as root');
    }
  });

  it('refuses another root, a missing issuer and other dates, with the reason', () => {
    const verify = (
      leaf: X509Certificate,
      chain: readonly X509Certificate[],
      root: X509Certificate,
      at?: Date,
    ) => verifyEndorsementCertificate(leaf, chain, [root], at);
    assert.throws(() => verify(rsa, [maker.issuer], stranger.root), refuses(/no trusted root/));
    assert.throws(() => verify(rsa, [], maker.root), refuses(/its issuer is CN=swtpm-localca\./));
    assert.throws(() => verify(rsa, [stranger.issuer], stranger.root), refuses(/no trusted root/));
    // Roots that are not trusted vouch for themselves without end.
    assert.throws(() => verify(rsa, [maker.issuer, maker.root], stranger.root), refuses(/no trusted root/));
    assert.throws(
      () => verify(rsa, [maker.issuer], maker.root, new Date(Date.parse(rsa.validFrom) - 1)),
      refuses(/valid only from/),
    );
  });

  it('refuses a certificate of the same maker for another purpose', async () => {
    const bytes = await readNvContent(tpm, NvIndex.PLATFORM_CERTIFICATE);
    assert.ok(bytes);
    const platform = certificateOf(bytes, 'platform certificate');
    assert.deepEqual(platform.publicKey, rsa.publicKey);
    assert.throws(
      () => verifyEndorsementCertificate(platform, [maker.issuer], [maker.root]),
      refuses(/another purpose/),
    );
  });

  it('refuses what expired, and issuers that are no authority or expired', async () => {
    const { value } = await persistent(tpm, SECOND_EK);
    const file = (name: string) => maker.file(name);
    writeFileSync(file('ek.pem'), publicKeyObject(value).export({ type: 'spki', format: 'pem' }));
    await maker.tool('certtool', '--generate-privkey', '--ecc', '--outfile', file('between.key'));
    const between = (name: string, template: string, ...options: string[]) =>
      maker.issue(name, `cn = Between\n${template}\n`, ['--load-privkey', file('between.key'), ...options], {
        certificate: 'ca/swtpm-localca-rootca-cert.pem',
        key: 'ca/swtpm-localca-rootca-privkey.pem',
      });
    const ek = (name: string, dates: string) =>
      maker.issue(
        name,
        `cn = TPM\n${dates}\nkey_purpose_oid = 2.23.133.8.1\n`,
        ['--load-pubkey', file('ek.pem')],
        {
          certificate: 'good.pem',
          key: 'between.key',
        },
      );
    const good = await between('good', 'ca\ncert_signing_key\nexpiration_days = 3');
    // One of version 1 says nothing of what it is for.
    const noCa = await between('no-ca', 'expiration_days = 3', '--v1');
    const leaf = await ek('leaf', 'expiration_days = 100');
    const expired = await ek(
      'expired',
      'activation_date = "2020-01-01 00:00:00 UTC"\nexpiration_date = "2020-02-01 00:00:00 UTC"',
    );
    const verify = (chain: X509Certificate[], at?: Date) =>
      verifyEndorsementCertificate(leaf, chain, [maker.root], at);
    assert.deepEqual(
      verify([noCa, good]).map(({ raw }) => raw),
      [leaf.raw, good.raw, maker.root.raw],
    );
    assert.throws(() => verify([noCa]), refuses(/CN=Between: it is no authority/));
    assert.throws(() => verify([good], new Date(Date.now() + 5 * DAY)), refuses(/CN=Between: it expired on/));
    assert.throws(() => verifyEndorsementCertificate(leaf, [], [noCa]), refuses(/no authority/), 'as a root');
    assert.throws(
      () => verifyEndorsementCertificate(expired, [good], [maker.root]),
      refuses(/: it expired on Feb {2}1 00:00:00 2020/),
    );
    assert.throws(
      () => verifyEndorsementCertificate(expired, [good], [maker.root], new Date('2020-01-15')),
      refuses(/CN=Between: it is valid only from/),
    );
  });

  it('refuses a certificate with any byte changed, and any part of one', () => {
    const whole = ecc.raw;
    fc.assert(
      fc.property(fc.nat(whole.length - 1), fc.integer({ min: 1, max: 255 }), (at, change) => {
        const bytes = Buffer.from(whole);
        bytes[at] = (bytes[at] ?? 0) ^ change;
        assert.throws(
          () => verifyEndorsementCertificate(certificateOf(bytes, 'test'), [maker.issuer], [maker.root]),
          has('malformed'),
        );
        assert.throws(() => certificateOf(whole.subarray(0, at), 'test'), has('malformed'));
      }),
      { numRuns: 500 },
    );
  });

  it('refuses a certificate with a key of an unknown kind', () => {
    const bytes = Buffer.from(ecc.raw);
    const ecPublicKey = bytes.indexOf(Buffer.from('06072a8648ce3d0201', 'hex'));
    assert.ok(ecPublicKey > 0);
    bytes[ecPublicKey + 8] = 0x7f;
    assert.throws(() => certificateOf(bytes, 'test'), refuses(/key of an unknown kind/));
  });

  it('reads an index that is larger than its certificate, and refuses one without', async () => {
    const { certificateIndex } = endorsementKeyKind('L-2');
    assert.equal(await readEndorsementCertificate(tpm, 'L-2'), undefined);
    for (const padding of [Buffer.alloc(700), Buffer.alloc(700, 0xff), randomBytes(700)]) {
      await withContent(certificateIndex, Buffer.concat([ecc.raw, padding]), async () => {
        assert.deepEqual((await certificate(tpm, 'L-2')).raw, ecc.raw);
        assert.deepEqual(await listEndorsementCertificates(tpm), ['L-1', 'L-2', 'H-3']);
      });
    }
    for (const content of [ecc.raw.subarray(0, -1), Buffer.alloc(100), Buffer.from('3003020101', 'hex')]) {
      await withContent(certificateIndex, content, () =>
        assert.rejects(
          readEndorsementCertificate(tpm, 'L-2'),
          refuses(/NV index 0x01c0000a: .*get the certificate from the maker/),
        ),
      );
    }
  });

  it('reads what authorises reading it is given for', async () => {
    const content = randomBytes(2048);
    await withContent(NvRange.OWNER.first, content, async () => {
      assert.deepEqual(await readNvContent(tpm, NvRange.OWNER.first), content);
      assert.deepEqual(await readNvContent(tpm, NvRange.OWNER.first, () => withPassword(OWNER)), content);
      await assert.rejects(
        readNvContent(tpm, NvRange.OWNER.first, () => withPassword(permanent(Rh.PLATFORM))),
        says('NV_AUTHORIZATION'),
      );
    });
    assert.equal(await readNvContent(tpm, NvRange.OWNER.first), undefined, 'not defined');
  });

  it('refuses a TPM that reads less than was asked, or nothing at all', async () => {
    const read = () => readNvContent(otherTpm, NvIndex.PLATFORM_CERTIFICATE);
    await assert.doesNotReject(read());
    interposed = (message, code) => {
      if (code !== NV_Read.code) return message;
      // One byte less: the whole, the parameters, the data.
      message.writeUInt32BE(message.length - 1, 2);
      message.writeUInt32BE(message.readUInt32BE(10) - 1, 10);
      message.writeUInt16BE(message.readUInt16BE(14) - 1, 14);
      return Buffer.concat([message.subarray(0, 16), message.subarray(17)]);
    };
    await assert.rejects(read(), refuses(/were asked/));
    interposed = (message, code) => {
      if (code === GetCapability.code) message.writeUInt32BE(0, message.length - 4);
      return message;
    };
    await assert.rejects(read(), refuses(/were asked/));
  });

  it('reads the chain in the TPM, over the ends of indices and padding', async () => {
    const { first } = NvRange.EK_CERTIFICATE_CHAIN;
    assert.deepEqual(await readEndorsementChain(tpm), []);
    const [issuer, root] = [maker.issuer.raw, maker.root.raw];
    const all = Buffer.concat([issuer, Buffer.alloc(5), root, Buffer.alloc(9, 0xff)]);
    const cut = issuer.length - 100;
    await withContent(first + 1, all.subarray(cut), () =>
      withContent(first, all.subarray(0, cut), async () => {
        const chain = await readEndorsementChain(tpm);
        assert.deepEqual(
          chain.map(({ raw }) => raw),
          [issuer, root],
        );
        assert.equal(verifyEndorsementCertificate(rsa, chain, [maker.root]).length, 3);
      }),
    );
    await withContent(first, issuer.subarray(0, cut), () =>
      assert.rejects(readEndorsementChain(tpm), refuses(/certificate chain in the TPM/)),
    );
  });
});
