import { closeSync, existsSync, openSync } from 'node:fs';
import { resolve } from 'node:path';
import { checkSocketPath, privateDirectory, writeFileDurably } from 'vtpm-common';
import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import { reserveSecretFile } from '../given-files.js';
import { runManagerCommand } from '../manager-command.js';
import { fields } from '../output.js';
import { makeToolstackKey } from '../toolstack-key.js';
import { recoveryKeyLines } from './recover.js';

export interface InitFlags {
  readonly tpm?: string;
  readonly yesEmbedded?: boolean;
  readonly srkHandle?: string;
  readonly orderlyCounter?: boolean;
  readonly ownerAuthFile?: string;
  readonly pcrs?: string;
  readonly recoveryKeyFile?: string;
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
  readonly recoveryKey: string;
  readonly warnings: readonly string[];
}

const TPM = /^(auto|embedded|device:.+|unix:.+)$/;

/** Makes the toolstack key and has the manager enrol with its TPM. Happens once in the life of an installation. */
export async function init(flags: InitFlags, { configuration, output }: Context): Promise<void> {
  const { paths } = configuration;
  if (flags.tpm === undefined) {
    throw new ToolstackError(
      'usage',
      "say which TPM: --tpm auto takes this machine's, --tpm embedded a software TPM for trying things (--help shows all)",
    );
  }
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
  checkReadable(flags.ownerAuthFile);
  privateDirectory(paths.home);
  const { recoveryKeyFile } = flags;
  // Before anything is made: the key that it is to hold is shown once.
  const keyFile =
    recoveryKeyFile === undefined ? undefined : reserveSecretFile('--recovery-key-file', recoveryKeyFile);
  let identity: Identity;
  const key = makeToolstackKey(paths);
  try {
    identity = await enrol(flags, flags.tpm, paths, key.publicKey.toString('hex'));
  } catch (error) {
    keyFile?.discard();
    throw error;
  }
  const { warnings, recoveryKey, ...kept } = identity;
  keyFile?.write(recoveryKey);
  writeFileDurably(paths.toolstack.managerIdentity, `${JSON.stringify(kept, null, 2)}\n`);
  for (const warning of warnings) output.note(`warning: ${warning}`);
  const recovery = recoveryKeyFile === undefined ? { recoveryKey } : { recoveryKeyFile };
  output.result(
    {
      home: paths.home,
      run: paths.run,
      toolstackKey: key.publicKey.toString('hex'),
      ...kept,
      ...recovery,
      warnings,
    },
    [
      fields([
        ['initialised', paths.home],
        ['manager', identity.managerId],
        ['TPM', `${identity.tpm.kind} ${identity.tpm.path}`],
        ['sealed to', identity.pcrSelection],
        ['recovery key', recoveryKeyFile && `in ${recoveryKeyFile}: take it away from this host`],
      ]),
      ...(recoveryKeyFile === undefined ? recoveryKeyLines(recoveryKey) : []),
      'next: vtpmctl up',
    ].join('\n'),
  );
}

async function enrol(
  flags: InitFlags,
  tpm: string,
  paths: Context['configuration']['paths'],
  toolstackKey: string,
): Promise<Identity> {
  const args = ['init', '--tpm', tpm, '--toolstack-key', toolstackKey];
  if (flags.yesEmbedded) args.push('--yes-embedded');
  if (flags.srkHandle !== undefined) args.push('--srk-handle', flags.srkHandle);
  if (flags.orderlyCounter) args.push('--orderly-counter');
  if (flags.ownerAuthFile !== undefined) args.push('--owner-auth-file', resolve(flags.ownerAuthFile));
  if (flags.pcrs !== undefined) args.push('--pcrs', flags.pcrs);
  try {
    return await runManagerCommand<Identity>(paths, args);
  } catch (error) {
    // What the manager finds wrong with a request of init is a flag.
    if (!(error instanceof ToolstackError) || error.code !== 'bad-request') throw error;
    throw new ToolstackError('usage', error.message, { cause: error });
  }
}

function checkReadable(file: string | undefined): void {
  if (file === undefined) return;
  try {
    closeSync(openSync(file, 'r'));
  } catch (cause) {
    throw new ToolstackError('usage', `--owner-auth-file: ${(cause as Error).message}`, { cause });
  }
}

/** Found out now and not when the first vTPM is made: unix sockets have short paths. */
function checkLengths(longest: string): void {
  try {
    checkSocketPath(longest);
  } catch (cause) {
    throw new ToolstackError('usage', (cause as Error).message, { cause });
  }
}
