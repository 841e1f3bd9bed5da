import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { connectGuest, type Guest } from 'vtpm-quickstart/guest';
import { type Installation, run } from './installation.js';

/** Files with both halves of what a VMM takes out. */
export interface HalfFiles {
  readonly permanent: string;
  readonly volatile: string;
}

/** swtpm's own client of the control protocol, as it is, for any control socket. */
export class SwtpmIoctl {
  readonly #directory = mkdtempSync(join(tmpdir(), 'vtpm-blobs-'));

  async tryTo(control: string, ...args: string[]): Promise<{ code: number | null; text: string }> {
    const { code, stdout, stderr } = await run('swtpm_ioctl', ['--unix', control, ...args]);
    return { code, text: stdout + stderr };
  }

  /** @throws AssertionError where it fails */
  async do(control: string, ...args: string[]): Promise<void> {
    const { code, text } = await this.tryTo(control, ...args);
    assert.equal(code, 0, `swtpm_ioctl ${args.join(' ')}: ${text}`);
  }

  files(name: string): HalfFiles {
    const directory = join(this.#directory, name);
    mkdirSync(directory, { recursive: true });
    return { permanent: join(directory, 'permanent'), volatile: join(directory, 'volatile') };
  }

  /** Each request of a taking-out, one by one. */
  takingOut(control: string, { permanent, volatile }: HalfFiles): (() => Promise<void>)[] {
    return [
      () => this.do(control, '--save', 'permanent', permanent),
      () => this.do(control, '--save', 'volatile', volatile),
    ];
  }

  /** Each request of a bringing-in, one by one. */
  bringingIn(control: string, { permanent, volatile }: HalfFiles): (() => Promise<void>)[] {
    return [
      () => this.do(control, '--stop'),
      () => this.do(control, '--load', 'permanent', permanent),
      () => this.do(control, '--load', 'volatile', volatile),
      () => this.do(control, '-i'),
    ];
  }

  async save(control: string, name: string): Promise<HalfFiles> {
    const files = this.files(name);
    for (const step of this.takingOut(control, files)) await step();
    return files;
  }

  async load(control: string, files: HalfFiles): Promise<void> {
    for (const step of this.bringingIn(control, files)) await step();
  }

  /** A power cycle. */
  async cycle(control: string): Promise<void> {
    await this.do(control, '--stop');
    await this.do(control, '-i');
  }

  close(): void {
    rmSync(this.#directory, { recursive: true, force: true });
  }
}

export function controlOf(installation: Installation, name: string): string {
  return join(installation.paths.supervisor.doors, name, 'control.sock');
}

export async function withGuest<T>(socket: string, act: (guest: Guest) => Promise<T>): Promise<T> {
  const guest = await connectGuest(socket);
  try {
    return await act(guest);
  } finally {
    await guest.close();
  }
}

/** What a guest knows its TPM by. */
export function seenBy(socket: string) {
  return withGuest(socket, async (guest) => ({
    endorsement: await guest.endorsement(),
    key: await guest.keyFingerprint(),
    counter: await guest.counter(),
    pcr: await guest.pcr(16),
  }));
}

/** A counter, a key and a measurement. */
export async function useTpm(socket: string): Promise<void> {
  await withGuest(socket, async (guest) => {
    await guest.defineCounter();
    await guest.makeKey();
    await guest.increment();
    await guest.extend(16, 'measured');
  });
}

/** What it is after a power cycle. */
export const NO_PCR = '0'.repeat(64);
