import { readFileSync } from 'node:fs';
import { Alg, createTpm, openSocket, PCR_Extend, permanent, withPassword } from 'tpm2-ts-bindings';
import { loadWithForeignTicket } from './foreign-ticket.js';
import { connectGuest } from './guest.js';
import { Stage } from './stage.js';
import { say, step } from './story.js';
import { waiveWhatIsMissing } from './waive.js';

const started = performance.now();
const stage = new Stage();
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, () => void stage.clear().finally(() => process.exit(1)));
}

try {
  await play();
} catch (error) {
  console.error(`\nThe quickstart failed: ${error instanceof Error ? error.message : String(error)}`);
  process.exitCode = 1;
} finally {
  await stage.clear();
}
if (process.exitCode === undefined) {
  say(`Done in ${((performance.now() - started) / 1000).toFixed(1)} s; nothing is left running. Next, for a service that stays:

    npx vtpmctl init --tpm auto       (a machine without a TPM: --tpm embedded, for trying things)
    npx vtpmctl up
    npx vtpmctl create web1 && npx vtpmctl start web1
    npx vtpmctl exec web1 -- tpm2_getrandom --hex 8     (apt-get install tpm2-tools)
    npx vtpmctl --help

  README.md has the first ten minutes, docs/ the rest.`);
}

async function play(): Promise<void> {
  say(
    "Real daemons, real sandboxes, real TPM commands. A software TPM stands in for the host's chip;\nno TPM of this machine is touched.",
  );
  await waiveWhatIsMissing();
  await step(
    'A manager takes a TPM',
    'its root key is sealed to PCR 7 and crossed the bus only encrypted',
    async () => {
      await stage.startChip();
      await stage.ctl(['init', '--tpm', `unix:${stage.chip}`, '--recovery-key-file', stage.recoveryKey]);
      await stage.ctl(['up']);
    },
  );

  await step('Two vTPMs, each in a sandboxed worker of its own', 'names, processes, layers', async () => {
    for (const name of ['web1', 'web2']) {
      await stage.ctl(['create', name]);
      await stage.ctl(['start', name]);
    }
    const shown = await stage.json(['show', 'web1']);
    const { pid, layers } = shown.worker as { pid: number; layers: string[] };
    return `web1 is process ${pid}: ${layers.join(', ')}`;
  });

  const before = await step(
    'A guest uses web1',
    'PCR extend, an NV counter, a kept key, a quote checked outside',
    async () => {
      const guest = await connectGuest(stage.door('web1'));
      await guest.extend(16, 'measured');
      await guest.defineCounter();
      for (let i = 0; i < 3; i++) await guest.increment();
      const state = {
        counter: await guest.counter(),
        key: await guest.makeKey(),
        endorsement: await guest.endorsement(),
      };
      await guest.quote(Buffer.from('a nonce of the verifier'));
      await guest.close();
      const other = await connectGuest(stage.door('web2'));
      const otherEndorsement = await other.endorsement();
      await other.close();
      if (otherEndorsement === state.endorsement) throw new Error('two vTPMs have the same endorsement seed');
      return {
        ...state,
        note: `counter ${state.counter}, key ${state.key}, endorsement ${state.endorsement}`,
      };
    },
  );

  await step(
    'kill -9 of both workers and the manager, under a guest that stays connected',
    'a pause, and nothing that was answered is lost: counter, key, PCR',
    async () => {
      const guest = await connectGuest(stage.door('web1'));
      const pcr = await guest.pcr(16);
      const killed = await workerPid('web1');
      for (const pid of [killed, await workerPid('web2'), managerPid()]) process.kill(pid, 'SIGKILL');
      await stage.ctl(['up']);
      const after = {
        counter: await guest.counter(),
        key: await guest.keyFingerprint(),
        endorsement: await guest.endorsement(),
      };
      for (const name of ['counter', 'key', 'endorsement'] as const) {
        if (after[name] !== before[name])
          throw new Error(`${name} was ${before[name]} and is ${after[name]}`);
      }
      if ((await guest.pcr(16)) !== pcr) throw new Error('PCR 16 was reset under a running guest');
      await guest.quote(Buffer.from('another nonce'));
      await guest.close();
      return `the same connection, now to process ${await workerPid('web1')}: counter ${after.counter}, key ${after.key}, PCR 16 as they were`;
    },
  );

  await step(
    "web1's ticket does not open web2",
    'tickets are for one vTPM, in one worker, once',
    async () => {
      const [web1, web2] = await Promise.all([stage.json(['show', 'web1']), stage.json(['show', 'web2'])]);
      await stage.ctl(['stop', 'web2']);
      const { images } = (await stage.json(['image', 'list'])) as { images: { digest: string }[] };
      const manager = JSON.parse(readFileSync(stage.paths.toolstack.managerIdentity, 'utf8')) as {
        managerId: string;
      };
      const reason = await loadWithForeignTicket(stage.paths, {
        has: web1 as { id: string; vmUuid: string },
        wants: web2 as { id: string; vmUuid: string },
        managerId: manager.managerId,
        imageDigest: images[0]?.digest ?? '',
        epoch: web2.epoch as number,
      });
      if (!reason) throw new Error('the manager gave web2 out');
      return `the manager refuses: ${reason}`;
    },
  );

  await step(
    'The platform changes: PCR 7 of the chip is extended',
    'the chip no longer gives out the root key',
    async () => {
      await stage.ctl(['down']);
      const chip = createTpm(await openSocket(stage.chip));
      const digests = [{ hashAlg: Alg.SHA256, digest: Buffer.alloc(32, 0x66) }];
      await chip.run(PCR_Extend, { pcrHandle: withPassword(permanent(7)) }, { digests });
      await chip.close();
      const refused = await stage.ctl(['up'], 4);
      return refused.stderr.trim().split('\n').at(0);
    },
  );
}

function managerPid(): number {
  return Number(readFileSync(`${stage.paths.run}/manager.pid`, 'utf8').trim().split(/\s/)[0]);
}

async function workerPid(name: string): Promise<number> {
  return ((await stage.json(['show', name])).worker as { pid: number }).pid;
}
