import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import type { SupervisorVtpm } from '../supervisor-api.js';
import { checkHere } from '../whereabouts.js';

export interface VmmFlags {
  readonly model: string;
}

/** Shows what QEMU is started with. */
export async function qemuArgs(nameOrId: string, { model }: VmmFlags, context: Context): Promise<void> {
  const path = await controlSocket(nameOrId, context);
  if (/\s/.test(path)) {
    throw new ToolstackError('usage', `${path} has spaces, which a shell takes apart; use another --run-dir`);
  }
  const args = [
    // A comma in a value is written twice (qemu(1)).
    ...['-chardev', `socket,id=vtpm-control,path=${path.replaceAll(',', ',,')}`],
    ...['-tpmdev', 'emulator,id=vtpm,chardev=vtpm-control'],
    ...['-device', `${model},tpmdev=vtpm`],
  ];
  context.output.result({ args }, args.join(' '));
}

/** Shows the device for libvirt's description of a domain. */
export async function libvirtXml(nameOrId: string, { model }: VmmFlags, context: Context): Promise<void> {
  const path = await controlSocket(nameOrId, context);
  const xml = [
    `<tpm model='${model}'>`,
    "  <backend type='external'>",
    `    <source type='unix' mode='connect' path='${escaped(path)}'/>`,
    '  </backend>',
    '</tpm>',
  ].join('\n');
  context.output.result({ xml }, xml);
}

/** @throws ToolstackError where a VMM could not use it, with the command that helps */
async function controlSocket(nameOrId: string, { supervisor, output }: Context): Promise<string> {
  const vtpm = await supervisor.vtpm(nameOrId);
  const { name, dropin } = vtpm;
  if (vtpm.state !== 'arriving') checkHere(vtpm);
  else output.note(`${name} is arriving; a VM that moves with it is started with -incoming`);
  if (dropin) {
    throw new ToolstackError(
      'bad-request',
      `vTPM ${name} is started by swtpm, with the token in ${dropin.place}; for a VMM that is given a socket: vtpmctl dropin ${name} --remove`,
    );
  }
  const doors = [...new Set([...(vtpm.doors ?? []), 'control'])].join(',');
  const change = `${isOff(vtpm) ? '' : `vtpmctl stop ${name} && `}vtpmctl set ${name}`;
  if (vtpm.sockets.control === null) {
    throw new ToolstackError(
      'bad-request',
      `vTPM ${name} has no door for a VMM; ${change} --doors ${doors} --startup none`,
    );
  }
  if (vtpm.startup !== 'none') {
    throw new ToolstackError(
      'bad-request',
      `the firmware of a VM would find vTPM ${name} started up already, and measure nothing; ${change} --startup none`,
    );
  }
  if (isOff(vtpm)) output.note(`${name} is ${vtpm.state}; before the VM: vtpmctl start ${name}`);
  if (vtpm.socketOwner === null || vtpm.socketOwner === undefined) {
    output.note(
      `only user ${process.getuid?.()} and root may connect; for VMs of another user, libvirt's for example, create the vTPM with --socket-owner libvirt-qemu:kvm`,
    );
  }
  return vtpm.sockets.control;
}

function isOff({ state }: SupervisorVtpm): boolean {
  return state === 'stopped' || state === 'crashed';
}

function escaped(text: string): string {
  return text.replace(/[&<>'"]/g, (found) => `&#${found.charCodeAt(0)};`);
}
