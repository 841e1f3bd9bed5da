import type { DaemonClient } from './http.js';

/** A register selection and the digest over its values. */
export interface PlatformName {
  readonly pcrSelection: string;
  /** 64 hex digits. */
  readonly pcrDigest: string;
}

/** This host, as others see it. */
export interface OwnIdentity {
  /** The file for other hosts: one line. */
  readonly identity: string;
  readonly hostId: string;
  readonly tlsKey: string;
  readonly endorsement: { readonly fingerprint: string; readonly isCertified: boolean };
  readonly tpm: { readonly kind: string; readonly manufacturer: string };
  readonly platform: PlatformName & { readonly pcrs: Readonly<Record<string, string>> };
  readonly listening: readonly { readonly address: string; readonly failure: string | null }[];
}

/** Another host, as it is enrolled here. Times are ISO 8601, UTC. */
export interface ManagerPeer {
  readonly name: string;
  /** 64 hex digits. */
  readonly hostId: string;
  readonly tlsKey: string;
  readonly addresses: readonly string[];
  readonly endorsement: { readonly fingerprint: string; readonly by: string };
  /** Since when its attestation key is known to be in its TPM; null: not yet. */
  readonly provenAt: string | null;
  readonly platforms: readonly (PlatformName & { readonly approvedAt: string | null })[];
  /** PEM. */
  readonly authority: string | null;
  readonly maySend: boolean;
  readonly mayReceive: boolean;
  readonly addedAt: string | null;
}

export interface NewPeer {
  readonly name: string;
  readonly identity: string;
  readonly ekCa?: string;
  readonly ekFingerprint?: string;
  readonly addresses: readonly string[];
  readonly approveCurrent: boolean;
  readonly authority?: string;
  readonly maySend: boolean;
  readonly mayReceive: boolean;
}

/** What is left out stays. */
export interface PeerChange {
  readonly addresses?: readonly string[];
  readonly authority?: string | null;
  readonly maySend?: boolean;
  readonly mayReceive?: boolean;
  readonly identity?: string;
  readonly approve?: readonly PlatformName[];
  readonly withdraw?: readonly PlatformName[];
}

/** The first identity makes a key in the TPM. */
const IDENTITY_TIMEOUT_MS = 120_000;

/** The calls of the manager's admin plane on other hosts. Errors as in DaemonClient. */
export class PeerApi {
  readonly #client: DaemonClient;
  constructor(client: DaemonClient) {
    this.#client = client;
  }

  identity(): Promise<OwnIdentity> {
    return this.#client.call('GET', '/identity', { timeout: IDENTITY_TIMEOUT_MS });
  }

  async list(): Promise<readonly ManagerPeer[]> {
    return (await this.#client.call<{ peers: ManagerPeer[] }>('GET', '/peers')).peers;
  }

  add(peer: NewPeer): Promise<ManagerPeer> {
    return this.#client.call('POST', '/peers', { body: peer });
  }

  change(name: string, change: PeerChange): Promise<ManagerPeer> {
    return this.#client.call('PATCH', `/peers/${encodeURIComponent(name)}`, { body: change });
  }

  async remove(name: string): Promise<void> {
    await this.#client.call('DELETE', `/peers/${encodeURIComponent(name)}`);
  }
}
