import { readFileSync } from 'node:fs';
import { cpus, release, totalmem } from 'node:os';
import type { Row } from './row.js';

export interface Machine {
  readonly cpu: string;
  readonly cores: number;
  readonly memoryGiB: number;
  readonly kernel: string;
  readonly node: string;
  readonly date: string;
  /** One-minute load average when the benchmark began: what else the machine did. */
  readonly loadBefore: number;
}

export function machine(): Machine {
  return {
    cpu: cpus()[0]?.model ?? 'unknown',
    cores: cpus().length,
    memoryGiB: Math.round(totalmem() / 2 ** 30),
    kernel: release(),
    node: process.version,
    date: new Date().toISOString(),
    loadBefore: Number(readFileSync('/proc/loadavg', 'utf8').split(' ')[0]),
  };
}

const WIDTHS = [38, 10, 10, 10, 10, 10, 7] as const;

export function heading(): string {
  const titles = line(['', 'unit', 'ours p50', 'p99', 'peer p50', 'p99', 'ratio'], 'peer, note');
  return `${titles}\n${'-'.repeat(titles.length + 24)}`;
}

export function tableLine(row: Row): string {
  const { name, unit, ours, peer, ratio, note } = row;
  const figures = [
    name,
    unit,
    figure(ours.p50),
    figure(ours.p99),
    peer ? figure(peer.p50) : '',
    peer ? figure(peer.p99) : '',
    ratio === null ? '' : `${ratio.toFixed(2)}x`,
  ];
  return line(figures, [peer?.name, note].filter((text) => text).join('; '));
}

/** Three significant digits, without an exponent. */
export function figure(value: number): string {
  if (value === 0) return '0';
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
  return value.toFixed(Math.min(digits, 4));
}

function line(cells: readonly string[], last: string): string {
  const padded = cells.map((cell, at) => (at < 2 ? cell.padEnd(WIDTHS[at]!) : cell.padStart(WIDTHS[at]!)));
  return `${padded.join(' ')}  ${last}`.trimEnd();
}
