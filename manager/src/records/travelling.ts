import type { BundleHeader } from 'vtpm-proto';

/** What a vTPM is, without its state: who sends it adds which message it is in. */
export type TravellingHeader = Pick<
  BundleHeader,
  | 'vmUuid'
  | 'vmRunId'
  | 'epoch'
  | 'generation'
  | 'libtpmsVersion'
  | 'marks'
  | 'createdAt'
  | 'savedAt'
  | 'referenceDigest'
  | 'suspendedGeneration'
  | 'lineage'
  | 'auditHead'
  | 'auditLength'
>;

/** A vTPM on its way, in the clear. Whoever holds it wipes the parts. */
export interface TravellingState {
  readonly header: TravellingHeader;
  readonly parts: {
    readonly PERMANENT?: Uint8Array;
    readonly VOLATILE?: Uint8Array;
    readonly REFERENCE_KEY?: Uint8Array;
  };
}
