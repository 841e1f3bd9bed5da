import { accessSync, constants, existsSync, readdirSync, statSync } from 'node:fs';
import { request } from 'node:http';
import { type Finding, finding, type Logger, type Paths } from 'vtpm-common';
import { readEnrolmentText, readUnfinished } from '../enrolment.js';
import { ManagerError } from '../error.js';
import { parseTpm } from '../platform.js';
import { type RootTpmEnrolment, readSelection } from '../root-tpm/enrolment.js';
import type { TpmFacts } from '../root-tpm/examine.js';
import { examineRootTpm, type RootTpmLocation } from '../root-tpm/index.js';
import { readMachine } from './machine.js';
import { type Expectation, judgeTpm, protection } from './tpm-findings.js';

export interface DoctorOptions {
  readonly paths: Paths;
  readonly log: Logger;
  /** Where nothing is initialised: what init would be given. */
  readonly tpm: string;
  readonly pcrSelection: string;
  readonly srkHandle: number;
  readonly tpmDeadlineMs: number;
}

const CHIP = '/dev/tpmrm0';
/** A chip answers each of the commands in well under a second; one that is someone else's never does. */
const DEADLINE_MS = 10_000;
const RUNNING_TIMEOUT_MS = 60_000;

/**
 * Looks at the TPM with commands that only read, and judges it. Where the manager runs it is asked to do so: a software
 * TPM takes one client at a time.
 */
export async function examineHost(options: DoctorOptions): Promise<Finding[]> {
  const paths = options.paths.manager;
  const running = await askRunning(paths.adminSocket);
  if (running) return running;
  let enrolment: RootTpmEnrolment | undefined;
  if (existsSync(paths.enrolment)) {
    try {
      enrolment = readEnrolmentText(paths).enrolment.tpm;
    } catch (error) {
      const { message } = ManagerError.from(error);
      return [finding('enrolment', 'problem', message, 'restore manager/enrolment.json from a backup')];
    }
  }
  const findings: Finding[] = [];
  if (!enrolment && readUnfinished(paths)) {
    findings.push(
      finding(
        'enrolment',
        'problem',
        'an init or uninstall did not finish here',
        'vtpmctl uninstall, then vtpmctl init',
      ),
    );
  }
  if (!enrolment && options.tpm === 'auto' && !existsSync(CHIP)) {
    const message = `this machine has no TPM chip that Linux knows of (${CHIP})`;
    return [
      ...findings,
      finding(
        'tpm',
        'warning',
        message,
        'vtpmctl init --tpm embedded, for trying; or enable the TPM in the firmware',
      ),
    ];
  }
  const location = enrolment ?? parseTpm(options.tpm === 'auto' ? `device:${CHIP}` : options.tpm, paths);
  const expected = expectationOf(location, enrolment, options);
  if (location.kind === 'embedded') return [...findings, protection(location), ...embedded(paths, enrolment)];
  const access = accessTo(location);
  if (access.level === 'problem') return [...findings, access];
  try {
    const deadline = Math.min(options.tpmDeadlineMs, DEADLINE_MS);
    const facts = await examineRootTpm(location, expected.srkHandle, enrolment, deadline);
    return [...findings, access, ...judge(facts, expected)];
  } catch (error) {
    return [...findings, access, unusable(location, error)];
  }
}

/** For a running manager. */
export function judge(facts: TpmFacts, expected: Expectation): Finding[] {
  return judgeTpm(facts, expected, readMachine());
}

export function expectationOf(
  { kind, path }: RootTpmLocation,
  enrolment: RootTpmEnrolment | undefined,
  given: { readonly pcrSelection: string; readonly srkHandle: number },
): Expectation {
  const pcrSelection = enrolment?.root.pcrSelection ?? given.pcrSelection;
  const srkHandle = enrolment?.srkHandle ?? given.srkHandle;
  const pcrs = readSelection(pcrSelection).flatMap((selected) => selected.pcrs);
  return { location: { kind, path }, pcrSelection, pcrs, srkHandle, enrolment };
}

/** Its process is the manager's; starting it here would write to its state. */
function embedded(paths: Paths['manager'], enrolment: RootTpmEnrolment | undefined): Finding[] {
  if (!enrolment) return [];
  const isThere = existsSync(paths.softtpm) && readdirSync(paths.softtpm).length > 0;
  return [
    isThere
      ? finding('tpm', 'ok', `the state of the embedded TPM is in ${paths.softtpm}; it runs with the manager`)
      : finding(
          'tpm',
          'problem',
          `the state of the embedded TPM in ${paths.softtpm} is missing: no vTPM can be opened without it`,
          'restore manager/softtpm from a backup',
        ),
  ];
}

function accessTo({ path, kind }: RootTpmLocation): Finding {
  if (!existsSync(path)) {
    return kind === 'device'
      ? finding(
          'tpm-access',
          'problem',
          `there is no TPM device ${path}`,
          'modprobe tpm_tis; modprobe tpm_crb; or enable the TPM in the firmware',
        )
      : finding(
          'tpm-access',
          'problem',
          `nothing listens at ${path}`,
          'start the software TPM that serves it',
        );
  }
  const { uid, gid, mode } = statSync(path);
  const owners = `user ${uid}, group ${gid}, mode 0${(mode & 0o777).toString(8)}`;
  try {
    accessSync(path, constants.R_OK | constants.W_OK);
    return finding('tpm-access', 'ok', `${path} can be opened (${owners})`);
  } catch {
    return finding(
      'tpm-access',
      'problem',
      `${path} may not be opened by user ${process.getuid?.()} (${owners})`,
      `usermod -aG "$(stat -c %G ${path})" "$(id -un ${process.getuid?.()})", then log in again`,
    );
  }
}

function unusable({ path }: RootTpmLocation, caught: unknown): Finding {
  const { message } = ManagerError.from(caught);
  return finding(
    'tpm',
    'problem',
    `the TPM ${path} cannot be used: ${message}`,
    `fuser -v ${path} shows who else uses it`,
  );
}

/** @returns undefined where no manager answers */
function askRunning(socketPath: string): Promise<Finding[] | undefined> {
  return new Promise((resolve, reject) => {
    const call = request(
      { socketPath, path: '/doctor', agent: false, timeout: RUNNING_TIMEOUT_MS },
      (response) => {
        let text = '';
        response.setEncoding('utf8').on('data', (chunk: string) => {
          text += chunk;
        });
        response.on('end', () => {
          const answer = JSON.parse(text) as { findings?: Finding[]; error?: { message?: string } };
          const why = answer.error?.message ?? `status ${response.statusCode}`;
          resolve(
            answer.findings ?? [
              finding('tpm', 'problem', `the manager cannot look at its TPM: ${why}`, 'vtpmctl logs'),
            ],
          );
        });
      },
    );
    call.on('timeout', () => call.destroy(new Error(`no answer within ${RUNNING_TIMEOUT_MS / 1000} s`)));
    call.on('error', (error: NodeJS.ErrnoException) => {
      if (error.code === 'ENOENT' || error.code === 'ECONNREFUSED') resolve(undefined);
      else reject(new ManagerError('internal', `the running manager does not answer: ${error.message}`));
    });
    call.end();
  });
}
