import { isIP } from 'node:net';
import { type HostPort, parseHostPort } from 'vtpm-common';
import { ManagerError } from '../error.js';

export type PeerAddress = HostPort;

/** `HOST:PORT`, an IPv6 address in brackets. @throws ManagerError `bad-request` */
export function parseAddress(text: string): PeerAddress {
  try {
    return parseHostPort(text);
  } catch (cause) {
    throw new ManagerError('bad-request', (cause as Error).message, { cause });
  }
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
