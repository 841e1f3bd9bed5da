import { u16Bytes, u32Bytes } from './bytes.js';
import { encode } from './codec.js';
import {
  PolicyAuthorize,
  PolicyAuthValue,
  PolicyCommandCode,
  PolicyCounterTimer,
  PolicyCpHash,
  PolicyDuplicationSelect,
  PolicyLocality,
  PolicyNameHash,
  PolicyNV,
  PolicyNvWritten,
  PolicyOR,
  PolicyPCR,
  PolicySecret,
  PolicySigned,
  PolicyTemplate,
} from './commands/index.js';
import { Alg, type HashInfo, St } from './constants.js';
import { digest, nameOf, requireHash } from './crypto.js';
import { TpmError } from './error.js';
import type { PolicyStep } from './policy-step.js';
import { type PublicArea, tpmlPcrSelection } from './structures.js';

const NOTHING = Buffer.alloc(0);
/** PolicyOR takes no more digests (Part 3, 23.6). */
const MAX_BRANCHES = 8;

/** The digest to put in `authPolicy` (Part 3, section 23: each command's policyDigest update). */
export function policyDigest(steps: readonly PolicyStep[], hashAlg: number = Alg.SHA256): Buffer {
  const hash = requireHash(hashAlg);
  return foldPolicy(hash, () => Buffer.alloc(hash.size), steps);
}

/** @param from the digest before the first step, asked for only where it counts */
export function foldPolicy(hash: HashInfo, from: () => Buffer, steps: readonly PolicyStep[]): Buffer {
  // What is before the last PolicyAuthorize is forgotten, and may not be known offline.
  const start = steps.findLastIndex((step) => step.assert === 'authorize');
  const first = start >= 0 ? Buffer.alloc(hash.size) : from();
  return steps.slice(Math.max(start, 0)).reduce((old: Buffer, step) => fold(hash, old, step), first);
}

function fold(hash: HashInfo, old: Buffer, step: PolicyStep): Buffer {
  const extend = (command: { readonly code: number }, ...parts: readonly Uint8Array[]): Buffer =>
    digest(hash, old, u32Bytes(command.code), ...parts);
  switch (step.assert) {
    case 'pcr':
      if (step.digest === undefined)
        throw new TpmError('usage', 'the digest of the PCR values is needed offline');
      return extend(PolicyPCR, encode(tpmlPcrSelection, step.selection), step.digest);
    case 'command-code':
      return extend(PolicyCommandCode, u32Bytes(step.code));
    case 'auth-value':
    case 'password':
      return extend(PolicyAuthValue);
    case 'secret':
      return update(hash, old, PolicySecret.code, step.of.entity.name, step.policyRef);
    case 'signed':
      return update(hash, old, PolicySigned.code, nameOfArea(step.signer), step.policyRef);
    case 'ticket': {
      const of = step.ticket.tag === St.AUTH_SECRET ? PolicySecret : PolicySigned;
      return update(hash, old, of.code, step.name, step.policyRef);
    }
    case 'authorize':
      return update(
        hash,
        Buffer.alloc(hash.size),
        PolicyAuthorize.code,
        nameOfArea(step.signer),
        step.policyRef,
      );
    case 'or': {
      const levels = orLevels(hash, branchDigests(hash, old, step.branches));
      return levels.at(-1)?.[0]?.result ?? old;
    }
    case 'nv':
      return extend(
        PolicyNV,
        digest(hash, step.operand, u16Bytes(step.offset ?? 0), u16Bytes(step.operation)),
        step.index.name,
      );
    case 'counter-timer':
      return extend(
        PolicyCounterTimer,
        digest(hash, step.operand, u16Bytes(step.offset), u16Bytes(step.operation)),
      );
    case 'nv-written':
      return extend(PolicyNvWritten, Buffer.of(step.written ? 1 : 0));
    case 'cp-hash':
      return extend(PolicyCpHash, step.cpHash);
    case 'name-hash':
      return extend(PolicyNameHash, step.nameHash);
    case 'template':
      return extend(PolicyTemplate, step.templateHash);
    case 'locality':
      return extend(PolicyLocality, Buffer.of(step.locality));
    case 'duplication-select':
      if (!step.includeObject) return extend(PolicyDuplicationSelect, step.newParentName, Buffer.of(0));
      if (step.objectName === undefined)
        throw new TpmError('usage', 'the Name of the object is part of this policy');
      return extend(PolicyDuplicationSelect, step.objectName, step.newParentName, Buffer.of(1));
  }
}

/** Two rounds: the reference is always folded in, an empty one too (Part 3, 23.2.3, PolicyUpdate). */
function update(
  hash: HashInfo,
  old: Buffer,
  code: number,
  name: Buffer | undefined,
  policyRef: Buffer = NOTHING,
): Buffer {
  if (name === undefined) throw new TpmError('usage', 'the Name of what authorises is part of the policy');
  return digest(hash, digest(hash, old, u32Bytes(code), name), policyRef);
}

function nameOfArea(area: PublicArea): Buffer {
  return nameOf(area.value.nameAlg, area.bytes);
}

/** The digest of each branch of a PolicyOR that comes after `from`. */
export function branchDigests(
  hash: HashInfo,
  from: Buffer,
  branches: PolicyStep<'or'>['branches'],
): Buffer[] {
  if (branches.length < 2) throw new TpmError('usage', 'a choice needs two branches or more');
  return branches.map((branch) =>
    branch instanceof Uint8Array ? branch : foldPolicy(hash, () => from, branch as readonly PolicyStep[]),
  );
}

/** One PolicyOR command. */
export interface OrGroup {
  /** Indices in the level below. */
  readonly members: readonly number[];
  readonly digests: readonly Buffer[];
  /** The digest afterwards; for a single member, which needs no command, its own. */
  readonly result: Buffer;
}

/** The PolicyOR commands for any number of branches: groups of eight, groups of those, until one group has all. */
export function orLevels(hash: HashInfo, digests: readonly Buffer[]): OrGroup[][] {
  const levels: OrGroup[][] = [];
  for (let level = digests; ; ) {
    const groups: OrGroup[] = [];
    for (let at = 0; at < level.length; at += MAX_BRANCHES) {
      const group = level.slice(at, at + MAX_BRANCHES);
      const [only] = group;
      const result =
        group.length === 1 && only !== undefined
          ? only
          : digest(hash, Buffer.alloc(hash.size), u32Bytes(PolicyOR.code), ...group);
      groups.push({ members: group.map((_, index) => at + index), digests: group, result });
    }
    levels.push(groups);
    if (groups.length === 1) return levels;
    level = groups.map((group) => group.result);
  }
}
