import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { connect } from 'node:net';
import { join } from 'node:path';
import { type Installation, run } from './installation.js';
import { TpmClient } from './tpm-client.js';
import {
  counterOf,
  createPrimaryEcc,
  getHandles,
  handlesOf,
  nvDefineCounter,
  nvIncrement,
  nvReadCounter,
  pcrExtend,
  pcrRead,
  readClock,
  responseCode,
  startAuthSession,
} from './tpm-commands.js';
import { until } from './until.js';

const RAW = { index: 0x01500001, pcr: 16 };
const TOOLS = { index: 0x01500002, pcr: 23 };
const RETRY = 0x922;
const MEASUREMENT = createHash('sha256').update('measured').digest();

/** What a guest knows was done, because it was told so. */
interface Known {
  extends: number;
  increments: number;
  retries: number;
}

/**
 * Kills the manager under a vTPM that two clients use, a raw one and tpm2-tools, keeps it away, and brings it back.
 * Checks that both were served, that nothing was lost, undone or invented, that the TPM was neither reset nor in failure
 * mode, and that everything went on by itself.
 */
export async function liveThroughOutage(
  installation: Installation,
  name: string,
  seconds: number,
): Promise<void> {
  const client = new TpmClient(connect({ path: installation.door(name), allowHalfOpen: true }));
  const ask = async (command: Buffer): Promise<Buffer> => {
    const response = await client.transmit(command);
    assert.ok(
      [0, RETRY].includes(responseCode(response)),
      `answered 0x${responseCode(response).toString(16)}`,
    );
    return response;
  };
  const tool = async (program: string, ...args: string[]): Promise<boolean> => {
    const env = { TPM2TOOLS_TCTI: `swtpm:path=${installation.door(name, 'tcti')}` };
    const { code, stderr } = await run(program, args, env);
    assert.doesNotMatch(stderr, /0x101\b/, 'failure mode');
    if (code !== 0) assert.match(stderr, /0x0*922\b/, `${program}: ${stderr}`);
    return code === 0;
  };
  const raw: Known = { extends: 0, increments: 0, retries: 0 };
  const tools: Known = { extends: 0, increments: 0, retries: 0 };
  const told = (known: Known, what: 'extends' | 'increments', isDone: boolean): void => {
    known[isDone ? what : 'retries']++;
  };
  const rawRound = async (): Promise<void> => {
    told(raw, 'extends', responseCode(await ask(pcrExtend(RAW.pcr, MEASUREMENT))) === 0);
    const { length } = await ask(pcrRead(RAW.pcr));
    assert.ok(length > 10, 'reading goes on');
    told(raw, 'increments', responseCode(await ask(nvIncrement(RAW.index))) === 0);
  };
  const toolsRound = async (): Promise<void> => {
    const measurement = `${TOOLS.pcr}:sha256=${MEASUREMENT.toString('hex')}`;
    told(tools, 'extends', await tool('tpm2_pcrextend', measurement));
    assert.ok(await tool('tpm2_getrandom', '--hex', '8'), 'reading goes on');
    assert.ok(await tool('tpm2_pcrread', `sha256:${TOOLS.pcr}`), 'reading goes on');
    told(tools, 'increments', await tool('tpm2_nvincrement', '-C', 'o', `0x${TOOLS.index.toString(16)}`));
  };

  for (const { index } of [RAW, TOOLS]) await ask(nvDefineCounter(index));
  await rawRound();
  await toolsRound();
  const object = (await ask(createPrimaryEcc())).readUInt32BE(10);
  const session = (await ask(startAuthSession())).readUInt32BE(10);
  const resets = (await ask(readClock())).subarray(26);
  const pid = await installation.workerPid(name);
  assert.deepEqual([raw.retries, tools.retries], [0, 0], 'no RETRY while the manager is there');
  const before = { raw: { ...raw }, tools: { ...tools } };

  await installation.killManager();
  // A command that runs before the worker knows is held to the end of the outage, and the client with it.
  const log = join(installation.paths.log, `vtpm-${name}.log`);
  await until('the worker knows', () => readFileSync(log, 'utf8').includes('the manager is away'));
  let isAway = true;
  const end = performance.now() + seconds * 1000;
  const goOn = async (round: () => Promise<void>, known: Known, atKill: Known): Promise<void> => {
    while (performance.now() < end) await round();
    assert.ok(known.extends > atKill.extends, 'extending goes on');
    assert.ok(known.retries > 0, 'what cannot be saved is to be tried again');
    await until('the guest goes on by itself', async () => {
      const { increments } = known;
      await round();
      return !isAway && known.increments > increments;
    });
  };
  const back = (async () => {
    await until('the outage is over', () => performance.now() > end, seconds * 2000 + 10_000);
    await installation.startManager();
    isAway = false;
  })();
  await Promise.all([goOn(rawRound, raw, before.raw), goOn(toolsRound, tools, before.tools), back]);

  for (const [known, { index, pcr }] of [
    [raw, RAW],
    [tools, TOOLS],
  ] as const) {
    assert.equal(counterOf(await ask(nvReadCounter(index))), BigInt(known.increments));
    assert.deepEqual((await ask(pcrRead(pcr))).subarray(-32), extended(known.extends), `PCR ${pcr}`);
  }
  assert.ok(handlesOf(await ask(getHandles(0x80000000))).includes(object), 'the object is loaded');
  assert.ok(handlesOf(await ask(getHandles(0x02000000))).includes(session), 'the session is open');
  assert.deepEqual((await ask(readClock())).subarray(26), resets, 'no reset');
  assert.equal(await installation.workerPid(name), pid, 'the same worker');
  client.close();
}

function extended(times: number): Buffer {
  let pcr: Buffer = Buffer.alloc(32);
  for (let time = 0; time < times; time++) {
    pcr = createHash('sha256').update(pcr).update(MEASUREMENT).digest();
  }
  return pcr;
}
