const PREFIX = 'vtpm/';

/** Under which a vTPM's record is in the store. @param id UUID, in lower case; '' is less than that of every vTPM */
export function vtpmKey(id: string): string {
  return PREFIX + id;
}

/** The vTPM whose record is under a key of the store; undefined where it is another kind of record. */
export function vtpmOfKey(key: string): string | undefined {
  return key.startsWith(PREFIX) ? key.slice(PREFIX.length) : undefined;
}
