import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  type Codec,
  ContextLoad,
  ContextSave,
  decode,
  encode,
  flush,
  Ht,
  listHandles,
  type ObjectEntity,
  objectEntity,
  type Tpm,
} from 'tpm2-ts-bindings';
import { cleanEnvironment, type Finished } from './installation.js';
import { type Swtpm, startSwtpm } from './swtpm.js';
import { assertNothingLeaked, connectTpm } from './tpm-fixture.js';
import { readContextFile, writeContextFile } from './tpm2-tools-files.js';

/**
 * tpm2-tools on a software TPM. That serves one client at a time: the tools, or the client that `direct` gives for as
 * long as its body runs.
 */
export class Tpm2Tools {
  readonly #directory = mkdtempSync(join(tmpdir(), 'vtpm-tools-'));
  private constructor(private readonly swtpm: Swtpm) {}

  static async start(): Promise<Tpm2Tools> {
    return new Tpm2Tools(await startSwtpm());
  }

  /** Checks that the tests flushed what they had. */
  async stop(): Promise<void> {
    try {
      await this.direct(assertNothingLeaked);
    } finally {
      await this.swtpm.stop();
      rmSync(this.#directory, { recursive: true, force: true });
    }
  }

  /** Runs one tool that has to succeed. @param line words with single spaces between; files are of this object. */
  async run(line: string): Promise<string> {
    const { code, stdout, stderr } = await this.#attempt(line);
    assert.equal(code, 0, `${line}: ${stderr}`);
    return stdout;
  }

  /** Runs one tool that has to fail with this text. */
  async refused(line: string, text: RegExp): Promise<void> {
    const { code, stderr } = await this.#attempt(line);
    assert.notEqual(code, 0, `${line} was not refused`);
    assert.match(stderr, text, `${line}: ${stderr}`);
  }

  /** Runs `body` with a session for the tools in `session.ctx`. @param options of startauthsession */
  async inSession(options: string, body: () => Promise<void>): Promise<void> {
    await this.run(`tpm2_startauthsession -S session.ctx${options === '' ? '' : ` ${options}`}`);
    try {
      await body();
    } finally {
      await this.#sweep(Ht.POLICY_SESSION);
    }
  }

  async direct<T>(body: (tpm: Tpm) => Promise<T>): Promise<T> {
    const tpm = await connectTpm(this.swtpm.socket);
    try {
      return await body(tpm);
    } finally {
      await tpm.close();
    }
  }

  /** Loads with this package the context that a tool wrote, for `body`. */
  async withContext<T>(tpm: Tpm, name: string, body: (object: ObjectEntity) => Promise<T>): Promise<T> {
    const { context, publicArea } = readContextFile(this.bytes(name));
    const { loadedHandle } = await tpm.run(ContextLoad, {}, { context });
    try {
      return await body(objectEntity(loadedHandle, publicArea));
    } finally {
      await flush(tpm, loadedHandle);
    }
  }

  /** Saves with this package a context for the tools. */
  async saveContext(tpm: Tpm, object: ObjectEntity, name: string): Promise<void> {
    const { context } = await tpm.run(ContextSave, { saveHandle: object }, {});
    this.write(name, writeContextFile(context, object));
  }

  bytes(name: string): Buffer {
    return readFileSync(join(this.#directory, name));
  }

  read<T>(name: string, codec: Codec<T>): T {
    return decode(codec, this.bytes(name), name);
  }

  write(name: string, bytes: Uint8Array | string): void {
    writeFileSync(join(this.#directory, name), bytes);
  }

  writeAs<T>(name: string, codec: Codec<T>, value: T): void {
    this.write(name, encode(codec, value));
  }

  async #attempt(line: string): Promise<Finished> {
    const [program = '', ...parameters] = line.split(' ');
    const finished = await new Promise<Finished>((resolve) => {
      const options = {
        cwd: this.#directory,
        env: cleanEnvironment({ TPM2TOOLS_TCTI: `swtpm:path=${this.swtpm.socket}`, TSS2_LOG: 'all+none' }),
      };
      const child = execFile(program, parameters, options, (_, stdout, stderr) =>
        resolve({ code: child.exitCode, stdout, stderr }),
      );
    });
    // The tools leave what they loaded to a resource manager, and there is none.
    await this.#sweep(Ht.TRANSIENT, Ht.HMAC_SESSION);
    return finished;
  }

  /** @param types a list of HMAC sessions has all that are loaded, one of policy sessions all that are saved */
  #sweep(...types: number[]): Promise<void> {
    return this.direct(async (tpm) => {
      for (const type of types) for (const handle of await listHandles(tpm, type)) await flush(tpm, handle);
    });
  }
}

/** Gives the suite that calls it the tools with a TPM of their own. */
export function withSuiteTools(use: (tools: Tpm2Tools) => void): void {
  let tools: Tpm2Tools;
  before(async () => {
    tools = await Tpm2Tools.start();
    use(tools);
  });
  after(() => tools.stop());
}

/** A copy with one bit changed. @param at the last byte unless given */
export function flip(bytes: Buffer, at = bytes.length - 1): Buffer {
  const out = Buffer.from(bytes);
  out[at] = (out[at] ?? 0) ^ 1;
  return out;
}
