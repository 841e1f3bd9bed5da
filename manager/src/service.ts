import { type Logger, type Paths, shortageText, spaceShortage } from 'vtpm-common';
import { ManagerError } from './error.js';
import type { KeyHierarchy } from './keys/index.js';
import { VtpmRegistry } from './ownership/registry.js';
import { openAnchoredStore, openLmdbStore } from './store/index.js';
import { openTrustStore, type TrustStore } from './trust/trust-configuration.js';

/** What the manager does while it is unlocked and its store is in order. */
export interface Service {
  readonly registry: VtpmRegistry;
  readonly trust: TrustStore;
  /** What the store on the disk may be, for `openService` after it was lost; final once `close` has resolved. */
  readonly storeRoots: readonly Buffer[];
  /** Ends the streams with `error`, then closes the store. */
  close(error?: ManagerError): Promise<void>;
}

export interface ServiceOptions {
  readonly paths: Paths['manager'];
  readonly log: Logger;
  readonly storeSandbox: boolean;
  /** MiB of its file system below which no new vTPM is made. */
  readonly storeReserve: number;
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
  try {
    const store = await openAnchoredStore(raw, keys, options.storeRoots, options.onLost);
    const trust = await openTrustStore(keys, store);
    const registry = new VtpmRegistry({
      keys,
      store,
      trust,
      checkRoom: () => checkRoom(options.paths.store, options.storeReserve),
    });
    return {
      registry,
      trust,
      get storeRoots() {
        return store.roots;
      },
      close: async (error) => {
        await registry.close(error);
        await store.close();
      },
    };
  } catch (error) {
    await raw.close();
    throw error;
  }
}

/** @throws ManagerError `store-full` */
function checkRoom(store: string, reserveMiB: number): void {
  const shortage = spaceShortage(store, reserveMiB);
  if (shortage) throw new ManagerError('store-full', `no new vTPM is made: ${shortageText(shortage)}`);
}
