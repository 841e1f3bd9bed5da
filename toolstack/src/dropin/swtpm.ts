import { rmSync, writeFileSync, writeSync } from 'node:fs';
import { Clients } from './clients.js';
import { isBackground, sayReady, toBackground } from './daemon.js';
import { type OpenEntrance, openEntrance } from './entrances.js';
import type { HeldVtpm } from './held-vtpm.js';
import { DropinRefusal } from './refusal.js';
import type { Report } from './report.js';
import { type ResolvedPlace, resolvePlace } from './state-place.js';
import type { VmmDoor } from './supervisor-link.js';
import { type Destination, parseSwtpmArguments, type SwtpmOptions } from './swtpm-arguments.js';

/**
 * `swtpm socket`: makes the sockets that the caller names, has the vTPM of the token started, and passes on who connects.
 * @returns the exit status, when the TPM is off
 * @throws DropinRefusal
 */
export async function runSwtpm(args: readonly string[], report: Report): Promise<number> {
  const options = parseSwtpmArguments(args, process.env);
  if (options.isDaemon && !isBackground()) return await toBackground(options);
  if (options.runAs !== undefined) {
    const { becomeUser } = await import('./user.js');
    becomeUser(options.runAs);
  }
  if (options.log) report.logTo(options.log);
  return await new SwtpmProcess(options, resolvePlace(options.state), report).run();
}

/** One `swtpm socket`, from its sockets to its exit status. */
class SwtpmProcess {
  readonly #options: SwtpmOptions;
  readonly #place: ResolvedPlace;
  readonly #report: Report;
  readonly #clients = new Clients((door) => this.#gone(door));
  readonly #entrances: OpenEntrance[] = [];
  #vtpm: HeldVtpm | undefined;
  /** Ends the process; the first reason counts. */
  #end: (how: DropinRefusal | undefined) => void = () => undefined;

  constructor(options: SwtpmOptions, place: ResolvedPlace, report: Report) {
    this.#options = options;
    this.#place = place;
    this.#report = report;
  }

  async run(): Promise<number> {
    const end = new Promise<DropinRefusal | undefined>((resolve) => {
      this.#end = resolve;
    });
    for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP'] as const) {
      process.on(signal, () => this.#stop(`ended by ${signal}`));
    }
    try {
      // Those who start swtpm wait for its sockets, libvirt for one second: before anything else is even loaded.
      await this.#open();
      writePid(this.#options.pid);
      sayReady();
      // A signal may come before the TPM is on.
      const failure = await Promise.race([end, this.#start().then(() => end)]);
      if (failure) throw failure;
      return 0;
    } finally {
      for (const entrance of this.#entrances) entrance.close();
      removePid(this.#options.pid);
      this.#vtpm?.close();
    }
  }

  async #open(): Promise<void> {
    const { control, server } = this.#options;
    if (control) {
      const onClient = this.#clients.add.bind(this.#clients, 'control');
      this.#entrances.push(await openEntrance('--ctrl', control, onClient));
    }
    if (server) {
      const onClient = this.#clients.add.bind(this.#clients, 'tpm');
      this.#entrances.push(await openEntrance('--server', server, onClient));
    }
  }

  async #start(): Promise<void> {
    const { HeldVtpm } = await import('./held-vtpm.js');
    const { isOnAtOnce, isStartedUp } = this.#options;
    this.#vtpm = new HeldVtpm({
      place: this.#place,
      ...{ isOnAtOnce, isStartedUp },
      clients: this.#clients,
      report: this.#report,
      dataChannelGone: () => this.#gone('vmm-data'),
      ended: (failure) => this.#end(failure),
    });
    await this.#vtpm.start();
  }

  /** `vmm-data`: what a client of the control channel gave. */
  #gone(door: VmmDoor | 'vmm-data'): void {
    const wasData = door === 'vmm-data' || (door === 'tpm' && this.#clients.count('tpm') === 0);
    if (wasData && this.#options.terminates) this.#stop('its client has gone');
  }

  #stop(why: string): void {
    this.#report.note(why);
    if (this.#vtpm) void this.#vtpm.stop();
    else this.#end(undefined);
  }
}

function writePid(to: Destination | undefined): void {
  if (!to) return;
  const text = `${process.pid}\n`;
  try {
    if ('fd' in to) writeSync(to.fd, text);
    else writeFileSync(to.path, text, { mode: 0o644 });
  } catch (error) {
    throw new DropinRefusal(`--pid: the process id cannot be written (${(error as Error).message})`);
  }
}

function removePid(to: Destination | undefined): void {
  if (to && 'path' in to) rmSync(to.path, { force: true });
}
