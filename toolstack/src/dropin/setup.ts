import { createTpm, overSocket, Shutdown, Su, type Tpm } from 'tpm2-ts-bindings';
import { CertificateTool } from './certificates.js';
import { createVtpm } from './creation.js';
import { allocatePcrBanks, manufacture } from './manufacture.js';
import { DropinRefusal } from './refusal.js';
import type { Report } from './report.js';
import { parseBanks, parseSetupArguments, type SetupOptions } from './setup-arguments.js';
import { readSetupConfig, type SetupConfig } from './setup-config.js';
import { type ResolvedPlace, resolvePlace } from './state-place.js';
import { SupervisorLink } from './supervisor-link.js';
import { dropinSocket } from './supervisor-socket.js';
import { readToken, removeToken, type Token } from './token.js';
import { becomeUser } from './user.js';
import { openDoor, powerOn, startUp } from './vmm.js';

/** `swtpm_setup`: makes a vTPM and leaves its token. @throws DropinRefusal */
export async function runSetup(args: readonly string[], report: Report): Promise<void> {
  const options = parseSetupArguments(args);
  becomeUser(options.runAs);
  if (options.log) report.logTo(options.log);
  const config = readSetupConfig(options.config, process.env);
  const place = resolvePlace(options.state);
  const link = await SupervisorLink.open(dropinSocket(), {
    disconnected: () => undefined,
    ended: () => undefined,
    lost: () => undefined,
  });
  try {
    await new Setup({ options, config, place, link, report }).run();
  } finally {
    link.close();
  }
}

interface SetupParts {
  readonly options: SetupOptions;
  readonly config: SetupConfig;
  readonly place: ResolvedPlace;
  readonly link: SupervisorLink;
  readonly report: Report;
}

class Setup {
  readonly #parts: SetupParts;

  constructor(parts: SetupParts) {
    this.#parts = parts;
  }

  async run(): Promise<void> {
    const { place, options } = this.#parts;
    const token = readToken(place);
    if (token) return await this.#again(token);
    if (options.isReconfigured) {
      throw new DropinRefusal(
        `there is no vTPM in ${place.place} that could be reconfigured; leave out --reconfigure`,
      );
    }
    return await this.#make();
  }

  /** Where there is a vTPM already: it is never replaced. */
  async #again(token: Token): Promise<void> {
    const { place, link, options, report } = this.#parts;
    const { vm, ifExists } = options;
    if (vm.uuid !== undefined && vm.uuid !== token.vmUuid) {
      throw new DropinRefusal(
        `${place.place} holds the token of a vTPM of VM ${token.vmUuid}, not of ${vm.uuid}; a copied directory is not a second TPM`,
      );
    }
    const { name } = await link.request({ type: 'inspect', token: { ...token, place: place.place } });
    if (options.isReconfigured) {
      await this.#whileOn(token, (tpm) => this.#allocate(tpm));
      return report.note(`vTPM ${name} has other PCR banks now`);
    }
    if (ifExists === 'keep') return report.note(`vTPM ${name} is there already and stays as it is`);
    if (ifExists === 'replace' && !options.createsKeys) {
      // libvirt's way to make room for state that a migration brings. What is there is a TPM that somebody may use.
      return report.note(`vTPM ${name} is there already and stays as it is, for the migration that comes`);
    }
    throw new DropinRefusal(
      ifExists === 'replace'
        ? `vTPM ${name} is there, and no TPM is replaced by another in silence; vtpmctl delete ${name}, remove ${place.token}, then run this again`
        : `vTPM ${name} is there already; add --not-overwrite to keep it`,
    );
  }

  async #make(): Promise<void> {
    const { place, link, options, report, config } = this.#parts;
    // Before anything is made.
    const certificates = options.createsEkCertificate ? new CertificateTool(config, options.vmid) : undefined;
    const token = await createVtpm(link, place, options.vm);
    if (options.ifExists === 'replace' && !options.createsKeys) {
      return report.note(`registered vTPM ${token.id}; its TPM is what a migration brings`);
    }
    try {
      await this.#whileOn(token, async (tpm) => {
        if (options.createsKeys) {
          const { createsPlatformCertificate, locksNvram, writesCertificatesTo: copiesTo } = options;
          const made = await manufacture(tpm, {
            certificates,
            hasPlatformCertificate: createsPlatformCertificate,
            locksNvram,
            copiesTo,
          });
          for (const line of made) report.note(`made: ${line}`);
        }
        await this.#allocate(tpm);
      });
    } catch (error) {
      await this.#discard(token);
      throw error;
    }
    report.note(`made vTPM ${token.id} of VM ${token.vmUuid}, token in ${place.token}`);
  }

  /** One that was not finished is of no use, and would be in the way of the next try. */
  async #discard(token: Token): Promise<void> {
    const { place, link, report } = this.#parts;
    try {
      await link.request({ type: 'discard' });
      removeToken(place, token);
    } catch (error) {
      report.note(`a vTPM that is not finished stays: ${(error as Error).message}`);
    }
  }

  async #allocate(tpm: Tpm): Promise<void> {
    const { options, config } = this.#parts;
    const configured = config.pcrBanks ?? 'sha256';
    await allocatePcrBanks(tpm, options.pcrBanks ?? parseBanks('active_pcr_banks', configured));
  }

  async #whileOn(token: Token, work: (tpm: Tpm) => Promise<void>): Promise<void> {
    const { link, place } = this.#parts;
    await link.start({ ...token, place: place.place });
    await powerOn(link);
    await startUp(link);
    const tpm = createTpm(overSocket(await openDoor(link, 'tpm'), 'the vTPM'));
    try {
      await work(tpm);
      await tpm.run(Shutdown, {}, { shutdownType: Su.CLEAR });
    } finally {
      await tpm.close();
      await link.request({ type: 'stop' });
    }
  }
}
