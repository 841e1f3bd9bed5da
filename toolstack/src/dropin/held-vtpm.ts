import type { PlacedToken } from '../supervisor/dropin/protocol.js';
import type { Clients } from './clients.js';
import { createVtpm } from './creation.js';
import { DropinRefusal } from './refusal.js';
import type { Report } from './report.js';
import type { ResolvedPlace } from './state-place.js';
import { SupervisorLink, SupervisorLost, SupervisorRefusal } from './supervisor-link.js';
import { dropinSocket } from './supervisor-socket.js';
import { readToken, type Token } from './token.js';
import { powerOn, startUp } from './vmm.js';

/** A supervisor that is upgraded is back by then. */
const PATIENCE_MS = 15_000;

export interface HeldVtpmOptions {
  readonly place: ResolvedPlace;
  /** Powered on without a VMM. */
  readonly isOnAtOnce: boolean;
  /** TPM2_Startup(CLEAR) is sent before anybody is served. */
  readonly isStartedUp: boolean;
  readonly clients: Clients;
  readonly report: Report;
  /** A VMM's data channel is over. */
  dataChannelGone(): void;
  /** It is off. `failure`: it did not go as asked. */
  ended(failure: DropinRefusal | undefined): void;
}

/** The vTPM of a token, which is on while this process holds it; over upgrades of the supervisor too. */
export class HeldVtpm {
  readonly #options: HeldVtpmOptions;
  #token: PlacedToken | undefined;
  #link: SupervisorLink | undefined;
  #isReturning = false;

  constructor(options: HeldVtpmOptions) {
    this.#options = options;
  }

  /** Clients are served when it resolves. @throws DropinRefusal */
  async start(): Promise<void> {
    const { place, report, isOnAtOnce, isStartedUp, clients } = this.#options;
    const link = await this.#connect();
    const { id, vmUuid, secret } = readToken(place) ?? (await this.#create(link));
    this.#token = { id, vmUuid, secret, place: place.place };
    const { name } = await link.start(this.#token);
    report.note(`vTPM ${name} is on, token in ${place.token}`);
    if (isOnAtOnce) await powerOn(link);
    if (isStartedUp) await startUp(link);
    clients.serve(link, []);
  }

  /** In order. Its end is told. */
  async stop(): Promise<void> {
    try {
      await this.#link?.request({ type: 'stop' });
    } catch (error) {
      // It is stopped already: then its end is told.
      if (error instanceof SupervisorRefusal && error.code === 'busy') return;
      // It was never on, or is off: the end that was asked for.
      this.#options.report.note((error as Error).message);
    }
    this.#options.ended(undefined);
  }

  /** Lets it go: what runs is stopped by the supervisor. */
  close(): void {
    this.#link?.close();
  }

  /** As swtpm makes the TPM of a directory that is empty. */
  async #create(link: SupervisorLink): Promise<Token> {
    const { place, report } = this.#options;
    const token = await createVtpm(link, place, { name: undefined, uuid: undefined });
    report.note(`made the vTPM ${token.id}: there was none in ${place.place}`);
    return token;
  }

  async #connect(): Promise<SupervisorLink> {
    const { clients, dataChannelGone, ended } = this.#options;
    this.#link = await SupervisorLink.open(
      dropinSocket(),
      {
        disconnected: (connection, door) => {
          if (door === 'vmm-data') dataChannelGone();
          else clients.disconnected(connection);
        },
        ended: (reason) =>
          ended(reason === null ? undefined : new DropinRefusal(`the vTPM crashed: ${reason}`)),
        lost: () => void this.#lost(),
      },
      PATIENCE_MS,
    );
    return this.#link;
  }

  /** The supervisor is gone. Where it became another program, the vTPM runs on and has to be held again. */
  async #lost(): Promise<void> {
    if (!this.#token || this.#isReturning) return;
    this.#isReturning = true;
    this.#options.clients.pause();
    try {
      for (let isBack = false; !isBack; ) isBack = await this.#return(this.#token);
    } catch (error) {
      const isOver = !(error instanceof SupervisorRefusal) || error.code === 'not-running';
      const why = 'the vTPM ended with its supervisor; see why: journalctl -u vtpm-supervisord';
      this.#options.ended(isOver ? new DropinRefusal(why) : error);
    }
    this.#isReturning = false;
  }

  /** @returns false where the supervisor was lost again */
  async #return(token: PlacedToken): Promise<boolean> {
    try {
      const link = await this.#connect();
      const { connections } = await link.start(token, true);
      this.#options.clients.serve(link, connections);
    } catch (error) {
      if (error instanceof SupervisorLost) return false;
      throw error;
    }
    this.#options.report.note('the supervisor is there again');
    return true;
  }
}
