import { type Approval, namedPcrs, parsePcrSelection } from 'tpm2-ts-bindings';
import { bytesEqual, type Challenge, type Evidence, type ImportKeyOffer, type Peer } from 'vtpm-proto';
import { wipe } from '../keys/index.js';
import { checkAnswer, type MadeChallenge, makeChallenge } from '../peer/attestation-key.js';
import { type PlatformFacts, verifyEvidence } from '../peer/evidence.js';
import { sealSecret, verifyImportKey } from '../peer/import-key.js';
import type { ImportKey, RootTpm, RootTpmEnrolment } from '../root-tpm/index.js';
import type { TrustStore } from '../trust/trust-configuration.js';
import type { Attestor } from './ports.js';

export interface AttestorParts {
  readonly tpm: () => RootTpm;
  readonly enrolment: () => RootTpmEnrolment;
  readonly trust: Pick<TrustStore, 'ensureAttestationKey' | 'changePeer'>;
  /** Of this host's policy authority; none where it has no authority. */
  readonly approvals: () => readonly Approval[];
}

/** As many as the other end takes. */
const MAX_APPROVALS = 64;
const EMPTY = new Uint8Array(0);

/** The host's own chip, and what is kept of the peers. */
export class TpmAttestor implements Attestor {
  constructor(private readonly parts: AttestorParts) {}

  async makeImportKey(qualifying: Uint8Array): Promise<ImportKey> {
    const enrolment = this.parts.enrolment();
    const { pcrSelection } = enrolment.root;
    return await this.parts.tpm().makeImportKey(enrolment, await this.#key(), pcrSelection, qualifying);
  }

  async evidence(qualifying: Uint8Array): Promise<Omit<Evidence, 'challengeAnswer'>> {
    const tpm = this.parts.tpm();
    const enrolment = this.parts.enrolment();
    const { pcrSelection, policy } = enrolment.root;
    const key = await this.#key();
    const { attest, signature, pcrValues } = await tpm.quote(enrolment, key, pcrSelection, qualifying);
    const shown = { attest, signature, pcrSelection, pcrValues };
    if (policy.kind !== 'authority') {
      return { ...shown, approvals: [], revocationAttest: EMPTY, revocationSignature: EMPTY };
    }
    const revocation = await tpm.certifyRevocation(enrolment, key, qualifying);
    return {
      ...shown,
      approvals: this.#approvals(pcrSelection, pcrValues),
      revocationAttest: revocation.attest,
      revocationSignature: revocation.signature,
    };
  }

  async answer(challenge: Challenge): Promise<Uint8Array> {
    const credential = {
      credentialBlob: Buffer.from(challenge.credentialBlob),
      secret: Buffer.from(challenge.secret),
    };
    return await this.parts.tpm().activateCredential(this.parts.enrolment(), await this.#key(), credential);
  }

  challenge(peer: Peer): MadeChallenge | undefined {
    return peer.provenAt > 0n ? undefined : makeChallenge(peer.endorsementKey, peer.attestationKey);
  }

  async prove(peer: Peer, made: MadeChallenge, answer: Uint8Array): Promise<void> {
    try {
      checkAnswer(made, answer);
    } finally {
      wipe(made.answer);
    }
    await this.parts.trust.changePeer(peer.name, (now) =>
      // Enrolled anew meanwhile: this was another key's proof.
      bytesEqual(now.attestationKey, peer.attestationKey) &&
      bytesEqual(now.endorsementKey, peer.endorsementKey)
        ? { ...now, provenAt: BigInt(Date.now()) }
        : now,
    );
  }

  verify(peer: Peer, evidence: Evidence, qualifying: Uint8Array): PlatformFacts {
    return verifyEvidence(peer, evidence, qualifying);
  }

  wrap(
    peer: Peer,
    offer: ImportKeyOffer,
    qualifying: Uint8Array,
    facts: PlatformFacts,
  ): { readonly point: Uint8Array; readonly secret: Buffer } {
    verifyImportKey(peer, offer, qualifying, facts);
    return sealSecret(offer.publicArea);
  }

  #key(): Promise<Uint8Array> {
    const { trust, tpm, enrolment } = this.parts;
    return trust.ensureAttestationKey(() => tpm().makeAttestationKey(enrolment()));
  }

  /** Those that are for what the registers hold now. */
  #approvals(selection: string, values: readonly Buffer[]): Buffer[] {
    const now = namedPcrs(parsePcrSelection(selection), values);
    return this.parts
      .approvals()
      .filter(
        ({ pcrSelection, pcrs }) =>
          pcrSelection === selection && Object.entries(now).every(([name, value]) => pcrs[name] === value),
      )
      .slice(-MAX_APPROVALS)
      .map((approval) => Buffer.from(JSON.stringify(approval)));
  }
}
