/** Why files cannot be written: the disk is full, or the path is read-only or somebody else's. */
export interface FileSystemFailure {
  readonly code: 'store-full' | 'home-unwritable';
  /** Says what to do. */
  readonly message: string;
}

/** What a disk that is full, read-only or not ours answers to opening, making and removing files. @param user whose files they are */
export function fileSystemFailure(unknown: unknown, user: string): FileSystemFailure | undefined {
  if (!(unknown instanceof Error)) return undefined;
  const { code, path, syscall, message } = unknown as NodeJS.ErrnoException;
  if (code === 'ENOSPC' || code === 'EDQUOT') {
    return {
      code: 'store-full',
      message: `${path ?? 'a file'} cannot be written: its disk is full; make room`,
    };
  }
  const isRefused = code === 'EROFS' || code === 'EACCES' || code === 'EPERM';
  // Of a socket these say who may connect, not what may be written.
  if (path === undefined || syscall === 'connect' || !isRefused) return undefined;
  return {
    code: 'home-unwritable',
    message: `${path} cannot be written (${message}): mount it writable, and see that it belongs to ${user}`,
  };
}
