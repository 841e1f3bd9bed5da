import { readdirSync, readFileSync } from 'node:fs';

/** The store processes of a directory: bubblewrap and what it runs. */
export function storeProcesses(directory: string): number[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .filter((pid) => {
      try {
        const words = readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0');
        return words.some((word) => word.endsWith('/child-main.js')) && words.includes(directory);
      } catch {
        return false;
      }
    })
    .map(Number);
}
