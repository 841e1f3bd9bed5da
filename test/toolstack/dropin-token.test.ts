import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import {
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { dropin } from 'vtpm-toolstack/cli/commands/dropin';
import type { Context } from 'vtpm-toolstack/cli/context';
import { resolvePlace } from 'vtpm-toolstack/dropin/state-place';
import { createToken, newSecret, readToken, removeToken } from 'vtpm-toolstack/dropin/token';
import { removeDirectory, temporaryDirectory } from './supervisor-fixture.js';

const STRANGER = 54321;
const HOOK = Symbol.for('vtpm.barrier');
const hooks = globalThis as { [HOOK]?: (name: string) => void };

describe('the token of the drop-in', () => {
  let home: string;
  let state: string;
  let victim: string;
  beforeEach(() => {
    home = temporaryDirectory();
    state = join(home, 'state');
    victim = join(home, 'victim');
    mkdirSync(state);
    writeFileSync(victim, 'kept', { mode: 0o644 });
  });
  afterEach(() => {
    delete hooks[HOOK];
    removeDirectory(home);
  });

  const token = () => ({ id: randomUUID(), vmUuid: randomUUID(), secret: newSecret() });

  /** As root, for that user. */
  function given(directory: string): Promise<void> {
    const vtpm = { ...token(), name: 'vm', doors: [] };
    const supervisor = { vtpm: async () => vtpm, change: async () => vtpm };
    const context = { supervisor, output: { result: () => undefined } } as unknown as Context;
    return dropin('vm', directory, { user: `${STRANGER}:${STRANGER}` }, context);
  }

  function isUntouched(): void {
    const { uid, mode } = statSync(victim);
    assert.deepEqual([uid, mode & 0o777, readFileSync(victim, 'utf8')], [0, 0o644, 'kept']);
  }

  it('is given to its user before it has its name: a link in its place gives nothing else away', async function () {
    if (process.getuid?.() !== 0) this.skip();
    const path = join(state, 'vtpm-manager.token');
    let uid: number | undefined;
    hooks[HOOK] = (name) => {
      if (name !== 'file.renamed') return;
      uid = statSync(path).uid;
      rmSync(path);
      symlinkSync(victim, path);
    };
    await given(state);
    assert.equal(uid, STRANGER);
    isUntouched();
  });

  it("goes into no file that is not its user's alone", async function () {
    if (process.getuid?.() !== 0) this.skip();
    const path = join(state, 'file');
    symlinkSync(victim, path);
    await assert.rejects(given(`file://${path}`), /belongs to user 0, not to 54321/);
    rmSync(path);
    linkSync(victim, path);
    await assert.rejects(given(`file://${path}`), /has other names/);
    isUntouched();
  });

  it('of two creations at one place the first one stays', () => {
    const place = resolvePlace({ path: state, isFile: false });
    const [first, second] = [token(), token()];
    createToken(place, first);
    assert.throws(() => createToken(place, second), { code: 'EEXIST' });
    removeToken(place, second);
    assert.deepEqual(readToken(place), first);
    assert.deepEqual(readdirSync(state), ['vtpm-manager.token']);
    removeToken(place, first);
    assert.equal(readToken(place), undefined);
  });
});
