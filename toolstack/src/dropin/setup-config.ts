import { readFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { DropinRefusal } from './refusal.js';

/** What swtpm_setup.conf says, of which this command uses the parts below. */
export interface SetupConfig {
  readonly certificateTool: string | undefined;
  readonly certificateToolConfig: string | undefined;
  readonly certificateToolOptions: string | undefined;
  readonly pcrBanks: string | undefined;
}

const NOTHING: SetupConfig = {
  certificateTool: undefined,
  certificateToolConfig: undefined,
  certificateToolOptions: undefined,
  pcrBanks: undefined,
};

/**
 * Reads swtpm_setup's own configuration, as the package swtpm-tools leaves it: the user's, or else the host's. Without one,
 * nothing is configured. @param named by the caller; it must be there @throws DropinRefusal
 */
export function readSetupConfig(named: string | undefined, env: NodeJS.ProcessEnv): SetupConfig {
  if (named !== undefined) {
    const text = read(named);
    if (text === undefined) throw new DropinRefusal(`--config ${named} does not exist, or may not be read`);
    return parse(text);
  }
  const own = env.XDG_CONFIG_HOME ?? join(homedir(), '.config');
  for (const directory of [own, '/etc']) {
    const text = read(join(directory, 'swtpm_setup.conf'));
    if (text !== undefined) return parse(text);
  }
  return NOTHING;
}

function read(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    // HOME may be that of whoever started this as another user.
    if (code === 'ENOENT' || code === 'ENOTDIR' || code === 'EACCES') return undefined;
    throw new DropinRefusal(`${path} cannot be read (${code})`);
  }
}

/** Lines of `key = value`; `#` begins a comment. */
function parse(text: string): SetupConfig {
  const values = new Map<string, string>();
  for (const line of text.split('\n')) {
    const [, key, value] = /^\s*([a-z_]+)\s*=\s*(\S.*?)\s*$/.exec(line) ?? [];
    if (key !== undefined && value !== undefined) values.set(key, value);
  }
  return {
    certificateTool: values.get('create_certs_tool'),
    certificateToolConfig: values.get('create_certs_tool_config'),
    certificateToolOptions: values.get('create_certs_tool_options'),
    pcrBanks: values.get('active_pcr_banks'),
  };
}
