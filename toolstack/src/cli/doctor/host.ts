import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync, realpathSync } from 'node:fs';
import { basename } from 'node:path';
import { type Finding, finding, libtpmsVersion } from 'vtpm-common';
import { ToolstackError } from '../../error.js';
import { missingLayers } from '../../supervisor/confinement.js';
import { parseWaived } from '../../supervisor/layers.js';
import { findProgram, ROOT, SANDBOX_TEMPLATE } from '../../supervisor/sandbox.js';
import { managerProgram, supervisorProgram } from '../programs.js';

const SANDBOX_TIMEOUT_MS = 20_000;
const LEAST_NODE = [20, 19] as const;

/** What the programs need of the system beside themselves. */
export function checkPackages(): Finding[] {
  return [
    attempt('package-node', () => {
      const [major = 0, minor = 0] = process.versions.node.split('.').map(Number);
      const isEnough = major > LEAST_NODE[0] || (major === LEAST_NODE[0] && minor >= LEAST_NODE[1]);
      return isEnough
        ? finding('package-node', 'ok', `Node.js ${process.versions.node}`)
        : finding(
            'package-node',
            'problem',
            `Node.js ${process.versions.node} is too old; ${LEAST_NODE.join('.')} or newer is needed`,
            'apt-get install nodejs, from a source that has it (nodejs.org)',
          );
    }),
    attempt('package-bwrap', () => {
      const { stdout, status } = spawnSync(findProgram('bwrap'), ['--version'], {
        encoding: 'utf8',
      });
      return status === 0
        ? finding('package-bwrap', 'ok', `${stdout.trim()} confines workers and store`)
        : finding('package-bwrap', 'problem', 'bwrap does not run', 'apt-get install --reinstall bubblewrap');
    }),
    attempt('package-libtpms', () => finding('package-libtpms', 'ok', `libtpms ${libtpmsVersion()}`)),
    attempt('package-programs', () => {
      managerProgram();
      supervisorProgram();
      return finding('package-programs', 'ok', 'the daemons are installed');
    }),
    existsSync('/usr/bin/setpriv')
      ? finding('package-setpriv', 'ok', 'setpriv ends the embedded TPM with its manager')
      : finding(
          'package-setpriv',
          'note',
          'setpriv is missing: an embedded TPM may outlive a manager that was killed',
          'apt-get install util-linux',
        ),
  ];
}

/** Where a message says `on Debian: COMMAND` or `…: npm run build`, the command is what mends it. */
function attempt(check: string, look: () => Finding): Finding {
  try {
    return look();
  } catch (caught) {
    const { message } = ToolstackError.from(caught);
    const [, what, command] = /^(.*?)[;:,]? (?:on Debian|build it|run):? (.*)$/.exec(message) ?? [];
    return finding(check, 'problem', what ?? message, command ?? null);
  }
}

export interface KernelFiles {
  /** A sysctl's value, undefined where this kernel has none of that name. */
  sysctl(name: string): string | undefined;
  readonly uid: number;
}

export const KERNEL: KernelFiles = {
  sysctl(name) {
    try {
      return readFileSync(`/proc/sys/${name.replaceAll('.', '/')}`, 'utf8').trim();
    } catch {
      return undefined;
    }
  },
  uid: process.getuid?.() ?? 0,
};

/** What the kernel allows. Whether it is enough in the end only a sandbox that really runs can tell. */
export function checkKernel({ sysctl, uid }: KernelFiles = KERNEL): Finding[] {
  const findings: Finding[] = [];
  if (sysctl('user.max_user_namespaces') === '0') {
    findings.push(
      finding(
        'kernel-userns',
        'problem',
        'user namespaces are off (user.max_user_namespaces is 0)',
        'sysctl -w user.max_user_namespaces=15000',
      ),
    );
  } else if (sysctl('kernel.unprivileged_userns_clone') === '0' && uid !== 0) {
    findings.push(
      finding(
        'kernel-userns',
        'problem',
        'user namespaces are for root only (kernel.unprivileged_userns_clone is 0)',
        'sysctl -w kernel.unprivileged_userns_clone=1',
      ),
    );
  } else if (sysctl('kernel.apparmor_restrict_unprivileged_userns') === '1' && uid !== 0) {
    findings.push(
      finding(
        'kernel-userns',
        'warning',
        'AppArmor restricts user namespaces to programs with a profile that allows them',
        'sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or a profile for bwrap in /etc/apparmor.d',
      ),
    );
  } else {
    findings.push(finding('kernel-userns', 'ok', 'user namespaces are available'));
  }
  const actions = sysctl('kernel.seccomp.actions_avail');
  findings.push(
    actions?.includes('errno')
      ? finding('kernel-seccomp', 'ok', 'the kernel has seccomp filters')
      : finding(
          'kernel-seccomp',
          'problem',
          'the kernel has no seccomp filters',
          'apt-get install linux-image-amd64, and boot it',
        ),
  );
  return findings;
}

/** Runs a trivial program in the sandbox that workers get, and looks at what the kernel says of it. */
export function checkSandbox(path = process.env.PATH ?? ''): Finding {
  const problem = (message: string, fix: string): Finding => finding('sandbox', 'problem', message, fix);
  let bwrap: string;
  try {
    bwrap = findProgram('bwrap', path);
  } catch {
    return problem('no sandbox can be tried without bwrap', 'apt-get install bubblewrap');
  }
  const template = SANDBOX_TEMPLATE.map((argument) => (argument === ROOT ? '/' : argument));
  const { status, stdout, stderr, error } = spawnSync(
    bwrap,
    [...template, '--', '/bin/cat', '/proc/self/status'],
    {
      encoding: 'utf8',
      timeout: SANDBOX_TIMEOUT_MS,
    },
  );
  if (status !== 0) {
    const said = error?.message ?? stderr.trim().split('\n')[0] ?? '';
    const fix = /proc/i.test(said)
      ? 'in a container: docker run --security-opt systempaths=unconfined --security-opt seccomp=unconfined …'
      : 'sysctl user.max_user_namespaces kernel.unprivileged_userns_clone kernel.apparmor_restrict_unprivileged_userns';
    return problem(`a sandbox cannot be made: ${said}`, fix);
  }
  const fields = new Map(stdout.split('\n').map((line) => line.split(':\t') as [string, string]));
  if (fields.get('NoNewPrivs') !== '1' || !/^0+$/.test(fields.get('CapBnd') ?? '')) {
    return problem('the sandbox does not take privileges away', 'apt-get install --reinstall bubblewrap');
  }
  return finding('sandbox', 'ok', 'a sandbox with a /proc of its own can be made');
}

/** The layers beyond that, which a supervisor of this user asks for. @param waived by the setting waive-layers */
export async function checkLayers(
  waived: string,
  find: () => Promise<ReadonlyMap<string, string>> = missingLayers,
): Promise<Finding> {
  const given = parseWaived(waived);
  const missing = await find();
  const absent = [...missing].filter(([layer]) => !(given as ReadonlySet<string>).has(layer));
  const names = [...given, ...absent.map(([layer]) => layer)].join(',');
  if (absent.length > 0) {
    const said = absent.map(([layer, reason]) => `${layer} (${reason})`).join('; ');
    return finding(
      'sandbox-layers',
      'problem',
      `this machine does not give workers: ${said}`,
      `put "waive-layers": "${names}" into config.json, and workers run without`,
    );
  }
  const needless = [...given].filter((layer) => !missing.has(layer));
  if (needless.length > 0) {
    const kept = [...given].filter((layer) => !needless.includes(layer)).join(',');
    return finding(
      'sandbox-layers',
      'warning',
      `waived although this machine gives it: ${needless.join(', ')}`,
      `put "waive-layers": "${kept}" into config.json`,
    );
  }
  return finding(
    'sandbox-layers',
    'ok',
    given.size === 0 ? 'workers get every layer of the sandbox' : `workers run without: ${names}, waived`,
  );
}

/** What /proc/swaps lists. @param isEncrypted whether the kernel encrypts what it writes to that device */
export function checkSwap(
  swaps = readFileSync('/proc/swaps', 'utf8'),
  isEncrypted: (device: string) => boolean = isDmCrypt,
): Finding {
  const devices = swaps
    .split('\n')
    .slice(1)
    .map((line) => line.split(/\s+/)[0] ?? '')
    .filter((device) => device !== '');
  if (devices.length === 0) return finding('swap', 'ok', 'no swap is active');
  const inMemory = devices.filter((device) => /^\/dev\/zram\d/.test(device));
  const plain = devices.filter((device) => !inMemory.includes(device) && !isEncrypted(device));
  if (plain.length > 0) {
    return finding(
      'swap',
      'warning',
      `keys in memory may be written to the swap ${plain.join(', ')} in the clear`,
      `swapoff ${plain.join(' ')} (and out of /etc/fstab), or encrypt it: crypttab(5), option swap`,
    );
  }
  return finding(
    'swap',
    'ok',
    `swap is active and does not leave memory in the clear (${devices.join(', ')})`,
  );
}

function isDmCrypt(device: string): boolean {
  try {
    const name = basename(realpathSync(device));
    return readFileSync(`/sys/block/${name}/dm/uuid`, 'utf8').startsWith('CRYPT-');
  } catch {
    return false;
  }
}
