/** A file or directory of an archive; names without a leading `/`, a directory before what is in it. */
export interface ArchiveEntry {
  readonly name: string;
  /** Absent: a directory. */
  readonly content?: Uint8Array;
  readonly executable?: boolean;
}

const DIRECTORY = 0o40755;
const FILE = 0o100444;
const PROGRAM = 0o100555;
const END = 'TRAILER!!!';

/** An archive as the kernel unpacks it for its initramfs: cpio's "newc" format (cpio(5)), owned by root, without times. */
export function cpioArchive(entries: readonly ArchiveEntry[]): Buffer {
  const parts = entries.flatMap(({ name, content, executable }, index) =>
    item(name, index + 1, content ? (executable ? PROGRAM : FILE) : DIRECTORY, content ?? EMPTY),
  );
  return Buffer.concat([...parts, ...item(END, 0, 0, EMPTY)]);
}

function item(name: string, inode: number, mode: number, content: Uint8Array): Uint8Array[] {
  const links = 1;
  const nameBytes = Buffer.byteLength(name) + 1;
  const fields = [inode, mode, 0, 0, links, 0, content.length, 0, 0, 0, 0, nameBytes, 0];
  const header = `070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}${name}\0`;
  return [padded(Buffer.from(header)), padded(content)];
}

/** To the next multiple of four bytes. */
function padded(bytes: Uint8Array): Uint8Array {
  const missing = (4 - (bytes.length % 4)) % 4;
  return missing === 0 ? bytes : Buffer.concat([bytes, Buffer.alloc(missing)]);
}

const EMPTY = Buffer.alloc(0);
