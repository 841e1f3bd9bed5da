import { existsSync, readdirSync, readFileSync } from 'node:fs';

/** What this host's firmware and boot loader say of themselves; part of how PCR values are to be read. */
export interface Machine {
  readonly isEfi: boolean;
  /** undefined: not known. */
  readonly isSecureBoot: boolean | undefined;
  /** A unified kernel image booted: systemd-stub measures into PCR 11, 12 and 13. */
  readonly hasSystemdStub: boolean;
}

const VARIABLES = '/sys/firmware/efi/efivars';

export function readMachine(variables = VARIABLES): Machine {
  const names = existsSync(variables) ? readdirSync(variables) : [];
  const secureBoot = names.find((name) => name.startsWith('SecureBoot-'));
  return {
    isEfi: names.length > 0 || existsSync('/sys/firmware/efi'),
    isSecureBoot: secureBoot === undefined ? undefined : flag(`${variables}/${secureBoot}`),
    hasSystemdStub: names.some((name) => name.startsWith('StubInfo-')),
  };
}

/** Four bytes of attributes come first (efivarfs). */
function flag(path: string): boolean | undefined {
  try {
    return readFileSync(path)[4] === 1;
  } catch {
    return undefined;
  }
}
