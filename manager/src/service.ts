import { barrier, type Logger, type Paths, shortageText, spaceShortage } from 'vtpm-common';
import { type AuditKeys, type AuditLog, openAuditLog } from './audit/index.js';
import { BackupControl } from './backup/control.js';
import { Erasure } from './erasure.js';
import { ManagerError } from './error.js';
import type { KeyHierarchy } from './keys/index.js';
import type { AttestorParts } from './migration/attestor.js';
import type { MigrationControl } from './migration/control.js';
import { openMigrations } from './migration/open.js';
import { Census } from './ownership/census.js';
import { VtpmRegistry } from './ownership/registry.js';
import type { PeerAddress } from './peer/address.js';
import { PeerControl } from './peer/control.js';
import type { RescueControl } from './rescue/control.js';
import type { RescueMessenger } from './rescue/messenger.js';
import { openRescues } from './rescue/open.js';
import type { AnchorCounter } from './root-tpm/index.js';
import { type AnchorState, openAnchoredStore, openLmdbStore } from './store/index.js';
import { openTrustStore, type TrustStore } from './trust/trust-configuration.js';

/** Records of one commit, so that saves find room between them. */
const REKEY_PAGE = 32;

/** What the manager does while it is unlocked and its store is in order. */
export interface Service {
  readonly registry: VtpmRegistry;
  readonly trust: TrustStore;
  readonly audit: AuditLog;
  readonly erasure: Erasure;
  readonly backup: BackupControl;
  readonly rescues: RescueControl;
  /** Between this host and others about what was rescued. */
  readonly messenger: RescueMessenger;
  readonly migrations: MigrationControl;
  readonly peers: PeerControl;
  /**
   * Puts everything in the store under the current generation of the root key, beside what else goes on. Can be repeated.
   * @param isOver asked now and then whether to stop
   */
  rekey(isOver: () => boolean): Promise<void>;
  /** Resolves when the TPM has counted what was written so far. */
  count(): Promise<void>;
  readonly storeState: {
    readonly records: number;
    readonly treeBytes: number;
    readonly anchoring: AnchorState;
  };
  /** What the store on the disk may be, for `openService` after it was lost; final once `close` has resolved. */
  readonly storeRoots: readonly Buffer[];
  /** Nobody waits for a TPM that does not answer any more: the service is about to be closed. */
  stopWaiting(): void;
  /** Ends the streams with `error`, then closes the store. */
  close(error?: ManagerError): Promise<void>;
}

export interface ServiceOptions {
  readonly paths: Paths['manager'];
  readonly log: Logger;
  readonly storeSandbox: boolean;
  /** MiB of its file system below which no new vTPM is made. */
  readonly storeReserve: number;
  readonly counter: AnchorCounter;
  /** Where other hosts are listened for. */
  readonly peerAddresses: readonly PeerAddress[];
  /** Seconds until the TPM counts saves that nobody waits for. */
  readonly anchorWindow: number;
  /** What this host's chip says of it to others. */
  readonly chip: Omit<AttestorParts, 'trust'>;
  /** `storeRoots` of the service before, where this process has had one: an older store is refused then. */
  readonly storeRoots: readonly Buffer[] | undefined;
  /** The store process ended unasked, or the store is not what was written: the service is of no use any more. */
  onLost(error: ManagerError): void;
}

/** @throws ManagerError `store-missing`, `store-corrupt`, `rollback-detected`, `newer-format` */
export async function openService(keys: KeyHierarchy, options: ServiceOptions): Promise<Service> {
  const raw = await openLmdbStore({
    directory: options.paths.store,
    create: false,
    sandbox: options.storeSandbox,
    log: options.log,
    onLost: options.onLost,
  });
  let audit: AuditLog | undefined;
  try {
    const census = new Census();
    const store = await openAnchoredStore(
      raw,
      {
        keys,
        counter: options.counter,
        windowMs: options.anchorWindow * 1000,
        log: options.log,
        // Nothing is written before the log is open.
        auditHead: () => (audit as AuditLog).head,
        onEntry: (entry) => census.take(entry),
        onBroken: options.onLost,
      },
      options.storeRoots,
    );
    const opened = await openAuditLog(options.paths.audit, auditKeys(keys), store.auditAtOpen, {
      // An entry that no commit follows is counted with the window too: until then it can be cut off.
      onWritten: () => store.noteChange(),
    });
    audit = opened.log;
    if (opened.unanchored > 0n) {
      options.log.warn(
        { entries: Number(opened.unanchored) },
        'the newest entries of the audit log are of changes that may not have happened: the manager was ended between',
      );
    }
    if (opened.wasTorn) {
      options.log.warn(
        'the end of the audit log was an entry that was being written when the manager ended; it was cut off',
      );
    }
    const log = audit;
    if (store.isUnclean) {
      const message =
        'the TPM lost power with an orderly counter: whether the store is the newest of the block that was counted last cannot be told';
      options.log.warn(message);
      const reason = { code: 'unclean', message };
      await audit.append({ actor: 'manager', action: 'unclean', verdict: 'done', reason });
      await store.count();
    }
    const erasure = await Erasure.open(store);
    const trust = await openTrustStore(keys, store);
    const registry = new VtpmRegistry({
      keys,
      store,
      trust,
      audit,
      erasure,
      census,
      checkRoom: () => checkRoom(options.paths.store, options.storeReserve),
    });
    const { rescues, messenger } = openRescues({ keys, trust, registry, audit: log, log: options.log });
    const migrations = openMigrations({
      keys,
      trust,
      registry,
      rescues,
      audit: log,
      checkRoom: () => checkRoom(options.paths.store, options.storeReserve),
      options,
    });
    await migrations.start();
    const peers = await PeerControl.open({
      keys,
      trust,
      audit: log,
      log: options.log,
      ...options.chip,
      addresses: options.peerAddresses,
      exchange: (channel) => migrations.exchange(channel),
      checkNotNeeded: (peer) => migrations.checkNotNeeded(peer),
    });
    return {
      registry,
      trust,
      peers,
      audit: log,
      erasure,
      migrations,
      rescues,
      messenger,
      backup: new BackupControl({ paths: options.paths, keys, store, registry, audit: log }),
      rekey: async (isOver) => {
        const { keyId: id, auditKey: key } = keys.current;
        await log.withKey({ id, key });
        // A Load that began before may still write a new record under the generation before, which no page below has.
        await registry.settled();
        for (let after: string | undefined; !isOver(); ) {
          const page = registry.list(after, REKEY_PAGE);
          after = page.at(-1);
          if (after === undefined) break;
          await Promise.all(page.map((id) => registry.rekey(id)));
          barrier('rotation.page');
        }
        await registry.arrivals.rekey();
        await trust.rekey();
      },
      count: () => store.count(),
      get storeState() {
        const { size, treeBytes, anchoring } = store;
        return { records: size, treeBytes, anchoring };
      },
      get storeRoots() {
        return store.roots;
      },
      stopWaiting: () => store.stopWaiting(),
      close: async (error) => {
        store.stopWaiting();
        await messenger.close();
        await migrations.close();
        await peers.close();
        await registry.close(error);
        await store.close();
        await log.close();
      },
    };
  } catch (error) {
    const reason = ManagerError.from(error);
    await audit
      ?.append({ actor: 'manager', action: 'start', verdict: 'refused', reason })
      .catch(() => undefined);
    await audit?.close();
    await raw.close();
    throw error;
  }
}

/** Entries are under the newest generation, or the one before where a rotation is under way. */
export function auditKeys(keys: KeyHierarchy): AuditKeys {
  const [current, other] = keys.generations.map(({ keyId: id, auditKey: key }) => ({ id, key }));
  if (!current) throw new ManagerError('internal', 'there is no generation of the root key');
  return { current, ...(other && { other }) };
}

/** @throws ManagerError `store-full` */
function checkRoom(store: string, reserveMiB: number): void {
  const shortage = spaceShortage(store, reserveMiB);
  if (shortage) throw new ManagerError('store-full', `no new vTPM is made: ${shortageText(shortage)}`);
}
