import { isIP } from 'node:net';
import { ManagerError } from '../error.js';

export interface PeerAddress {
  /** An IPv4 or IPv6 address, or a host name. */
  readonly host: string;
  readonly port: number;
}

const FORM = /^(?:\[([^[\]]+)\]|([^:[\]]+)):(\d{1,5})$/;
/** RFC 1123 section 2.1. */
const HOST_NAME =
  /^(?=.{1,253}$)[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*$/;

/** `HOST:PORT`, an IPv6 address in brackets. @throws ManagerError `bad-request` */
export function parseAddress(text: string): PeerAddress {
  const [, bracketed, plain, digits] = FORM.exec(text) ?? [];
  const port = Number(digits);
  const isHost =
    bracketed !== undefined
      ? isIP(bracketed) === 6
      : plain !== undefined && (isIP(plain) === 4 || (HOST_NAME.test(plain) && !/^[\d.]+$/.test(plain)));
  if (!isHost || port < 1 || port > 65_535) {
    throw new ManagerError(
      'bad-request',
      `"${text.slice(0, 80)}" is no address; it is HOST:PORT, like 192.0.2.7:7799, [2001:db8::7]:7799 or host-b.example:7799`,
    );
  }
  return { host: bracketed ?? (plain as string), port };
}

/** @throws ManagerError `bad-request` */
export function checkAddress(text: string): void {
  parseAddress(text);
}

/** The addresses of a setting, with commas between them; none where it is empty. @throws ManagerError `bad-request` */
export function parseAddresses(text: string): PeerAddress[] {
  const parts = text
    .split(',')
    .map((part) => part.trim())
    .filter((part) => part !== '');
  return parts.map(parseAddress);
}

export function addressText({ host, port }: PeerAddress): string {
  return isIP(host) === 6 ? `[${host}]:${port}` : `${host}:${port}`;
}
