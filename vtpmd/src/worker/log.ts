import { writeSync } from 'node:fs';

const LEVELS = { debug: 20, info: 30, warn: 40, error: 50 } as const;

export type Log = (level: keyof typeof LEVELS, message: string, fields?: Record<string, unknown>) => void;

/** Log lines on standard error in the shape of the other programs' JSON logs, without their logger's memory. */
export function createWorkerLog(name: string, least: keyof typeof LEVELS = 'info'): Log {
  return (level, message, fields) => {
    if (LEVELS[level] < LEVELS[least]) return;
    const line = { level: LEVELS[level], time: Date.now(), name, pid: process.pid, ...fields, msg: message };
    try {
      writeSync(2, `${JSON.stringify(line)}\n`);
    } catch {
      // Nobody reads the log, or not fast enough: the TPM goes on.
    }
  };
}
