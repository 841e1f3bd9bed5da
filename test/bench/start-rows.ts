import { randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { signDelegation, signingKeyFromSeed, uuidToBytes } from 'vtpm-proto';
import { Installation, run } from '../support/installation.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { getRandom } from '../support/tpm-commands.js';
import { BlockingClient } from './blocking-client.js';
import { type RowContext, row, type Suite } from './row.js';
import { interleaved } from './statistics.js';

const CREATE = 'Create to first answer';
const CREATE_BARE = 'Create to first answer, bare peer';
const CREATE_BY_COMMAND = 'Create to first answer, vtpmctl';
const COLD = 'Cold start to first answer';

/** Time from the request until a client has the answer to its first command. */
export const startSuite: Suite = {
  names: [CREATE, CREATE_BARE, CREATE_BY_COMMAND, COLD],
  async run(context: RowContext): Promise<void> {
    const swtpm = await startSwtpm();
    const installation = await Installation.create();
    try {
      await installation.start();
      const { wanted, report, effort } = context;
      const ours = new OurStarts(installation);
      const prepared = (): Promise<number[]> => prepareAndStart(swtpm);
      const bare = (): Promise<number[]> => startAlone(swtpm);
      const compare = async (
        name: string,
        here: () => Promise<number[]>,
        peer: string,
        there: () => Promise<number[]>,
        note: string,
      ): Promise<void> => {
        if (!wanted(name)) return;
        const [mine, others] = await interleaved(effort.starts, [here, there]);
        report(row(name, 'ms', mine!, { name: peer, ...others! }, note));
      };
      const setUp = 'swtpm_setup --createek, swtpm';
      const noKey = 'the peer also makes an RSA endorsement key, which takes it a random time';
      await compare(CREATE, () => ours.create(), setUp, prepared, `by the supervisor's API; ${noKey}`);
      await compare(CREATE_BARE, () => ours.create(), 'swtpm', bare, 'the peer starts on old state');
      await compare(CREATE_BY_COMMAND, () => ours.createByCommand(), setUp, prepared, 'create, then start');
      await compare(COLD, () => ours.startCold(), 'swtpm', bare, 'sandboxed, ticket and Load included');
    } finally {
      await installation.destroy();
      await swtpm.stop();
    }
  },
};

class OurStarts {
  readonly #seed: Buffer;
  #count = 0;
  #cold: string | undefined;

  constructor(private readonly installation: Installation) {
    this.#seed = readFileSync(installation.paths.toolstack.key);
  }

  /** As a toolstack does it, which keeps the key and needs no program for it. */
  async create(): Promise<number[]> {
    const name = this.#newName();
    const key = signingKeyFromSeed(this.#seed);
    const health = await this.#ask('GET', '/health');
    const took = await timed(this.installation.door(name), async () => {
      const [id, vmUuid] = [randomUUID(), randomUUID()];
      const { delegation, signature } = signDelegation(key, {
        format: 1,
        toolstackKey: key.publicKey,
        delegateKey: Buffer.from(String(health.delegateKey), 'hex'),
        vtpmUuid: uuidToBytes(id),
        vmUuid: uuidToBytes(vmUuid),
        verbs: ['MANUFACTURE', 'COLD', 'RESUME'],
      });
      await this.#ask('POST', '/vtpms', {
        ...{ id, name, vmUuid, isolation: 'sandbox', autostart: false, startup: 'clear' },
        delegation: delegation.toString('base64'),
        delegationSignature: signature.toString('base64'),
      });
      await this.#ask('POST', `/vtpms/${name}/start`);
    });
    await this.installation.ctlJson('delete', name, '--yes');
    return [took];
  }

  async createByCommand(): Promise<number[]> {
    const name = this.#newName();
    const took = await timed(this.installation.door(name), async () => {
      await this.installation.ctlJson('create', name);
      await this.installation.ctlJson('start', name);
    });
    await this.installation.ctlJson('delete', name, '--yes');
    return [took];
  }

  async startCold(): Promise<number[]> {
    if (this.#cold === undefined) {
      this.#cold = this.#newName();
      await this.installation.vtpm(this.#cold);
    }
    const name = this.#cold;
    await this.#ask('POST', `/vtpms/${name}/stop`);
    return [await timed(this.installation.door(name), () => this.#ask('POST', `/vtpms/${name}/start`))];
  }

  #newName(): string {
    this.#count++;
    return `start-${this.#count}`;
  }

  async #ask(method: string, path: string, body?: unknown): Promise<Record<string, unknown>> {
    const answer = await this.installation.supervisord(method, path, body);
    if (answer.status >= 300) throw new Error(`${method} ${path}: ${JSON.stringify(answer.body)}`);
    return answer.body;
  }
}

async function startAlone(swtpm: Swtpm): Promise<number[]> {
  await swtpm.kill();
  return [await timed(swtpm.socket, () => swtpm.restart())];
}

async function prepareAndStart(swtpm: Swtpm): Promise<number[]> {
  await swtpm.kill();
  const setUp = async (): Promise<void> => {
    const args = ['--tpm2', '--tpmstate', swtpm.directory, '--createek', '--overwrite'];
    const { code, stdout, stderr } = await run('swtpm_setup', args);
    if (code !== 0) throw new Error(`swtpm_setup: ${stdout}${stderr}`);
    await swtpm.restart();
  };
  return [await timed(swtpm.socket, setUp)];
}

async function timed(socket: string, start: () => Promise<unknown>): Promise<number> {
  const begin = performance.now();
  await start();
  const client = new BlockingClient(socket);
  try {
    client.succeed(getRandom());
    return performance.now() - begin;
  } finally {
    client.close();
  }
}
