import { fileSystemFailure } from 'vtpm-common';

/**
 * Why the supervisor or vtpmctl refuses or fails. The code travels in the supervisor's answers
 * (`{error: {code, message}}`) and decides vtpmctl's exit status.
 */
export type ToolstackErrorCode =
  // What was asked
  | 'usage'
  | 'bad-request'
  | 'unknown-vtpm'
  | 'name-taken'
  | 'not-stopped'
  | 'busy'
  // State of the installation
  | 'not-initialised'
  | 'already-initialised'
  | 'not-running'
  | 'already-running'
  | 'in-use'
  | 'corrupt'
  | 'newer-format'
  | 'missing-package'
  | 'layer-missing'
  | 'store-full'
  // The drop-in commands
  | 'not-permitted'
  | 'token-refused'
  | 'home-unwritable'
  // Workers and the manager
  | 'worker-failed'
  | 'worker-late'
  | 'image-not-allowed'
  | 'image-changed'
  | 'upgrade-refused'
  | 'manager-unreachable'
  | 'manager-refused'
  | 'locked'
  | 'vtpms-exist'
  // Migration
  | 'unknown-peer'
  | 'unknown-migration'
  | 'in-doubt'
  | 'migrating'
  | 'moved'
  | 'migration-refused'
  | 'migration-aborted'
  | 'not-fenced'
  | 'internal';

const CODES: ReadonlySet<string> = new Set<ToolstackErrorCode>([
  'usage',
  'bad-request',
  'unknown-vtpm',
  'name-taken',
  'not-stopped',
  'busy',
  'not-initialised',
  'already-initialised',
  'not-running',
  'already-running',
  'in-use',
  'corrupt',
  'newer-format',
  'missing-package',
  'layer-missing',
  'store-full',
  'not-permitted',
  'token-refused',
  'home-unwritable',
  'worker-failed',
  'worker-late',
  'image-not-allowed',
  'image-changed',
  'upgrade-refused',
  'manager-unreachable',
  'manager-refused',
  'locked',
  'vtpms-exist',
  'unknown-peer',
  'unknown-migration',
  'in-doubt',
  'migrating',
  'moved',
  'migration-refused',
  'migration-aborted',
  'not-fenced',
  'internal',
]);

/** The one error class of the toolstack. The message is a sentence that says what to do; it holds no secret. */
export class ToolstackError extends Error {
  override readonly name = 'ToolstackError';
  constructor(
    readonly code: ToolstackErrorCode,
    message: string,
    options?: { cause?: unknown },
  ) {
    super(message, options);
  }

  /** Anything caught, as a ToolstackError. */
  static from(unknown: unknown, context = 'unexpected failure'): ToolstackError {
    if (unknown instanceof ToolstackError) return unknown;
    const failure = fileSystemFailure(unknown, "the supervisor's user");
    if (failure) return new ToolstackError(failure.code, failure.message, { cause: unknown });
    return new ToolstackError(
      'internal',
      `${context}: ${unknown instanceof Error ? unknown.message : String(unknown)}`,
      { cause: unknown },
    );
  }
}

/** Whether a code read from the wire is one of ours. */
export function isToolstackErrorCode(code: unknown): code is ToolstackErrorCode {
  return typeof code === 'string' && CODES.has(code);
}
