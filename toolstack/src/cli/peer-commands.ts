import type { Command } from 'commander';
import type { Add, Run } from './command-line.js';
import {
  type AddPeerFlags,
  type ApproveFlags,
  addPeer,
  approvePeer,
  type ChangePeerFlags,
  changePeer,
  listPeers,
  peerIdentity,
  removePeer,
  showPeer,
} from './commands/peer.js';

const ADDRESS = ['--address <HOST:PORT>', 'where its manager listens; may be given more than once'] as const;

/** `vtpmctl peer`. */
export function addPeerCommands(program: Command, add: Add, run: Run): void {
  const peer = program.command('peer').description('other hosts, to which vTPMs go and from which they come');

  const identity = add(peer, 'identity', 'prints what other hosts have to know of this one, as one line', [
    'vtpmctl peer identity > a.peer                  nothing in it is secret',
    'vtpmctl --json peer identity                    with the fingerprint of the endorsement key',
  ]);
  identity.action(() => run(identity, peerIdentity));

  const addCommand = add(
    peer,
    'add',
    'makes another host known by its identity, and by what its TPM is known',
    [
      'vtpmctl peer add b b.peer --address 192.0.2.7:7799 --ek-ca maker.pem --approve-current',
      'vtpmctl peer add b b.peer --address [2001:db8::7]:7799 --ek-fingerprint HEX --authority fleet.pem',
    ],
  )
    .argument('<name>', 'what it is called here')
    .argument('<file>', 'of vtpmctl peer identity there')
    .option(...ADDRESS, collect)
    .option('--ek-ca <file>', "certificates of the TPM's maker in PEM: its endorsement key must chain to one")
    .option('--ek-fingerprint <hex>', 'of its endorsement key, as you read it at the host itself')
    .option('--approve-current', 'approve the platform that it had when the file was made')
    .option('--authority <file>', 'public key in PEM of the authority that approves its platforms')
    .option('--no-send', 'no vTPM comes from it')
    .option('--no-receive', 'no vTPM goes to it');
  addCommand.action((name: string, file: string, flags: AddPeerFlags) =>
    run(addCommand, (context) => addPeer(name, file, flags, context)),
  );

  const list = add(peer, 'list', 'shows the other hosts, and what is proven of each', [
    'vtpmctl peer list',
  ]).alias('ls');
  list.action(() => run(list, listPeers));

  const show = add(peer, 'show', 'shows one of them', ['vtpmctl peer show b']).argument('<name>');
  show.action((name: string) => run(show, (context) => showPeer(name, context)));

  const change = add(peer, 'change', 'changes where a host is, what it may, and who approves its platforms', [
    'vtpmctl peer change b --address 192.0.2.8:7799 --address [2001:db8::8]:7799',
    'vtpmctl peer change b --no-receive',
    'vtpmctl peer change b --no-authority',
  ])
    .argument('<name>')
    .option('--address <HOST:PORT>', 'instead of all that it has; may be given more than once', collect)
    .option('--send', 'vTPMs may come from it')
    .option('--no-send', 'no vTPM comes from it')
    .option('--receive', 'vTPMs may go to it')
    .option('--no-receive', 'no vTPM goes to it')
    .option('--authority <file>', 'public key in PEM of the authority that approves its platforms')
    .option('--no-authority', 'only the platforms that are approved here');
  change.action((name: string, flags: ChangePeerFlags) =>
    run(change, (context) => changePeer(name, flags, context)),
  );

  const approve = add(
    peer,
    'approve',
    'approves a platform of another host, before or after an update of it',
    [
      'vtpmctl peer approve b --current b.peer         a new vtpmctl peer identity of b',
      'vtpmctl peer approve b --pcrs sha256:7=HEX      SHA-256 over the values of its registers',
      'vtpmctl peer approve b --withdraw sha256:7=HEX',
    ],
  )
    .argument('<name>')
    .option('--current <file>', 'a new identity of it: the platform that it shows')
    .option('--pcrs <SELECTION=DIGEST>', 'may be given more than once', collect)
    .option('--withdraw <SELECTION=DIGEST>', 'one that is approved no more', collect);
  approve.action((name: string, flags: ApproveFlags) =>
    run(approve, (context) => approvePeer(name, flags, context)),
  );

  const remove = add(peer, 'remove', 'forgets another host; what is connected with it is cut at once', [
    'vtpmctl peer remove b',
  ])
    .alias('rm')
    .argument('<name>');
  remove.action((name: string) => run(remove, (context) => removePeer(name, context)));
}

function collect(value: string, before: readonly string[] = []): string[] {
  return [...before, value];
}
