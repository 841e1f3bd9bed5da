import { FINDING_LEVELS, type Finding, finding } from 'vtpm-common';
import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import { checkDaemons } from '../doctor/daemons.js';
import { checkDisk, checkFiles, checkLeftovers, checkUmask } from '../doctor/files.js';
import { checkKernel, checkLayers, checkPackages, checkSandbox, checkSwap } from '../doctor/host.js';
import { EXIT } from '../exit-status.js';
import { runManagerCommand } from '../manager-command.js';

export interface DoctorFlags {
  readonly tpm?: string;
  readonly pcrs?: string;
  readonly srkHandle?: string;
}

/** Looks at everything that has to be right, changes nothing. @returns the exit status: 0 where there is no problem */
export async function doctor(flags: DoctorFlags, context: Context): Promise<number> {
  const { configuration, output } = context;
  const { paths, settings } = configuration;
  const findings: Finding[] = [
    ...checkPackages(),
    ...checkKernel(),
    checkSandbox(),
    await checkLayers(settings['waive-layers']),
    ...(await checkTpm(flags, context)),
    ...checkFiles(paths),
    ...checkUmask(paths),
    ...checkLeftovers(paths),
    checkSwap(),
    checkDisk(paths, settings['store-reserve']),
    ...(await checkDaemons(context)),
  ];
  const count = (level: Finding['level']) => findings.filter((found) => found.level === level).length;
  const summary = Object.fromEntries(FINDING_LEVELS.map((level) => [level, count(level)]));
  output.result(
    { findings, summary },
    [
      ...findings.map(
        ({ level, message, fix }) => `${level.padEnd(8)} ${message}${fix ? `\n         → ${fix}` : ''}`,
      ),
      '',
      `${findings.length} checks: ${count('problem')} problems, ${count('warning')} warnings, ${count('note')} notes`,
    ].join('\n'),
  );
  return count('problem') === 0 ? EXIT.ok : EXIT.failed;
}

/** Only the manager's program speaks to the TPM. */
async function checkTpm(flags: DoctorFlags, { configuration }: Context): Promise<Finding[]> {
  const args = ['doctor'];
  if (flags.tpm !== undefined) args.push('--tpm', flags.tpm);
  if (flags.pcrs !== undefined) args.push('--pcrs', flags.pcrs);
  if (flags.srkHandle !== undefined) args.push('--srk-handle', flags.srkHandle);
  try {
    return (await runManagerCommand<{ findings: Finding[] }>(configuration.paths, args)).findings;
  } catch (caught) {
    const error = ToolstackError.from(caught);
    // Wrong flags are the caller's, everything else is something to find.
    if (error.code === 'bad-request') throw new ToolstackError('usage', error.message, { cause: error });
    return [finding('tpm', 'problem', `the TPM could not be looked at: ${error.message}`, 'vtpmctl logs')];
  }
}
