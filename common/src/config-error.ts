/** A setting, or a path that follows from one, that cannot be used. The message names it and says what to do. */
export class ConfigError extends Error {
  override readonly name = 'ConfigError';
}
