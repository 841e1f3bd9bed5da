import {
  type BackupFacts,
  bytesEqual,
  decode,
  encode,
  expectLength,
  ProtoError,
  type RescueNotice,
  type SignedRescue,
  type SigningKey,
  verifySignature,
} from 'vtpm-proto';
import { verifiedFacts } from '../backup/format.js';
import { ManagerError } from '../error.js';

/** With a backup that the host made, and with a departure to it. */
const FORMATS = { backup: 1, departure: 2 } as const;
const EPOCHS = 1n << 32n;
const DOMAIN = Buffer.from('vtpm.v1 rescue\0');

/** The epoch that a rescue begins: far above whatever the host that is dead had, or will have before it hears of it. */
export function epochAfter(known: bigint): bigint {
  return (known / EPOCHS + 1n) * EPOCHS;
}

/** What the host that was dead is told. @param hostKey of the host that rescued */
export function signNotice(hostKey: SigningKey, notice: Omit<RescueNotice, 'format'>): SignedRescue {
  const format = notice.departure ? FORMATS.departure : FORMATS.backup;
  const bytes = encode('RescueNotice', { format, ...notice });
  return { notice: bytes, signature: hostKey.sign(Buffer.concat([DOMAIN, bytes])) };
}

/** Who reads a notice, and from whom it comes. */
export interface NoticeParties {
  /** Host id of this host. */
  readonly hostId: Uint8Array;
  /** Public half of this host's backup key. */
  readonly backupKey: Uint8Array;
  /** Host id of the peer that handed it over. */
  readonly rescuer: Uint8Array;
}

/**
 * A notice that a vTPM of this host goes on elsewhere. Whoever ends one here this way must have a backup that this host made of
 * it: its own signature is in the notice. Or it is the host that sent it here: whether it did, only the vTPM's record says.
 * @throws ManagerError `newer-format`, `bad-request`
 */
export function verifiedNotice(
  signed: SignedRescue,
  { hostId, backupKey, rescuer }: NoticeParties,
): RescueNotice {
  const notice = parseNotice(signed);
  if (notice.format > FORMATS.departure) {
    throw new ManagerError('newer-format', `it has format ${notice.format}; upgrade this host`);
  }
  if (notice.format !== (notice.departure ? FORMATS.departure : FORMATS.backup)) {
    throw unfit(`it has format ${notice.format}`);
  }
  if (!bytesEqual(notice.rescuer, rescuer)) throw unfit('it is of another host than the one that brings it');
  if (!bytesEqual(notice.source, hostId)) throw unfit('it is about a vTPM of another host');
  if (!verifySignature(rescuer, Buffer.concat([DOMAIN, signed.notice]), signed.signature)) {
    throw unfit('its signature does not verify');
  }
  const { vtpmUuid, epoch } = notice.departure ?? backupOf(notice, backupKey);
  if (!bytesEqual(vtpmUuid, notice.vtpmUuid)) throw unfit('its proof is of another vTPM');
  if (notice.epoch <= epoch) throw unfit('its epoch is not above that of its proof');
  if (notice.epoch % EPOCHS !== 0n) throw unfit('its epoch is none that a rescue begins');
  return notice;
}

/** Whether it says that a departure was taken back. Not verified. @throws ManagerError `bad-request` */
export function takesBack(signed: SignedRescue, migrationId: Uint8Array): boolean {
  const { departure } = parseNotice(signed);
  return departure !== undefined && bytesEqual(departure.migrationId, migrationId);
}

/** Of one host there is one: it had the vTPM anew since, which ended what was before. */
export function withNotice(known: readonly SignedRescue[], added: SignedRescue): SignedRescue[] {
  const { source } = parseNotice(added);
  return [...known.filter((other) => !bytesEqual(parseNotice(other).source, source)), added];
}

function backupOf(notice: RescueNotice, backupKey: Uint8Array): BackupFacts {
  try {
    const { facts, factsSignature: signature } = notice;
    return verifiedFacts(backupKey, notice.headerDigest, { facts, signature });
  } catch (cause) {
    throw unfit('it does not prove that there is a backup of it that this host made', cause);
  }
}

/** Not verified. @throws ManagerError `bad-request` */
export function parseNotice(signed: SignedRescue): RescueNotice {
  try {
    const notice = decode('RescueNotice', signed.notice);
    const { departure } = notice;
    const proof = departure
      ? ([['migration id', departure.migrationId, 16]] as const)
      : ([
          ['backup', notice.headerDigest, 32],
          ['backup signature', notice.factsSignature, 64],
        ] as const);
    for (const [what, bytes, length] of [
      ['vTPM uuid', notice.vtpmUuid, 16],
      ['source', notice.source, 32],
      ['rescuer', notice.rescuer, 32],
      ['signature', signed.signature, 64],
      ...proof,
    ] as const) {
      expectLength(what, bytes, length);
    }
    return notice;
  } catch (cause) {
    if (!(cause instanceof ProtoError)) throw cause;
    throw unfit(cause.message, cause);
  }
}

function unfit(why: string, cause?: unknown): ManagerError {
  return new ManagerError(
    'bad-request',
    `a notice of a rescue is refused: ${why}`,
    cause === undefined ? {} : { cause },
  );
}
