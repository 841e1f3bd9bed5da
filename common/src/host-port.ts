import { isIP } from 'node:net';

export interface HostPort {
  /** An IPv4 or IPv6 address, or a host name. */
  readonly host: string;
  readonly port: number;
}

const FORM = /^(?:\[([^[\]]+)\]|([^:[\]]+)):(\d{1,5})$/;
/** RFC 1123 section 2.1. */
const HOST_NAME =
  /^(?=.{1,253}$)[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*$/;

/** `HOST:PORT`, an IPv6 address in brackets. @throws Error whose message says what such a text looks like */
export function parseHostPort(text: string): HostPort {
  const [, bracketed, plain, digits] = FORM.exec(text) ?? [];
  const port = Number(digits);
  const isHost =
    bracketed !== undefined
      ? isIP(bracketed) === 6
      : plain !== undefined && (isIP(plain) === 4 || (HOST_NAME.test(plain) && !/^[\d.]+$/.test(plain)));
  if (!isHost || port < 1 || port > 65_535) {
    throw new Error(
      `"${text.slice(0, 80)}" is no address; it is HOST:PORT, like 192.0.2.7:7799, [2001:db8::7]:7799 or host-b.example:7799`,
    );
  }
  return { host: bracketed ?? (plain as string), port };
}
