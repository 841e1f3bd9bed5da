import assert from 'node:assert/strict';
import { diffieHellman, generateKeyPairSync, randomBytes } from 'node:crypto';
import {
  Alg,
  type Attest,
  agreementKeyTemplate,
  attestationKeyTemplate,
  concat,
  decode,
  encode,
  nameOf,
  objectEntity,
  type Public,
  type PublicArea,
  parsePcrSelection,
  pcrDigest,
  publicArea,
  publicKeyObject,
  Rh,
  St,
  signInSoftware,
  softwareKeyPublic,
  tpmsAttest,
  tpmsEccPoint,
  tpmtSignature,
  u32,
  u64,
} from 'tpm2-ts-bindings';
import { endorsementFingerprint } from 'vtpm-manager/peer/endorsement';
import {
  type HostFacts,
  platformDigest,
  readIdentity,
  renderIdentity,
} from 'vtpm-manager/peer/identity-file';
import { fixedPolicy } from 'vtpm-manager/root-tpm/generation';
import { importSecret } from 'vtpm-manager/root-tpm/import-secret';
import {
  attestationPublic,
  type ImportKey,
  type RootTpm,
  type RootTpmEnrolment,
} from 'vtpm-manager/root-tpm/index';
import { REVOCATION_SHAPE } from 'vtpm-manager/root-tpm/nv-counter';
import { writtenEntity } from 'vtpm-manager/root-tpm/nv-index';
import { type Evidence, type Peer, signingKeyFromSeed } from 'vtpm-proto';
import { testPeer } from '../support/test-peer.js';
import { INSTALLATION, PCRS } from './root-tpm-fixture.js';

export const transcript = (): Buffer => randomBytes(32);

/** A host as it is kept, of which no platform is approved. */
export function peerOf(keys: {
  readonly endorsementKey: Uint8Array;
  readonly attestationKey: Uint8Array;
  readonly revocationHandle: number;
}): Peer {
  return testPeer({ platforms: [], installation: INSTALLATION, ...keys });
}

/** A host with a TPM. */
export interface Host {
  readonly enrolment: RootTpmEnrolment;
  readonly attestationKey: Buffer;
  readonly peer: Peer;
}

export async function hostOf(tpm: RootTpm, enrolment: RootTpmEnrolment): Promise<Host> {
  const attestationKey = await tpm.makeAttestationKey(enrolment);
  const peer = peerOf({
    endorsementKey: (await tpm.endorsement()).publicArea,
    attestationKey: attestationPublic(attestationKey),
    revocationHandle: enrolment.revocation.handle,
  });
  return { enrolment, attestationKey, peer };
}

/** What the host sends about itself. */
export async function evidenceOf(
  tpm: RootTpm,
  { enrolment, attestationKey }: Host,
  over: Buffer,
  approvals: readonly unknown[] = [],
): Promise<Evidence> {
  const { attest, signature, pcrValues } = await tpm.quote(enrolment, attestationKey, PCRS, over);
  const revocation = await tpm.certifyRevocation(enrolment, attestationKey, over);
  return {
    attest,
    signature,
    pcrSelection: PCRS,
    pcrValues,
    approvals: approvals.map((approval) => Buffer.from(JSON.stringify(approval))),
    revocationAttest: revocation.attest,
    revocationSignature: revocation.signature,
    challengeAnswer: Buffer.alloc(0),
  };
}

type Said<T extends Attest['type']> = Extract<Attest, { readonly type: T }>['attested'];

/** Says and signs what a TPM would, and what none would: a key in software whose public area claims to be a TPM's. */
export class LyingTpm {
  readonly #key = generateKeyPairSync('ec', { namedCurve: 'P-256' }).privateKey;
  readonly attestationKey: PublicArea;
  readonly values = [randomBytes(32), randomBytes(32)];
  readonly handle = 0x01810001;
  #agreement = this.#key;
  #agreementName: Buffer = Buffer.alloc(0);
  boot = { resetCount: 7, restartCount: 3 };

  constructor() {
    const { value } = softwareKeyPublic(this.#key, { use: 'sign' });
    const template = attestationKeyTemplate().value;
    assert.ok(value.type === Alg.ECC && template.type === Alg.ECC);
    this.attestationKey = publicArea({ ...template, unique: value.unique });
  }

  /** Approved here. */
  get peer(): Peer {
    const peer = peerOf({
      endorsementKey: Buffer.alloc(0),
      attestationKey: this.attestationKey.bytes,
      revocationHandle: this.handle,
    });
    return { ...peer, platforms: [{ pcrSelection: PCRS, pcrDigest: this.pcrDigest, approvedAt: 1n }] };
  }

  get pcrDigest(): Buffer {
    return pcrDigest(Alg.SHA256, this.values);
  }

  say<T extends Attest['type']>(
    type: T,
    over: Buffer,
    attested: Said<T>,
  ): { attest: Buffer; signature: Buffer } {
    const body = encode(tpmsAttest, {
      type,
      qualifiedSigner: Buffer.alloc(34),
      extraData: over,
      clockInfo: { clock: 1n, safe: true, ...this.boot },
      firmwareVersion: 1n,
      attested,
    } as unknown as Attest);
    const attest = concat(encode(u32, 0xff544347), body);
    return { attest, signature: encode(tpmtSignature, signInSoftware(this.#key, attest)) };
  }

  evidence(over: Buffer, counter = 5n): Evidence {
    const quote = this.say(St.ATTEST_QUOTE, over, {
      pcrSelect: parsePcrSelection(PCRS),
      pcrDigest: this.pcrDigest,
    });
    const nv = this.say(St.ATTEST_NV, over, {
      indexName: writtenEntity(this.handle, REVOCATION_SHAPE).name,
      offset: 0,
      nvContents: encode(u64, counter),
    });
    return {
      ...quote,
      pcrSelection: PCRS,
      pcrValues: this.values,
      approvals: [],
      revocationAttest: nv.attest,
      revocationSignature: nv.signature,
      challengeAnswer: Buffer.alloc(0),
    };
  }

  /** @param change of the key as it has to be */
  importKey(
    over: Buffer,
    change: (key: Public) => Public = (key) => key,
    hierarchy: number = Rh.NULL,
  ): Omit<ImportKey, 'unwrap' | 'drop'> {
    const [first = '', second = ''] = this.values.map((value) => value.toString('hex'));
    const policy = fixedPolicy(PCRS, { 'sha256:0': first, 'sha256:7': second });
    this.#agreement = generateKeyPairSync('ec', { namedCurve: 'P-256' }).privateKey;
    const { value } = softwareKeyPublic(this.#agreement, { use: 'sign' });
    assert.ok(value.type === Alg.ECC);
    const area = publicArea(change(agreementKeyTemplate(policy, value.unique).value));
    const { name } = objectEntity(0, area);
    this.#agreementName = name;
    const qualifiedName = nameOf(Alg.SHA256, concat(encode(u32, hierarchy), name));
    const certified = this.say(St.ATTEST_CERTIFY, over, { name, qualifiedName });
    return {
      publicArea: area.bytes,
      certifyInfo: certified.attest,
      certifySignature: certified.signature,
      pcrSelection: PCRS,
    };
  }

  /** With the last import key. */
  unwrap(point: Uint8Array): Buffer {
    const unique = decode(tpmsEccPoint, point);
    const publicKey = publicKeyObject(agreementKeyTemplate(Buffer.alloc(0), unique).value);
    const z = diffieHellman({ privateKey: this.#agreement, publicKey });
    return importSecret(z, point, this.#agreementName);
  }
}

/**
 * What another host gives out that has the endorsement key of this one.
 * @param own identity of this host
 * @returns the identity, and the fingerprint of the endorsement key
 */
export function identityOf(
  own: string,
  tpm: LyingTpm,
  changes: Partial<HostFacts> = {},
  quotedBy = tpm,
): [identity: string, fingerprint: string] {
  const key = signingKeyFromSeed(Buffer.alloc(32, 1));
  const facts: HostFacts = {
    ...readIdentity(own).facts,
    hostId: key.publicKey,
    tlsKey: Buffer.alloc(32, 2),
    attestationKey: Buffer.from(tpm.peer.attestationKey),
    ...changes,
  };
  const identity = renderIdentity(facts, quotedBy.evidence(platformDigest(facts)), key);
  return [identity, endorsementFingerprint(facts.endorsementKey)];
}
