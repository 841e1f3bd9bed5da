import { statSync } from 'node:fs';
import type { Command } from '../supervisor/sandbox.js';

export const KVM = '/dev/kvm';

/** A sandbox that has the KVM device too, for who is in the group that may use it. */
export function withKvm(command: Command): Command {
  // Before bubblewrap seals /dev.
  const at = command.args.lastIndexOf('--dev') + 2;
  const args = command.args.map((argument) =>
    argument === '--clear-groups' ? `--groups=${statSync(KVM).gid}` : argument,
  );
  return { ...command, args: [...args.slice(0, at), '--dev-bind', KVM, KVM, ...args.slice(at)] };
}
