import type { Localities } from '../channels/framing.js';
import type { CheckpointMemory } from '../checkpoint/memory.js';
import { isLocality, type Locality } from '../engine/engine.js';
import type { VmmState } from './actions.js';
import { ControlDoor, type ControlDoorParts } from './control-door.js';
import { DataChannel } from './data-channel.js';

/** What `vtpmctl show` says of a VMM. */
export interface VmmStatus {
  readonly connected: boolean;
  readonly power: 'on' | 'off';
  readonly bufferSize: number;
  readonly locality: number;
}

export interface VmmDoorsParts
  extends Omit<ControlDoorParts, 'data' | 'actions' | 'notes' | 'changed' | 'left'> {
  actions(vmm: VmmState, data: DataChannel): ControlDoorParts['actions'];
  /** Of the VM run. */
  readonly memory: CheckpointMemory;
  bufferSize(): number;
  /** Gives the supervisor a copy of what is to be the data channel. */
  offer(fd: number): void;
  /** As CommandQueue.dropGone. */
  dropGone(): void;
  status(status: VmmStatus): void;
}

/** A change of the locality with each command of a guest is not worth a message each. */
const STATUS_PAUSE_MS = 50;

/** Both connections of a VMM: the one that it controls the TPM by, and the one that commands come through. */
export class VmmDoors {
  readonly data: DataChannel;
  readonly control: ControlDoor;
  /** Commands run at the locality that the VMM has chosen, and at no other. */
  readonly localities: Localities;
  readonly #parts: VmmDoorsParts;
  readonly #vmm: VmmState;
  #told = '';
  #timer: NodeJS.Timeout | undefined;

  constructor(parts: VmmDoorsParts) {
    this.#parts = parts;
    const { memory } = parts;
    const vmm: VmmState = {
      // It outlives this worker: a VMM says it only when it changes.
      get locality(): Locality {
        return isLocality(memory.locality) ? memory.locality : 0;
      },
      set locality(locality) {
        memory.locality = locality;
      },
    };
    this.#vmm = vmm;
    this.localities = {
      get current(): Locality {
        return vmm.locality;
      },
      // A guest may write a frame itself, for example into the command buffer that QEMU hands on as it is.
      allows: (locality) => locality === vmm.locality,
    };
    this.data = new DataChannel(parts);
    this.control = new ControlDoor({
      ...parts,
      data: this.data,
      actions: parts.actions(vmm, this.data),
      notes: memory,
      changed: () => this.changed(),
      left: () => {
        vmm.locality = 0;
      },
    });
  }

  /** The TPM was powered on or off, or something else of the status may have changed. */
  changed(): void {
    // What changes meanwhile is told at the end of the pause.
    if (this.#timer || !this.#tell()) return;
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      this.changed();
    }, STATUS_PAUSE_MS);
  }

  /** @returns whether there was something new */
  #tell(): boolean {
    const status: VmmStatus = {
      connected: this.control.isConnected,
      power: this.#parts.isOn() ? 'on' : 'off',
      bufferSize: this.#parts.bufferSize(),
      locality: this.#vmm.locality,
    };
    const text = JSON.stringify(status);
    if (text === this.#told) return false;
    this.#told = text;
    this.#parts.status(status);
    return true;
  }

  /** Both connections are another worker's now. */
  release(): void {
    clearTimeout(this.#timer);
    this.control.release();
  }

  /** All connections of a worker before this one are opened: a data channel whose VMM is gone is not kept. */
  adopted(): void {
    if (!this.control.isConnected) this.data.close();
    this.changed();
  }
}
