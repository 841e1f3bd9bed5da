import { realpathSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { parseOptionValue } from './option-value.js';
import { DropinRefusal } from './refusal.js';

/** Where the caller thinks that the state is. The state is the manager's; here is the token. */
export interface StatePlace {
  /** A directory, or with `isFile` a file or block device that holds nothing else. */
  readonly path: string;
  readonly isFile: boolean;
}

/** In a directory of the caller's. */
export const TOKEN_NAME = 'vtpm-manager.token';

/**
 * Reads `dir=DIRECTORY`, `backend-uri=dir://DIRECTORY` or `backend-uri=file://FILE`.
 * @throws DropinRefusal
 */
export function parseStatePlace(option: string, text: string | undefined): StatePlace {
  if (text === undefined) {
    throw new DropinRefusal(`${option} is missing; the directory that it names says which vTPM is meant`);
  }
  const { dir, 'backend-uri': uri } = parseOptionValue(option, text, {
    dir: 'text',
    'backend-uri': 'text',
    mode: 'mode',
    lock: 'switch',
    fsync: 'switch',
    backup: 'switch',
  });
  if (dir !== undefined && uri === undefined) return { path: dir, isFile: false };
  if (uri === undefined || dir !== undefined) {
    throw new DropinRefusal(`${option} needs dir=DIRECTORY or backend-uri=dir://DIRECTORY, and one of them`);
  }
  return parseStateUri(option, uri);
}

/** Reads a path, `dir://DIRECTORY` or `file://FILE`, as swtpm_setup has it. @throws DropinRefusal */
export function parseStateUri(option: string, uri: string): StatePlace {
  const [, scheme, path = ''] = /^(?:([a-z]+):\/\/)?(.*)$/s.exec(uri) ?? [];
  if (path === '') throw new DropinRefusal(`${option} "${uri}" names no path`);
  if (scheme === undefined || scheme === 'dir') return { path, isFile: false };
  if (scheme === 'file') return { path, isFile: true };
  throw new DropinRefusal(`${option}: ${scheme}:// is not known; write dir://DIRECTORY or file://FILE`);
}

/** A place as the supervisor knows it. */
export interface ResolvedPlace {
  /** Absolute: two ways to write one directory are one place. */
  readonly place: string;
  /** The token's own path. */
  readonly token: string;
  readonly isFile: boolean;
}

/** @throws DropinRefusal where there is no such directory or file */
export function resolvePlace({ path, isFile }: StatePlace): ResolvedPlace {
  let place: string;
  let isDirectory: boolean;
  try {
    place = realpathSync(path);
    isDirectory = statSync(place).isDirectory();
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    const why = code === 'ENOENT' ? 'does not exist; make it' : `cannot be reached (${code})`;
    throw new DropinRefusal(`the place of the vTPM's token, ${path}, ${why}`);
  }
  if (isDirectory === isFile) {
    throw new DropinRefusal(
      isFile ? `${path} is a directory; write dir://${path}` : `${path} is a file; write file://${path}`,
    );
  }
  return { place, token: isFile ? place : join(place, TOKEN_NAME), isFile };
}
