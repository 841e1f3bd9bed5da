import { randomInt } from 'node:crypto';
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import type { DiskCall, Moment } from './disk-trace.js';

type Edit = { readonly offset: number; readonly data: Buffer } | { readonly size: number };

/** The content of a file: what is durable, and what was written since. */
class FileContent {
  pending: Edit[] = [];

  constructor(
    public durable: Buffer,
    public size = durable.length,
  ) {}
}

interface NameChange {
  readonly directories: readonly string[];
  apply(names: Map<string, FileContent>): void;
}

/** What a loss of power leaves of the writes that no sync covers. */
export const LOSSES = ['nothing', 'everything', 'prefix', 'sectors', 'pages'] as const;
export type Loss = (typeof LOSSES)[number];

/** A directory on a disk with a cache, which does what a trace says. */
export class LossyDisk {
  readonly #live = new Map<string, FileContent>();
  readonly #names = new Map<string, FileContent>();
  #changes: NameChange[] = [];
  /** What a sync that is under way will have made durable. */
  readonly #syncs = new Map<
    DiskCall,
    { readonly edits: readonly Edit[]; readonly changes: readonly NameChange[] }
  >();
  readonly #writes = new Map<DiskCall, Edit>();

  /** @param directory as it is now, all of it durable; only plain files and directories */
  constructor(private readonly directory: string) {
    for (const entry of readdirSync(directory, { recursive: true, withFileTypes: true })) {
      if (!entry.isFile()) continue;
      const path = join(entry.parentPath, entry.name);
      const file = new FileContent(readFileSync(path));
      this.#live.set(path, file);
      this.#names.set(path, file);
    }
  }

  apply({ call, isBegin }: Moment): void {
    if (call.kind === 'sync') {
      if (isBegin) this.#beginSync(call);
      else this.#endSync(call);
    } else if (call.kind === 'write') {
      if (isBegin) this.#beginWrite(call);
      else if (call.isSynced) this.#keep(this.#file(call.path), [this.#writes.get(call)]);
    } else if (isBegin) {
      this.#change(call);
    }
  }

  /** Puts the directory as it may be found after a loss of power in the place of the one that is there. */
  writeImage(loss: Loss): void {
    const names = new Map(this.#names);
    const kept = loss === 'prefix' ? randomInt(this.#changes.length + 1) : Number.POSITIVE_INFINITY;
    for (const [i, change] of this.#changes.entries()) {
      if (survives(loss, i, kept)) change.apply(names);
    }
    rmSync(this.directory, { recursive: true });
    mkdirSync(this.directory, { mode: 0o700 });
    for (const [path, file] of names) {
      mkdirSync(dirname(path), { recursive: true, mode: 0o700 });
      writeFileSync(path, contentAfter(file, loss), { mode: 0o600 });
    }
  }

  #beginWrite(call: DiskCall & { kind: 'write' }): void {
    const file = this.#file(call.path);
    const offset = call.offset === 'end' ? file.size : call.offset;
    const edit = { offset, data: call.data };
    file.size = Math.max(file.size, offset + call.data.length);
    file.pending.push(edit);
    this.#writes.set(call, edit);
  }

  #beginSync(call: DiskCall): void {
    this.#syncs.set(call, {
      edits: [...(this.#live.get(call.path)?.pending ?? [])],
      changes: this.#changes.filter(({ directories }) => directories.includes(call.path)),
    });
  }

  #endSync(call: DiskCall): void {
    const { edits = [], changes = [] } = this.#syncs.get(call) ?? {};
    this.#syncs.delete(call);
    const file = this.#live.get(call.path);
    if (file) this.#keep(file, edits);
    for (const change of changes) change.apply(this.#names);
    this.#changes = this.#changes.filter((change) => !changes.includes(change));
  }

  #keep(file: FileContent, edits: readonly (Edit | undefined)[]): void {
    for (const edit of edits)
      if (edit && file.pending.includes(edit)) file.durable = edited(file.durable, edit);
    file.pending = file.pending.filter((edit) => !edits.includes(edit));
  }

  #change(call: DiskCall): void {
    const { path } = call;
    if (call.kind === 'truncate' || (call.kind === 'open' && this.#live.has(path))) {
      if (call.kind === 'open' && !call.isEmptied) return;
      const file = this.#file(path);
      file.size = call.kind === 'truncate' ? call.size : 0;
      file.pending.push({ size: file.size });
    } else if (call.kind === 'open') {
      const file = new FileContent(Buffer.alloc(0));
      this.#changeNames([path], (names) => names.set(path, file));
    } else if (call.kind === 'rename') {
      const file = this.#file(path);
      const { to } = call;
      this.#changeNames([path, to], (names) => {
        names.delete(path);
        names.set(to, file);
      });
    } else if (this.#live.has(path)) {
      this.#changeNames([path], (names) => names.delete(path));
    }
  }

  #changeNames(paths: readonly string[], apply: NameChange['apply']): void {
    apply(this.#live);
    this.#changes.push({ directories: paths.map((path) => dirname(path)), apply });
  }

  #file(path: string): FileContent {
    const file = this.#live.get(path);
    if (!file) throw new Error(`the trace writes ${path}, which it did not make`);
    return file;
  }
}

function survives(loss: Loss, index: number, kept: number): boolean {
  if (loss === 'prefix') return index < kept;
  return loss === 'everything' ? false : loss === 'nothing' || randomInt(2) === 0;
}

const SECTOR = 512;
const PAGE = 4096;

function contentAfter({ durable, pending }: FileContent, loss: Loss): Buffer {
  let content = durable;
  const kept = loss === 'prefix' ? randomInt(pending.length + 1) : Number.POSITIVE_INFINITY;
  for (const [i, edit] of pending.entries()) {
    if ('size' in edit || loss === 'nothing') {
      if (survives(loss, i, kept)) content = edited(content, edit);
      continue;
    }
    // The write at the end of the prefix is torn.
    const bytes = i < kept ? edit.data.length : i === kept ? randomInt(edit.data.length + 1) : 0;
    if (loss === 'prefix') {
      if (bytes > 0) content = edited(content, { offset: edit.offset, data: edit.data.subarray(0, bytes) });
    } else if (loss !== 'everything') {
      for (const part of partsOf(edit, loss === 'pages' ? PAGE : SECTOR)) {
        if (randomInt(2) === 0) content = edited(content, part);
      }
    }
  }
  return content;
}

/** A write in the pieces that the disk writes as one. */
function* partsOf({ offset, data }: { offset: number; data: Buffer }, size: number) {
  for (let from = 0; from < data.length; ) {
    const to = Math.min(data.length, (Math.floor((offset + from) / size) + 1) * size - offset);
    yield { offset: offset + from, data: data.subarray(from, to) };
    from = to;
  }
}

function edited(content: Buffer, edit: Edit): Buffer {
  if ('size' in edit) {
    const cut = Buffer.alloc(edit.size);
    content.copy(cut);
    return cut;
  }
  const grown = Buffer.alloc(Math.max(content.length, edit.offset + edit.data.length));
  content.copy(grown);
  edit.data.copy(grown, edit.offset);
  return grown;
}
