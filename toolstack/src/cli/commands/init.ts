import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { resolve } from 'node:path';
import { checkSocketPath, privateDirectory, writeFileDurably } from 'vtpm-common';
import { isToolstackErrorCode, ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import { nextStep } from '../next-step.js';
import { fields } from '../output.js';
import { managerProgram } from '../programs.js';
import { makeToolstackKey } from '../toolstack-key.js';

export interface InitFlags {
  readonly tpm: string;
  readonly yesEmbedded?: boolean;
  readonly srkHandle?: string;
  readonly ownerAuthFile?: string;
  readonly pcrs?: string;
}

interface Identity {
  readonly managerId: string;
  readonly tpm: {
    readonly kind: string;
    readonly path: string;
    readonly manufacturer: string;
    readonly firmwareVersion: string;
  };
  readonly storeId: string;
  readonly pcrSelection: string;
  readonly warnings: readonly string[];
}

const TPM = /^(auto|embedded|device:.+|unix:.+)$/;

/** Makes the toolstack key and has the manager enrol with its TPM. Happens once in the life of an installation. */
export async function init(flags: InitFlags, { configuration, output }: Context): Promise<void> {
  const { paths } = configuration;
  if (!TPM.test(flags.tpm)) {
    throw new ToolstackError(
      'usage',
      `--tpm is auto, device:PATH, unix:PATH or embedded, not "${flags.tpm}"`,
    );
  }
  if (existsSync(paths.manager.enrolment)) {
    throw new ToolstackError(
      'already-initialised',
      `${paths.home} is initialised already and init never does it twice; start it with vtpmctl up, or choose another --home`,
    );
  }
  checkLengths(paths.manager.toolstackSocket);
  privateDirectory(paths.home);
  const key = makeToolstackKey(paths);
  const identity = await enrol(flags, configuration.paths, key.publicKey.toString('hex'));
  const { warnings, ...kept } = identity;
  writeFileDurably(paths.toolstack.managerIdentity, `${JSON.stringify(kept, null, 2)}\n`);
  for (const warning of warnings) output.note(`warning: ${warning}`);
  output.result(
    { home: paths.home, run: paths.run, toolstackKey: key.publicKey.toString('hex'), ...identity },
    `${fields([
      ['initialised', paths.home],
      ['manager', identity.managerId],
      ['TPM', `${identity.tpm.kind} ${identity.tpm.path}`],
      ['sealed to', identity.pcrSelection],
    ])}\nnext: vtpmctl up`,
  );
}

async function enrol(
  flags: InitFlags,
  paths: Context['configuration']['paths'],
  toolstackKey: string,
): Promise<Identity> {
  const args = [managerProgram(), 'init', '--home', paths.home, '--run-dir', paths.run];
  args.push('--tpm', flags.tpm, '--toolstack-key', toolstackKey, '--json');
  if (flags.yesEmbedded) args.push('--yes-embedded');
  if (flags.srkHandle !== undefined) args.push('--srk-handle', flags.srkHandle);
  if (flags.ownerAuthFile !== undefined) args.push('--owner-auth-file', resolve(flags.ownerAuthFile));
  if (flags.pcrs !== undefined) args.push('--pcrs', flags.pcrs);
  const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'pipe'] });
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    stdout += text;
  });
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    stderr += text;
  });
  const [code] = (await once(child, 'close')) as [number | null];
  if (code !== 0) throw refusal(stderr);
  try {
    return JSON.parse(stdout) as Identity;
  } catch (cause) {
    throw new ToolstackError('internal', 'vtpm-managerd init printed something else than JSON', { cause });
  }
}

/** The manager ends with `vtpm-managerd: sentence (code)`; its log lines before that are not the reason. */
function refusal(stderr: string): ToolstackError {
  const lines = stderr.trim().split('\n');
  for (const line of lines) {
    const said = /^vtpm-managerd: (.*) \(([a-z-]+)\)$/.exec(line);
    if (!said?.[1] || !said[2]) continue;
    if (isToolstackErrorCode(said[2])) return new ToolstackError(said[2], nextStep(said[2], said[1]));
    return new ToolstackError('manager-refused', `${said[1]} (${said[2]})`);
  }
  return new ToolstackError('manager-refused', `the manager could not enrol: ${lines.at(-1)}`);
}

/** Found out now and not when the first vTPM is made: unix sockets have short paths. */
function checkLengths(longest: string): void {
  try {
    checkSocketPath(longest);
  } catch (cause) {
    throw new ToolstackError('usage', (cause as Error).message, { cause });
  }
}
