import { type Finding, finding } from 'vtpm-common';
import type { Machine } from './machine.js';

/**
 * What is measured where (TCG PC Client Platform Firmware Profile, table 1; for 8 and 9 GRUB and the kernel's EFI stub;
 * for 11 to 15 the UAPI group's TPM2 PCR registry). A part is covered where one of its registers is selected and was
 * extended: one that is all zero says the same of every boot.
 */
const PARTS = [
  { name: 'the firmware', pcrs: [0] },
  { name: 'the boot loader', pcrs: [4] },
  { name: 'the kernel command line', pcrs: [8, 12] },
  { name: 'the initrd', pcrs: [9, 11] },
  { name: 'the root file system', pcrs: [15] },
] as const;

export interface Coverage {
  readonly covered: readonly string[];
  readonly uncovered: readonly string[];
  /** Selected and all zero. */
  readonly empty: readonly number[];
  /** A selection that covers more; undefined where this machine has none. */
  readonly better: readonly number[] | undefined;
}

/** @param values of PCR 0 to 15, hex */
export function coverageOf(
  selected: readonly number[],
  values: Readonly<Record<number, string>>,
  { hasSystemdStub }: Pick<Machine, 'hasSystemdStub'>,
): Coverage {
  const isUsed = (pcr: number): boolean => /[^0]/.test(values[pcr] ?? '');
  // With a unified kernel image its command line and initrd are inside of what PCR 11 measures.
  const parts = PARTS.map(({ name, pcrs }) => ({
    name,
    pcrs: hasSystemdStub && name === 'the kernel command line' ? [...pcrs, 11] : [...pcrs],
  }));
  const isCovered = (pcrs: readonly number[], chosen: readonly number[]): boolean =>
    pcrs.some((pcr) => chosen.includes(pcr) && isUsed(pcr));
  // What changes rarely first; the kernel's own registers where somebody measures into them.
  const candidates = hasSystemdStub ? [0, 2, 4, 7, 11, 12, 15] : [0, 2, 4, 7, 8, 9, 15];
  const better = [...new Set([...selected, ...candidates.filter(isUsed)])].sort((a, b) => a - b);
  const gains = parts.some(({ pcrs }) => !isCovered(pcrs, selected) && isCovered(pcrs, better));
  return {
    covered: parts.filter(({ pcrs }) => isCovered(pcrs, selected)).map(({ name }) => name),
    uncovered: parts.filter(({ pcrs }) => !isCovered(pcrs, selected)).map(({ name }) => name),
    empty: selected.filter((pcr) => !isUsed(pcr)),
    better: gains ? better : undefined,
  };
}

/** @param isEnrolled the selection can no longer be chosen */
export function judgeCoverage(
  selection: string,
  selected: readonly number[],
  values: Readonly<Record<number, string>>,
  machine: Machine,
  isEnrolled: boolean,
): Finding[] {
  const { covered, uncovered, empty, better } = coverageOf(selected, values, machine);
  const proposal = better && `sha256:${better.join(',')}`;
  const fix =
    proposal === undefined
      ? null
      : isEnrolled
        ? `vtpmctl uninstall, then vtpmctl init --tpm auto --pcrs ${proposal} (only while no vTPM exists)`
        : `vtpmctl init --tpm auto --pcrs ${proposal}`;
  const findings: Finding[] = [];
  if (empty.length === selected.length) {
    findings.push(
      finding(
        'pcr-coverage',
        'warning',
        `nothing was measured into ${selection}: the root key is released whatever is booted`,
        fix ?? 'turn on measured boot in the firmware settings',
      ),
    );
  } else {
    const says = covered.length === 0 ? 'none of' : `${covered.join(', ')}, but not`;
    findings.push(
      uncovered.length === 0
        ? finding('pcr-coverage', 'ok', `${selection} covers ${covered.join(', ')}`)
        : finding('pcr-coverage', 'note', `${selection} covers ${says} ${uncovered.join(', ')}`, fix),
    );
    if (empty.length > 0) {
      findings.push(
        finding('pcr-empty', 'note', `nothing was measured into PCR ${empty.join(', ')} of the selection`),
      );
    }
  }
  if (selected.includes(7) && machine.isSecureBoot === false) {
    findings.push(
      finding(
        'secure-boot',
        'warning',
        'secure boot is off, so that PCR 7 says nothing about which boot loader and kernel run',
        'mokutil --sb-state shows it; turn secure boot on in the firmware settings',
      ),
    );
  }
  return findings;
}
