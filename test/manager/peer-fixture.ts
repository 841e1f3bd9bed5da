import { randomBytes } from 'node:crypto';
import { attestationPublic, type RootTpm, type RootTpmEnrolment } from 'vtpm-manager/root-tpm/index';
import type { Evidence, Peer } from 'vtpm-proto';
import { INSTALLATION, PCRS } from './root-tpm-fixture.js';

/** A host as another one sees it. */
export interface Host {
  readonly enrolment: RootTpmEnrolment;
  readonly attestationKey: Buffer;
  readonly peer: Peer;
}

export const transcript = (): Buffer => randomBytes(32);

/** Enrols a chip as a host with an attestation key; nothing of its platform is approved. */
export async function hostOf(tpm: RootTpm, enrolment: RootTpmEnrolment, name = 'b'): Promise<Host> {
  const attestationKey = await tpm.makeAttestationKey(enrolment);
  const { publicArea } = await tpm.endorsement();
  return {
    enrolment,
    attestationKey,
    peer: {
      name,
      hostId: randomBytes(32),
      tlsKey: randomBytes(32),
      addresses: [],
      endorsementKey: publicArea,
      attestationKey: attestationPublic(attestationKey),
      endorsedBy: 'pinned',
      provenAt: 1n,
      platforms: [],
      policyAuthority: '',
      maySend: true,
      mayReceive: true,
      addedAt: 1n,
      installation: INSTALLATION,
      revocationHandle: enrolment.revocation.handle,
      backupKey: randomBytes(32),
    },
  };
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
