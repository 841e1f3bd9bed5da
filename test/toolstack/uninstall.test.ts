import assert from 'node:assert/strict';
import {
  chmodSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  Ht,
  listHandles,
  NV_UndefineSpace,
  permanent,
  Rh,
  readNvIndex,
  withPassword,
} from 'tpm2-ts-bindings';
import { end, Installation, REPOSITORY, run } from '../support/installation.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { connectTpm } from '../support/tpm-fixture.js';

interface Removal {
  readonly removed: string[];
  readonly left: string[];
}

/** Persistent objects and NV indices: what outlives a reset of the TPM. */
async function kept(tpm: Swtpm): Promise<{ persistent: number[]; nv: number[] }> {
  const client = await connectTpm(tpm.socket);
  try {
    return {
      persistent: await listHandles(client, Ht.PERSISTENT),
      nv: await listHandles(client, Ht.NV_INDEX),
    };
  } finally {
    await client.close();
  }
}

const EMPTY = { persistent: [], nv: [] };

function chipOf({ tpm }: Installation): Swtpm {
  assert.ok(tpm);
  return tpm;
}

async function uninstall(installation: Installation, ...flags: string[]): Promise<Removal> {
  return (await installation.ctlJson('uninstall', '--yes', ...flags)) as unknown as Removal;
}

describe('vtpmctl uninstall', function () {
  this.timeout(120_000);
  let installation: Installation;
  beforeEach(async () => {
    installation = await Installation.create();
  });
  afterEach(() => installation?.destroy());

  it('takes everything of init out of the TPM and off the disk, the storage root key with --evict', async () => {
    const chip = chipOf(installation);
    const made = await kept(chip);
    assert.equal(made.nv.length, 3);
    assert.deepEqual(made.persistent, [0x81000001]);
    // The supervisor's files too.
    await installation.start();
    await end(installation.supervisor, 'SIGTERM');
    await end(installation.manager, 'SIGTERM');
    const { removed, left } = await uninstall(installation, '--evict');
    assert.deepEqual(await kept(chip), EMPTY);
    assert.equal(existsSync(installation.home), false, left.join());
    assert.deepEqual(left, []);
    assert.match(
      removed.join('\n'),
      /NV index 0x0181[\s\S]*storage root key 0x81000001[\s\S]*toolstack\.key/,
    );
    // As if nothing had ever been: init works again, on the same TPM and home.
    await installation.ctlJson('init', '--tpm', `unix:${chip.socket}`);
  });

  it('leaves the storage root key without --evict, and what is not its own, and says so', async () => {
    writeFileSync(installation.paths.config, '{}');
    writeFileSync(join(installation.paths.manager.directory, 'notes.txt'), 'mine');
    const { left } = await uninstall(installation);
    assert.deepEqual(await kept(chipOf(installation)), { persistent: [0x81000001], nv: [] });
    assert.match(
      left.join('\n'),
      /storage root key 0x81000001: other programs may use it \(--evict removes it\)/,
    );
    assert.match(left.join('\n'), /manager\/notes\.txt/);
    assert.match(left.join('\n'), /config\.json/);
    assert.deepEqual(readdirSync(installation.home).sort(), ['config.json', 'manager']);
  });

  it('does not evict a key that was there before, nor one that another installation uses', async () => {
    const chip = chipOf(installation);
    const second = join(installation.directory, 'second');
    const ctl = (...args: string[]) =>
      run(process.execPath, [
        join(REPOSITORY, 'toolstack/bin/vtpmctl.js'),
        '--home',
        second,
        '--json',
        ...args,
      ]);
    const init = await ctl('init', '--tpm', `unix:${chip.socket}`);
    assert.equal(init.code, 0, init.stderr);
    const first = await uninstall(installation, '--evict');
    assert.match(first.left.join('\n'), /0x81000001: another installation seems to use it/);
    const { code, stdout, stderr } = await ctl('uninstall', '--evict', '--yes');
    assert.equal(code, 0, stderr);
    assert.match(
      (JSON.parse(stdout) as Removal).left.join('\n'),
      /0x81000001: it was in the TPM before init/,
    );
    assert.deepEqual(await kept(chip), { persistent: [0x81000001], nv: [] });
  });

  it('refuses while vTPMs exist, names them, and touches nothing', async () => {
    const chip = chipOf(installation);
    const before = await kept(chip);
    await installation.start();
    await installation.vtpm('web1');
    const id = ((await installation.supervisord('GET', '/vtpms/web1')).body as { id: string }).id;
    const running = await installation.ctl('uninstall', '--yes');
    assert.equal(running.code, 1);
    assert.match(running.stderr, /the supervisor runs; stop it first: vtpmctl down/);
    await end(installation.supervisor, 'SIGTERM');
    assert.match((await installation.ctl('uninstall', '--yes')).stderr, /the manager runs/);
    await end(installation.manager, 'SIGTERM');

    assert.match((await installation.ctl('uninstall', '--yes')).stderr, /there is a vTPM: web1\. /);
    // The manager's word counts where the supervisor's list is gone.
    const list = installation.paths.supervisor.vtpms;
    renameSync(list, `${list}.away`);
    const { code, stderr } = await installation.ctl('uninstall', '--yes', '--force');
    assert.equal(code, 1);
    assert.match(stderr, new RegExp(`a vTPM exists here: ${id}`));
    renameSync(`${list}.away`, list);
    assert.deepEqual(await kept(chip), before);

    // And once it is deleted nothing is in the way.
    await installation.start();
    await installation.ctlJson('delete', 'web1', '--yes');
    await end(installation.supervisor, 'SIGTERM');
    await end(installation.manager, 'SIGTERM');
    await uninstall(installation, '--evict');
    assert.deepEqual(await kept(chip), EMPTY);
  });

  it('asks, and without a terminal wants --yes', async () => {
    const { code, stderr } = await installation.ctl('uninstall');
    assert.equal(code, 2);
    assert.match(stderr, /add --yes/);
    assert.equal((await kept(chipOf(installation))).nv.length, 3);
    await installation.start();
    await end(installation.manager, 'SIGTERM');
  });

  it('changes nothing where the TPM does not answer, unless it is told to leave the TPM', async () => {
    const chip = chipOf(installation);
    await chip.kill();
    const { code, stderr } = await installation.ctl('uninstall', '--yes');
    assert.equal(code, 1);
    assert.match(stderr, /Nothing was removed.*--force/);
    // The installation is as whole as before.
    await chip.restart();
    await installation.start();
    await end(installation.supervisor, 'SIGTERM');
    await end(installation.manager, 'SIGTERM');
    await chip.kill();
    const { left } = await uninstall(installation, '--force');
    assert.match(left.join('\n'), /everything in the TPM/);
    assert.equal(existsSync(installation.home), false);
  });

  it('does not take a store that is not there for one without vTPMs', async () => {
    const { store } = installation.paths.manager;
    renameSync(store, `${store}.away`);
    assert.match(
      (await installation.ctl('uninstall', '--yes')).stderr,
      /missing or empty.*not mounted.*--force/,
    );
    assert.equal((await kept(chipOf(installation))).nv.length, 3);
    await uninstall(installation, '--force');
    assert.equal((await kept(chipOf(installation))).nv.length, 0);
  });

  describe('interrupted', () => {
    const unfinished = () => `${installation.paths.manager.enrolment}.unfinished`;
    const putAside = () => renameSync(installation.paths.manager.enrolment, unfinished());
    async function removeIndices(): Promise<void> {
      const client = await connectTpm(chipOf(installation).socket);
      try {
        for (const handle of await listHandles(client, Ht.NV_INDEX)) {
          const nvIndex = await readNvIndex(client, handle);
          assert.ok(nvIndex);
          await client.run(NV_UndefineSpace, { authHandle: withPassword(permanent(Rh.OWNER)), nvIndex }, {});
        }
      } finally {
        await client.close();
      }
    }

    for (const [where, steps] of [
      ['before the TPM', [putAside]],
      ['after the TPM', [putAside, removeIndices]],
      [
        'after the store',
        [putAside, removeIndices, () => rmSync(installation.paths.manager.store, { recursive: true })],
      ],
      [
        'after the manager’s part',
        [putAside, removeIndices, () => rmSync(installation.paths.manager.directory, { recursive: true })],
      ],
    ] as const) {
      it(`${where}: nothing starts or is made anew, and a repetition ends it`, async () => {
        for (const step of steps) await step();
        const up = await installation.ctl('up');
        assert.equal(up.code, 1, up.stderr);
        if (existsSync(unfinished())) {
          const init = await installation.ctl('init', '--tpm', `unix:${chipOf(installation).socket}`);
          assert.equal(init.code, 1);
          assert.match(init.stderr, /vtpmctl uninstall/);
        }
        await uninstall(installation, '--evict');
        assert.deepEqual((await kept(chipOf(installation))).nv, []);
        assert.equal(existsSync(installation.home), false);
        const again = await installation.ctl('uninstall', '--yes');
        assert.equal(again.code, 1);
        assert.match(again.stderr, /there is no installation/);
      });
    }
  });
});

describe('an init that fails after the enrolment', function () {
  this.timeout(120_000);
  let directory: string;
  let chip: Swtpm;
  beforeEach(async () => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-init-'));
    chip = await startSwtpm();
  });
  afterEach(async () => {
    await chip.stop();
    rmSync(directory, { recursive: true, force: true });
  });

  const home = () => join(directory, 'h');
  const ctl = (args: string[], env: NodeJS.ProcessEnv = {}) =>
    run(process.execPath, [join(REPOSITORY, 'toolstack/bin/vtpmctl.js'), '--home', home(), ...args], env);
  /** A bwrap that does something else: the store process is started right after the enrolment. */
  function sabotage(script: string): NodeJS.ProcessEnv {
    const bin = join(directory, 'bin');
    mkdirSync(bin);
    writeFileSync(join(bin, 'bwrap'), `#!/bin/sh\n${script}\n`);
    chmodSync(join(bin, 'bwrap'), 0o755);
    return { PATH: `${bin}:${process.env.PATH}` };
  }

  it('takes its NV index and its storage root key out of the TPM again', async () => {
    const init = ['init', '--tpm', `unix:${chip.socket}`];
    const { code } = await ctl(init, sabotage('exit 1'));
    assert.equal(code, 1);
    assert.deepEqual(await kept(chip), EMPTY);
    // Nothing of it is in the way of the next one, which does leave both in the TPM.
    assert.equal((await ctl(init)).code, 0);
    const made = await kept(chip);
    assert.deepEqual([made.persistent.length, made.nv.length], [1, 3]);
  });

  it('that is killed there is cleaned up by uninstall', async () => {
    const init = ['init', '--tpm', `unix:${chip.socket}`];
    const { code, stderr } = await ctl(init, sabotage('kill -9 $PPID'));
    assert.equal(code, 1, stderr);
    assert.equal((await kept(chip)).nv.length, 3);
    assert.match(readFileSync(join(home(), 'manager/enrolment.json.unfinished'), 'utf8'), /nvHandle/);
    assert.match((await ctl(init)).stderr, /vtpmctl uninstall/);
    const uninstalled = await ctl(['uninstall', '--evict', '--yes']);
    assert.equal(uninstalled.code, 0, uninstalled.stderr);
    assert.deepEqual(await kept(chip), EMPTY);
    assert.equal((await ctl(init)).code, 0);
  });
});
