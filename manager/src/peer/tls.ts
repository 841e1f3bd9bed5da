import { constants, createHash } from 'node:crypto';
import type { SecureContextOptions, TLSSocket } from 'node:tls';
import { rawBytesOf } from 'vtpm-proto';
import type { TlsIdentity } from './certificate.js';

/** The one application protocol (RFC 7301) that peers speak. */
export const ALPN = 'h2';

/** TLS 1.3, Ed25519 certificates, and no resumption: each connection proves both keys anew. */
export function tlsOptions({ certificate, privateKey }: TlsIdentity): SecureContextOptions & {
  readonly ALPNProtocols: string[];
} {
  return {
    cert: certificate,
    key: privateKey,
    minVersion: 'TLSv1.3',
    maxVersion: 'TLSv1.3',
    sigalgs: 'ed25519',
    secureOptions: constants.SSL_OP_NO_TICKET,
    ALPNProtocols: [ALPN],
  };
}

/**
 * The key that the other end of a finished handshake has proven to have. Nothing else of its certificate is looked at.
 * @returns undefined where it proved none, or this is not the protocol of peers
 */
export function provenKey(socket: TLSSocket): Buffer | undefined {
  if (socket.getProtocol() !== 'TLSv1.3' || socket.alpnProtocol !== ALPN || socket.isSessionReused()) {
    return undefined;
  }
  const key = socket.getPeerX509Certificate()?.publicKey;
  if (key?.asymmetricKeyType !== 'ed25519') return undefined;
  return rawBytesOf(key);
}

/** SHA-256 over both keys: whose connection it is. 32 bytes. */
export function bindingOf(clientKey: Uint8Array, serverKey: Uint8Array): Buffer {
  return createHash('sha256').update(clientKey).update(serverKey).digest();
}
