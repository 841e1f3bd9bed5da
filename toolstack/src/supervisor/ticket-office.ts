import { bootId, monotonicMs } from 'vtpm-common';
import {
  decode,
  encode,
  IDENTITY_FORMAT,
  type SignedTicket,
  type SigningKey,
  signTicket,
  type Ticket,
  uuidToBytes,
  type Verb,
  verifyTicketChain,
} from 'vtpm-proto';
import { ToolstackError } from '../error.js';
import type { AdminClient } from './admin-client.js';
import type { Entry, NewEntry } from './entry.js';

export interface TicketOffice {
  /**
   * Signs the permission for one worker to load one vTPM once. Call it only when no earlier worker of the vTPM can run
   * any more (I-3), and its image is checked. @param workerKey the worker's box key, 32 bytes
   * @param imageDigest of the image that it runs from, hex @param power `is-on`, unless it is given
   * @throws ToolstackError `manager-unreachable` | `manager-refused` | `locked` | `corrupt`
   */
  issue(entry: Entry, workerKey: Uint8Array, imageDigest: string, power?: Power): Promise<IssuedTicket>;
  /**
   * As `issue` for a power-on, at once and without asking the manager: on what the list says of the vTPM. Where that is not
   * so any more the manager refuses the Load, and nothing has happened.
   * @returns undefined where no manager is known to be there
   */
  presume(entry: Entry, workerKey: Uint8Array, imageDigest: string): IssuedTicket | undefined;
  /**
   * As `issue` for a vTPM that arrives and that the manager has no record of yet: the Load waits for it.
   * @param epoch that it has at the host that it comes from @throws ToolstackError `manager-unreachable` | `locked` | `manager-refused`
   */
  expect(entry: Entry, workerKey: Uint8Array, imageDigest: string, epoch: number): Promise<IssuedTicket>;
  /** Of the manager that tickets are for, hex. @throws ToolstackError `manager-unreachable` | `locked` | `manager-refused` */
  managerKey(): Promise<string>;
  /** @throws ToolstackError `bad-request` where a delegation does not let this supervisor run the vTPM */
  checkDelegation(entry: NewEntry): void;
}

/** `is-on`: the VM was powered on just now. `goes-on`: a worker of the same VM run has ended. */
export type Power = 'is-on' | 'goes-on';

export interface IssuedTicket {
  readonly ticket: SignedTicket;
  /** Hex. */
  readonly managerKey: string;
  /** That the worker gets. */
  readonly epoch: number;
}

/** What a vTPM is before a Load. */
interface Before {
  readonly managerId: string;
  readonly epoch: number;
  /** It must never be manufactured again. */
  readonly isManufactured: boolean;
}

export interface TicketOfficeOptions {
  readonly admin: Pick<AdminClient, 'health' | 'vtpm'>;
  /** Another number for each connection to a manager; undefined while there is none. */
  managerInstance(): number | undefined;
  readonly delegateKey: SigningKey;
  readonly lifetimeSeconds: number;
}

export function createTicketOffice(options: TicketOfficeOptions): TicketOffice {
  return new TicketOfficeImpl(options);
}

class TicketOfficeImpl implements TicketOffice {
  readonly #options: TicketOfficeOptions;
  #known: { readonly instance: number; readonly managerId: string } | undefined;

  constructor(options: TicketOfficeOptions) {
    this.#options = options;
  }

  async issue(
    entry: Entry,
    workerKey: Uint8Array,
    imageDigest: string,
    power: Power = 'is-on',
  ): Promise<IssuedTicket> {
    const { admin } = this.#options;
    const asked = admin.vtpm(entry.id);
    // What is wrong with the manager as a whole is told first.
    asked.catch(() => undefined);
    const managerId = await this.managerKey();
    const record = await asked;
    if (record?.kind === 'moved') {
      throw new ToolstackError(
        'moved',
        `vTPM ${entry.name} lives on another host; it comes back by a migration`,
      );
    }
    if (record?.migrating) {
      throw new ToolstackError(
        'migrating',
        `vTPM ${entry.name} is on its way to another host, which has not said yet what became of it; vtpmctl migrate resolve ${entry.name}`,
      );
    }
    if (record?.kind === 'retired') {
      throw new ToolstackError('manager-refused', `vTPM ${entry.name} was retired; it can never run again`);
    }
    if (record && record.vmUuid !== entry.vmUuid) {
      throw new ToolstackError(
        'manager-refused',
        `vTPM ${entry.name} belongs to VM ${record.vmUuid} at the manager`,
      );
    }
    const generation = record?.generation ?? 0;
    if (entry.manufactured && generation === 0) {
      // A ticket that allows a new TPM here would hide the loss of the old one (I-9).
      throw new ToolstackError(
        'corrupt',
        `vTPM ${entry.name} has run before, but the manager has no state of it; restore the manager's store from a backup`,
      );
    }
    if (power === 'goes-on' && !delegatedVerbs(entry).includes('RESUME')) {
      throw new ToolstackError(
        'bad-request',
        `the delegation of vTPM ${entry.name} has not the verb resume: no worker can go on where another one ended`,
      );
    }
    const before = { managerId, epoch: record?.epoch ?? 0, isManufactured: generation > 0 };
    return this.#sign(entry, workerKey, imageDigest, before, power);
  }

  presume(entry: Entry, workerKey: Uint8Array, imageDigest: string): IssuedTicket | undefined {
    const known = this.#known;
    if (known === undefined || known.instance !== this.#options.managerInstance()) return undefined;
    const before = {
      managerId: known.managerId,
      epoch: entry.epoch ?? 0,
      isManufactured: entry.manufactured,
    };
    return this.#sign(entry, workerKey, imageDigest, before, 'is-on');
  }

  async expect(
    entry: Entry,
    workerKey: Uint8Array,
    imageDigest: string,
    epoch: number,
  ): Promise<IssuedTicket> {
    const managerId = await this.managerKey();
    const before = { managerId, epoch, isManufactured: true };
    return this.#sign(entry, workerKey, imageDigest, before, 'goes-on');
  }

  #sign(
    entry: Entry,
    workerKey: Uint8Array,
    imageDigest: string,
    { managerId, epoch, isManufactured }: Before,
    power: Power,
  ): IssuedTicket {
    const start = power === 'goes-on' ? (['RESUME'] as const) : verbsOfPowerOn(entry, isManufactured);
    const verbs: Verb[] = [...start, ...verbsOfBlobs(entry)];
    const ticket = signTicket(
      this.#options.delegateKey,
      {
        ...this.#fields(entry),
        managerId: Buffer.from(managerId, 'hex'),
        vmRunId: uuidToBytes(entry.vmRunId ?? ''),
        imageDigest: Buffer.from(imageDigest, 'hex'),
        workerPublicKey: workerKey,
        expectedEpoch: BigInt(epoch),
        verbs,
        expiresAtMonotonicMs: monotonicMs() + BigInt(this.#options.lifetimeSeconds) * 1000n,
      },
      signedDelegation(entry),
    );
    return { ticket, managerKey: managerId, epoch: epoch + 1 };
  }

  /** Asked once of each manager that comes up; one that was ready and no longer is says so itself when it is asked more. */
  async managerKey(): Promise<string> {
    const instance = this.#options.managerInstance();
    const known = this.#known;
    if (known && known.instance === instance) return known.managerId;
    const health = await this.#options.admin.health();
    if (health.status === 'locked') {
      throw new ToolstackError('locked', `the manager is locked: ${health.message ?? 'see vtpmctl status'}`);
    }
    if (health.status !== 'ready') {
      // Not for good: a guest must not lose its TPM because of a manager that comes or goes.
      throw new ToolstackError(
        'manager-unreachable',
        `the manager is not ready (${health.status}); try again in a moment`,
      );
    }
    const { managerId } = health;
    // Where the events were lost meanwhile, it may be another manager's.
    const isSame = instance !== undefined && instance === this.#options.managerInstance();
    this.#known = isSame ? { instance, managerId } : undefined;
    return managerId;
  }

  checkDelegation(entry: NewEntry): void {
    const signed = signedDelegation(entry);
    try {
      // The manager's own check, on a ticket that is never handed out, finds whatever it would find.
      const trial = signTicket(
        this.#options.delegateKey,
        {
          ...this.#fields(entry),
          managerId: Buffer.alloc(32),
          vmRunId: Buffer.alloc(16),
          imageDigest: Buffer.alloc(32),
          workerPublicKey: Buffer.alloc(32),
          expectedEpoch: 0n,
          verbs: [entry.migration ? 'RESUME' : 'MANUFACTURE', 'COLD', ...verbsOfBlobs(entry)],
          expiresAtMonotonicMs: 0n,
        },
        signed,
      );
      if (
        !Buffer.from(decode('Delegation', signed.delegation).delegateKey).equals(
          this.#options.delegateKey.publicKey,
        )
      ) {
        throw new Error("it is for another supervisor's key; GET /health names the key of this one");
      }
      verifyTicketChain(trial);
    } catch (cause) {
      throw new ToolstackError('bad-request', `the delegation cannot be used: ${(cause as Error).message}`, {
        cause,
      });
    }
  }

  #fields(entry: NewEntry): Pick<Ticket, 'format' | 'vtpmUuid' | 'vmUuid' | 'isolation' | 'bootId'> {
    return {
      format: IDENTITY_FORMAT,
      vtpmUuid: uuidToBytes(entry.id),
      vmUuid: uuidToBytes(entry.vmUuid),
      isolation: entry.isolation,
      bootId: bootId(),
    };
  }
}

/** The form in which a worker gets it, base64. */
export function ticketText(ticket: SignedTicket): string {
  return encode('SignedTicket', ticket).toString('base64');
}

/** A suspended TPM is kept for who may resume it: the VMM brings the reference, or powers the TPM on without it. */
/** A TPM that its VMM suspended waits for the next run; only what a VMM powers can be suspended. */
function verbsOfPowerOn(entry: Entry, isManufactured: boolean): Verb[] {
  if (!isManufactured) return ['MANUFACTURE', 'COLD'];
  const mayResume = entry.doors.includes('control') && delegatedVerbs(entry).includes('RESUME');
  return mayResume ? ['COLD', 'RESUME'] : ['COLD'];
}

function verbsOfBlobs({ stateBlobs }: Pick<NewEntry, 'stateBlobs'>): Verb[] {
  return stateBlobs === 'plain' ? ['IMPORT', 'EXPORT'] : [];
}

function delegatedVerbs(entry: NewEntry): Verb[] {
  return decode('Delegation', signedDelegation(entry).delegation).verbs;
}

function signedDelegation(entry: NewEntry): { delegation: Buffer; signature: Buffer } {
  return {
    delegation: Buffer.from(entry.delegation, 'base64'),
    signature: Buffer.from(entry.delegationSignature, 'base64'),
  };
}
