import { HANDOVER_FLAG } from './names.js';

/** What an operator or a service manager sends to a supervisor. */
export type SupervisorSignal = 'SIGTERM' | 'SIGINT' | 'SIGHUP';

const SIGNALS: readonly SupervisorSignal[] = ['SIGTERM', 'SIGINT', 'SIGHUP'];
const came = new Set<NodeJS.Signals>();
const note = (signal: NodeJS.Signals): void => void came.add(signal);

// A program that takes over has workers from its first moment: to be ended by a signal would end them without a last save.
// Loaded before everything else. One that starts afresh has none, and ends.
if (process.argv.includes(HANDOVER_FLAG)) for (const signal of SIGNALS) process.on(signal, note);

/** From now on `handlers` take the signals, and those that came already. */
export function takeSignals(handlers: Readonly<Record<SupervisorSignal, () => void>>): void {
  for (const signal of SIGNALS) {
    process.on(signal, handlers[signal]);
    process.off(signal, note);
    if (came.delete(signal)) handlers[signal]();
  }
}
