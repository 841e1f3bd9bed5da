import { rmSync, writeFileSync, writeSync } from 'node:fs';
import type { PlacedToken } from '../supervisor/dropin/protocol.js';
import { Clients } from './clients.js';
import { createVtpm } from './creation.js';
import { isBackground, sayReady, toBackground } from './daemon.js';
import { type OpenEntrance, openEntrance } from './entrances.js';
import { DropinRefusal } from './refusal.js';
import type { Report } from './report.js';
import { type ResolvedPlace, resolvePlace } from './state-place.js';
import { SupervisorLink, SupervisorLost, SupervisorRefusal, type VmmDoor } from './supervisor-link.js';
import { dropinSocket } from './supervisor-socket.js';
import { type Destination, parseSwtpmArguments, type SwtpmOptions } from './swtpm-arguments.js';
import { readToken, type Token } from './token.js';
import { becomeUser } from './user.js';
import { powerOn, startUp } from './vmm.js';

/** A supervisor that is upgraded is back by then. */
const PATIENCE_MS = 15_000;

/**
 * `swtpm socket`: makes the sockets that the caller names, has the vTPM of the token started, and passes on who connects.
 * @returns the exit status, when the TPM is off
 * @throws DropinRefusal
 */
export async function runSwtpm(args: readonly string[], report: Report): Promise<number> {
  const options = parseSwtpmArguments(args, process.env);
  if (options.isDaemon && !isBackground()) return await toBackground(options);
  becomeUser(options.runAs);
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
  #token: PlacedToken | undefined;
  #link: SupervisorLink | undefined;
  #isReturning = false;

  /** Ends the process; the first reason counts. */
  #end: (status: number | DropinRefusal) => void = () => undefined;

  constructor(options: SwtpmOptions, place: ResolvedPlace, report: Report) {
    this.#options = options;
    this.#place = place;
    this.#report = report;
  }

  async run(): Promise<number> {
    const end = new Promise<number | DropinRefusal>((resolve) => {
      this.#end = resolve;
    });
    for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP'] as const) {
      process.on(signal, () => void this.#stop(`ended by ${signal}`));
    }
    try {
      // Those who start swtpm wait for its sockets, and not long.
      await this.#open();
      writePid(this.#options.pid);
      sayReady();
      // A signal may come before the TPM is on.
      const how = await Promise.race([end, this.#start().then(() => end)]);
      if (typeof how !== 'number') throw how;
      return how;
    } finally {
      for (const entrance of this.#entrances) entrance.close();
      removePid(this.#options.pid);
      this.#link?.close();
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
    const link = await this.#connect();
    const token = readToken(this.#place) ?? (await this.#create(link));
    this.#token = { ...tokenFields(token), place: this.#place.place };
    const { name } = await link.start(this.#token);
    this.#report.note(`vTPM ${name} is on, token in ${this.#place.token}`);
    const { isOnAtOnce, isStartedUp } = this.#options;
    if (isOnAtOnce) await powerOn(link);
    if (isStartedUp) await startUp(link);

    this.#clients.serve(link, []);
  }

  /** As swtpm makes the TPM of a directory that is empty. */
  async #create(link: SupervisorLink): Promise<Token> {
    const token = await createVtpm(link, this.#place, { name: undefined, uuid: undefined });
    this.#report.note(`made the vTPM ${token.id}: there was none in ${this.#place.place}`);
    return token;
  }

  async #connect(): Promise<SupervisorLink> {
    const link = await SupervisorLink.open(
      dropinSocket(),
      {
        disconnected: (connection, door) => this.#disconnected(connection, door),
        ended: (reason) => this.#end(reason === null ? 0 : new DropinRefusal(`the vTPM crashed: ${reason}`)),
        lost: () => void this.#lost(),
      },
      PATIENCE_MS,
    );
    this.#link = link;
    return link;
  }

  #disconnected(connection: number, door: string): void {
    this.#clients.disconnected(connection);
    if (door === 'vmm-data') this.#gone(door);
  }

  /** `vmm-data`: what a client of the control channel gave. */
  #gone(door: VmmDoor | 'vmm-data'): void {
    const wasData = door === 'vmm-data' || (door === 'tpm' && this.#clients.count('tpm') === 0);
    if (wasData && this.#options.terminates) void this.#stop('its client has gone');
  }

  /** The supervisor is gone. Where it became another program, the vTPM runs on and has to be held again. */
  async #lost(): Promise<void> {
    if (!this.#token || this.#isReturning) return;
    this.#isReturning = true;
    this.#clients.pause();
    try {
      for (let isBack = false; !isBack; ) isBack = await this.#return(this.#token);
    } catch (error) {
      const isOver = !(error instanceof SupervisorRefusal) || error.code === 'not-running';
      const why = 'the vTPM ended with its supervisor; see why: journalctl -u vtpm-supervisord';
      this.#end(isOver ? new DropinRefusal(why) : error);
    }
    this.#isReturning = false;
  }

  /** @returns false where the supervisor was lost again */
  async #return(token: PlacedToken): Promise<boolean> {
    try {
      const link = await this.#connect();
      const { connections } = await link.start(token, true);
      this.#clients.serve(link, connections);
    } catch (error) {
      if (error instanceof SupervisorLost) return false;
      throw error;
    }
    this.#report.note('the supervisor is there again');
    return true;
  }

  async #stop(why: string): Promise<void> {
    this.#report.note(why);
    try {
      await this.#link?.request({ type: 'stop' });
    } catch (error) {
      // It is stopped already: then its end is told.
      if (error instanceof SupervisorRefusal && error.code === 'busy') return;
      // It was never on, or is off: the end that was asked for.
      this.#report.note((error as Error).message);
    }
    this.#end(0);
  }
}

function tokenFields({ id, vmUuid, secret }: Token): Token {
  return { id, vmUuid, secret };
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
