import { type Finding, finding } from 'vtpm-common';
import { hexHandle, type RootTpmEnrolment } from '../root-tpm/enrolment.js';
import type { StartedFacts, TpmFacts } from '../root-tpm/examine.js';
import type { RootTpmLocation } from '../root-tpm/index.js';
import type { IndexState } from '../root-tpm/nv-counter.js';
import type { Machine } from './machine.js';
import { judgeCoverage } from './pcr-coverage.js';

/** What an installation has, or init would be asked for. */
export interface Expectation {
  readonly location: RootTpmLocation;
  readonly pcrSelection: string;
  /** Of the SHA-256 bank. */
  readonly pcrs: readonly number[];
  readonly srkHandle: number;
  readonly enrolment: RootTpmEnrolment | undefined;
}

export const CLEARED =
  'vtpmctl down; put the TPM back that init enrolled with, or restore from a backup what the chip had';

/** Judges what was found; no TPM is asked here. */
export function judgeTpm(facts: TpmFacts, expected: Expectation, machine: Machine): Finding[] {
  const { path } = expected.location;
  if (!facts.isStarted) {
    return expected.location.kind === 'device'
      ? [
          finding(
            'tpm-started',
            'problem',
            `the firmware did not start the TPM ${path}`,
            'systemctl reboot --firmware-setup, and enable the TPM there',
          ),
        ]
      : [finding('tpm-started', 'note', `the TPM ${path} waits for TPM2_Startup, which the manager sends`)];
  }
  return [
    finding(
      'tpm',
      'ok',
      `the TPM ${path} answers (${facts.manufacturer}, firmware ${facts.firmwareVersion})`,
    ),
    protection(expected.location),
    fitness(facts),
    bank(facts, expected),
    ...owner(facts, expected.enrolment !== undefined),
    lockout(facts),
    ...room(facts, expected.location),
    srk(facts, expected),
    ...nvIndices(facts, expected),
    ...nvSpace(facts, expected),
    ...judgeCoverage(
      expected.pcrSelection,
      expected.pcrs,
      facts.pcrs,
      machine,
      expected.enrolment !== undefined,
    ),
  ];
}

export function protection({ kind, path }: RootTpmLocation): Finding {
  if (kind === 'device')
    return finding('tpm-hardware', 'ok', 'the root key is held by the TPM of this machine');
  return finding(
    'tpm-hardware',
    'warning',
    kind === 'embedded'
      ? 'the root TPM is the embedded one, software on the same disk: nothing is hardware-protected'
      : `the root TPM is software behind ${path}: it protects no better than that is protected, and its PCRs do not say what this host booted`,
    'vtpmctl init --tpm device:/dev/tpmrm0, on a machine with a TPM chip',
  );
}

function fitness({ missing }: StartedFacts): Finding {
  return missing.length === 0
    ? finding('tpm-fitness', 'ok', 'the TPM has every algorithm and command that is needed')
    : finding(
        'tpm-fitness',
        'problem',
        `the TPM lacks ${missing.join(', ')}`,
        "update the TPM's firmware with fwupdmgr update, or choose another TPM with vtpmctl init --tpm",
      );
}

function bank({ sha256Bank }: StartedFacts, { pcrs, pcrSelection }: Expectation): Finding {
  const absent = pcrs.filter((pcr) => !sha256Bank.includes(pcr));
  return absent.length === 0
    ? finding('tpm-pcr-bank', 'ok', 'the SHA-256 bank has the selected PCRs')
    : finding(
        'tpm-pcr-bank',
        'problem',
        `the SHA-256 bank has no PCR ${absent.join(', ')} of ${pcrSelection}`,
        'tpm2_pcrallocate sha256:all, then systemctl reboot',
      );
}

function owner({ isOwnerEnabled, hasOwnerPassword }: StartedFacts, isEnrolled: boolean): Finding[] {
  if (!isOwnerEnabled) {
    return [
      finding(
        'tpm-owner',
        'problem',
        'the storage hierarchy of the TPM is off',
        'systemctl reboot --firmware-setup, and enable the storage hierarchy there',
      ),
    ];
  }
  if (!hasOwnerPassword) return [];
  return [
    finding(
      'tpm-owner',
      'note',
      'the TPM has an owner password',
      `vtpmctl ${isEnrolled ? 'uninstall' : 'init --tpm auto'} --owner-auth-file FILE, where the owner is needed`,
    ),
  ];
}

function lockout({ lockout: { isLocked, failures, recoverySeconds } }: StartedFacts): Finding {
  if (isLocked) {
    return finding(
      'tpm-lockout',
      'warning',
      `the TPM is in lockout after ${failures} wrong passwords of some program, and takes one more in ${recoverySeconds} s`,
      'tpm2_dictionarylockout --clear-lockout',
    );
  }
  return failures > 0
    ? finding('tpm-lockout', 'note', `the TPM has counted ${failures} wrong passwords and is not in lockout`)
    : finding('tpm-lockout', 'ok', 'the TPM is not in lockout');
}

/** A resource manager gives every program its own room; without one what another left is in the way. */
function room({ loaded }: StartedFacts, { kind, path }: RootTpmLocation): Finding[] {
  if (loaded === 0 || path === '/dev/tpmrm0') return [];
  return [
    finding(
      'tpm-room',
      'warning',
      `${loaded} ${loaded === 1 ? 'object or session is' : 'objects or sessions are'} loaded in the TPM and take room away`,
      `tpm2_flushcontext --transient-object --tcti ${kind === 'device' ? 'device' : 'swtpm:path='}${kind === 'device' ? `:${path}` : path}`,
    ),
  ];
}

function srk({ srk: found }: StartedFacts, { srkHandle, enrolment }: Expectation): Finding {
  const where = `the storage root key ${hexHandle(srkHandle)}`;
  if (enrolment) {
    if (!found)
      return finding(
        'tpm-srk',
        'problem',
        `${where} is gone: the TPM was cleared, or is another one`,
        CLEARED,
      );
    if (found.name !== enrolment.srkName) {
      return finding(
        'tpm-srk',
        'problem',
        `${where} is not the enrolled one: the TPM was cleared, or is another one`,
        CLEARED,
      );
    }
    return finding('tpm-srk', 'ok', `${where} is the enrolled one`);
  }
  if (!found)
    return finding('tpm-srk', 'ok', `there is no key at ${hexHandle(srkHandle)}; init makes one there`);
  return found.flaw === undefined
    ? finding('tpm-srk', 'ok', `${where} is fit; init uses it as it is`)
    : finding(
        'tpm-srk',
        'problem',
        `the object at ${hexHandle(srkHandle)} cannot be the storage root key: ${found.flaw}`,
        'vtpmctl init --tpm auto --srk-handle 0x81000002',
      );
}

function nvIndices(facts: StartedFacts, { enrolment }: Expectation): Finding[] {
  if (!enrolment) return [];
  const { root, anchor, revocation } = enrolment;
  return [
    nvIndex('tpm-nv', facts.nvHalf, root.nvHandle, 'with a half of the root key'),
    nvIndex('tpm-anchor', facts.anchorCounter, anchor.handle, 'that counts the states of the store'),
    nvIndex('tpm-revocation', facts.revocationCounter, revocation.handle, 'that counts revocations'),
  ];
}

function nvIndex(check: string, state: IndexState | undefined, handle: number, role: string): Finding {
  const where = `the NV index ${hexHandle(handle)} ${role}`;
  if (state === 'fit') return finding(check, 'ok', `${where} is there`);
  const what = state === 'changed' ? 'was made anew with other properties' : 'is gone';
  return finding(check, 'problem', `${where} ${what}: the TPM was cleared, or is another one`, CLEARED);
}

/** Init makes a counter for the store, one for revocations, and an index of about that size; a rotation one more index. */
function nvSpace({ countersLeft }: StartedFacts, { enrolment }: Expectation): Finding[] {
  const needed = enrolment ? 1 : 3;
  if (countersLeft === undefined || countersLeft >= needed) return [];
  return [
    finding(
      'tpm-nv-space',
      enrolment ? 'warning' : 'problem',
      `the TPM has NV space for ${countersLeft} more ${countersLeft === 1 ? 'counter' : 'counters'}; ${enrolment ? 'a rotation of the root key' : 'init'} needs ${needed}`,
      'tpm2_nvreadpublic, and tpm2_nvundefine for an index that nothing uses',
    ),
  ];
}
