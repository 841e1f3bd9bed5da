import type { AuditReport } from './walk.js';

/** What a verification found, as the admin plane and the command line say it. */
export interface AuditVerdictView {
  /** `anchor`: against the keys and the anchor of the store; `chain`: each entry against the one before, no more. */
  readonly checked: 'anchor' | 'chain';
  /** Why not against the anchor. */
  readonly because?: string;
  readonly isWhole: boolean;
  /** Numbers of the first and the last verified entry; 0 where there is none. */
  readonly first: number;
  readonly last: number;
  /** Hex of the last one's SHA-256. */
  readonly digest: string;
  /** How many of them were verified by MAC too. */
  readonly authenticated: number;
  /** How many are newer than the anchor: the change that each stands for may not have happened. */
  readonly unanchored: number;
  /** The beginning of an entry that was never acknowledged. */
  readonly torn?: { readonly path: string; readonly offset: number };
  /** The first thing that is wrong. */
  readonly flaw?: { readonly entry: number; readonly path: string; readonly what: string };
}

/** @param because absent where keys and anchor were there */
export function viewOf(report: AuditReport, because?: string): AuditVerdictView {
  const { first, head, authenticated, unanchored, torn, flaw } = report;
  return {
    checked: because === undefined ? 'anchor' : 'chain',
    ...(because !== undefined && { because }),
    isWhole: flaw === undefined,
    first: Number(first),
    last: Number(head.length),
    digest: head.digest.toString('hex'),
    authenticated: Number(authenticated),
    unanchored: Number(unanchored),
    ...(torn && { torn }),
    ...(flaw && { flaw: { ...flaw, entry: Number(flaw.entry) } }),
  };
}
