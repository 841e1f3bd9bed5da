import { type Command, Option } from 'commander';
import type { Work } from './command-line.js';
import {
  type AdoptFlags,
  adopt,
  approve,
  type KeyFlags,
  listApprovals,
  type OwnerFlags,
  predict,
  revoke,
  rotate,
  type StateFlags,
  showPlatform,
  sign,
} from './commands/platform.js';
import { type RecoverFlags, recover } from './commands/recover.js';

/** Makes a command under `parent`, with the global flags and the examples in its help. */
export type Add = (
  parent: Command,
  usage: string,
  description: string,
  examples: readonly string[],
) => Command;
/** As in command-line.ts. */
type Run = (command: Command, work: Work) => Promise<void>;

const OWNER_AUTH = [
  '--owner-auth-file <file>',
  "file with the TPM's owner password, where it has one",
] as const;

/** `vtpmctl platform` and `vtpmctl recover`. @param platform the group */
export function addPlatformCommands(program: Command, platform: Command, add: Add, run: Run): void {
  const show = add(platform, 'show', 'shows the PCR values of now, and whether they release the root key', [
    'vtpmctl platform show',
  ]);
  show.action(() => run(show, showPlatform));

  const list = add(platform, 'list', 'shows the approvals of the authority', ['vtpmctl platform list']).alias(
    'ls',
  );
  list.action(() => run(list, listApprovals));

  const predictCommand = withState(
    add(platform, 'predict', 'prints what the authority is to sign, of values to come', [
      'vtpmctl platform predict --set 7=HEX --label "firmware 1.5" > request.json',
      'vtpmctl platform predict --label "as now" --next > request.json     for after a revocation',
    ]),
  );
  predictCommand.action((flags: StateFlags) => run(predictCommand, (context) => predict(flags, context)));

  const signCommand = withKey(
    add(platform, 'sign', "signs a request; needs no daemon and no TPM, but the authority's key", [
      'vtpmctl platform sign --key authority.pem request.json > approval.json',
    ]),
  ).argument('<request>', 'file of platform predict');
  signCommand.action((file: string, flags: KeyFlags) =>
    run(signCommand, (context) => sign(file, flags, context)),
  );

  const approveCommand = withState(
    withKey(
      add(platform, 'approve', 'approves PCR values, now or ahead; unlocks a manager that waits for them', [
        'vtpmctl platform approve approval.json',
        'vtpmctl platform approve --key authority.pem --label "kernel 6.12" --set 4=HEX',
        'vtpmctl platform approve --key authority.pem --label "as now"',
      ]),
    ),
  ).argument('[approval]', 'file of platform sign');
  approveCommand.action((file: string | undefined, flags: KeyFlags & StateFlags) =>
    run(approveCommand, (context) => approve(file, flags, context)),
  );

  const revokeCommand = withKey(
    add(platform, 'revoke', 'revokes an approval for good, in old copies too', [
      'vtpmctl platform revoke "firmware 1.4" --key authority.pem',
      'vtpmctl platform revoke --survivors a.json b.json                   signed elsewhere; all others die',
    ]),
  )
    .argument('[label]', 'of what is revoked')
    .option('--survivors <file...>', 'approvals for the next value of the counter')
    .option(...OWNER_AUTH);
  revokeCommand.action((label: string | undefined, flags: Parameters<typeof revoke>[1]) =>
    run(revokeCommand, (context) => revoke(label, flags, context)),
  );

  const adoptCommand = withKey(
    add(platform, 'adopt', 'puts the root key under an authority, or under none, or under other PCRs', [
      'vtpmctl platform adopt --authority public.pem --approval approval.json',
      'vtpmctl platform adopt --authority public.pem --key authority.pem --label "as now"',
      'vtpmctl platform adopt --none                                       the PCR values of now, fixed',
      'vtpmctl platform adopt --pcrs sha256:0,7',
    ]),
  )
    .option('--authority <file>', "the authority's public key in PEM: P-256, P-384, RSA 2048 or 3072")
    .option('--none', 'no authority any more')
    .option('--approval <file...>', 'signed approvals, one of them of the PCR values of now')
    .option('--label <text>', 'with --key: approves the PCR values of now under this name')
    .option('--pcrs <selection>', 'other PCRs, such as sha256:0,7')
    .option(...OWNER_AUTH);
  adoptCommand.action((flags: AdoptFlags) => run(adoptCommand, (context) => adopt(flags, context)));

  const rotateCommand = add(
    platform,
    'rotate',
    'makes the keys anew while everything runs; erases what was deleted',
    ['vtpmctl platform rotate'],
  ).option(...OWNER_AUTH);
  rotateCommand.action((flags: OwnerFlags) => run(rotateCommand, (context) => rotate(flags, context)));

  const recoverCommand = add(
    program,
    'recover',
    'where a start refuses an old store, or the TPM is lost: says what would go back, and does it',
    [
      'vtpmctl recover                                                     only says it',
      'vtpmctl recover --accept-rollback',
      'vtpmctl recover --recovery-key-file recovery.key --tpm device:/dev/tpmrm0 --accept-rollback',
    ],
  )
    .option(
      '--accept-rollback',
      'do it: what is on the disk is the newest, and every vTPM is marked for ever',
    )
    .option(
      '--recovery-key-file <file>',
      'file with the recovery key: enrols a TPM anew, without the old one',
    )
    .option('--new-recovery-key-file <file>', 'keep the new recovery key in this file instead of showing it')
    .option('--tpm <tpm>', 'with a recovery key: device:PATH, unix:PATH or embedded (default: the old one)')
    .option('--pcrs <selection>', 'with a recovery key: PCRs that release the root key (default: as before)')
    .option(...OWNER_AUTH);
  recoverCommand.action((flags: RecoverFlags) => run(recoverCommand, (context) => recover(flags, context)));
}

function withKey(command: Command): Command {
  return command
    .option('--key <file>', "the authority's private key in PEM; keep it away from this host")
    .option('--passphrase-file <file>', 'file with its passphrase, where it has one')
    .addOption(
      new Option('--scheme <scheme>', 'for RSA keys (default: rsassa)').choices(['rsassa', 'rsapss']),
    );
}

function withState(command: Command): Command {
  return command
    .option('--set <PCR=HEX...>', 'a value to come; the others are as now')
    .option('--label <text>', 'what this state is, for people')
    .option('--next', 'for after the next revocation')
    .option('--pcrs <selection>', 'other PCRs than those in force, before they are adopted');
}
