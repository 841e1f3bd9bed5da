import { type Logger, pino } from 'pino';
import pretty from 'pino-pretty';
import type { Settings } from './config.js';

export type { Logger };

/** A logger on standard error. Callers never hand it keys, seeds, states or command bodies. */
export function createLogger(name: string, settings: Pick<Settings, 'log-level' | 'log-format'>): Logger {
  const isPretty =
    settings['log-format'] === 'pretty' ||
    (settings['log-format'] === 'auto' && process.stderr.isTTY === true);
  // Synchronous: the last line before a crash is the one that matters.
  const stream = isPretty
    ? pretty({
        destination: 2,
        sync: true,
        colorize: process.stderr.isTTY === true,
        ignore: 'pid,hostname',
        translateTime: 'SYS:HH:MM:ss',
      })
    : pino.destination({ dest: 2, sync: true });
  return pino({ name, level: settings['log-level'], base: { name, pid: process.pid } }, stream);
}
