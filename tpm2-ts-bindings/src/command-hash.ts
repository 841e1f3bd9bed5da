import { u32Bytes } from './bytes.js';
import { encode } from './codec.js';
import type { Command, HandleEntities, HandleNames } from './command.js';
import { Alg } from './constants.js';
import { digest, requireHash } from './crypto.js';
import type { Entity } from './entity.js';
import { TpmError } from './error.js';
import { Rc } from './response-code.js';

/** Hashes over commands, for policies that allow only those (`cp-hash`, `name-hash`) and for audits. */

/**
 * cpHash: code, Names of all handles and parameters as they are sent, not encrypted (Part 1, "Command Parameter Hash
 * (cpHash)").
 */
export function commandHash<H extends HandleNames, P>(
  command: Command<H, P, unknown>,
  handles: HandleEntities<H>,
  params: P,
  hashAlg: number = Alg.SHA256,
): Buffer {
  const given = handles as Readonly<Record<string, Pick<Entity, 'name'>>>;
  const names = command.handles.map((handle) => given[handle.replace('!', '')] ?? { name: undefined });
  return digest(
    requireHash(hashAlg),
    u32Bytes(command.code),
    ...knownNames(names),
    encode(command.params, params),
  );
}

/**
 * rpHash: success, code and parameters as they come, not encrypted (Part 1, "Response Parameter Hash (rpHash)").
 * Handles are no part of it.
 */
export function responseHash<H extends HandleNames, P, R>(
  command: Command<H, P, R>,
  result: R,
  hashAlg: number = Alg.SHA256,
): Buffer {
  return digest(
    requireHash(hashAlg),
    u32Bytes(Rc.SUCCESS),
    u32Bytes(command.code),
    encode(command.result, result),
  );
}

/** The hash over the Names of a command's handles, in their order. */
export function nameHash(entities: readonly Pick<Entity, 'name'>[], hashAlg: number = Alg.SHA256): Buffer {
  return digest(requireHash(hashAlg), ...knownNames(entities));
}

function knownNames(entities: readonly Pick<Entity, 'name'>[]): Buffer[] {
  return entities.map(({ name }) => {
    if (name === undefined) throw new TpmError('usage', 'the Name of a handle is not known');
    return name;
  });
}
