import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { bootable } from './guest-tree.js';

/** How often the guest extends PCR 16 when it has run each tool. */
export const EXTENDS = 120;

/** The number of the extend, as a SHA-256 digest in hex. */
export function extendedWith(count: number): string {
  return count.toString(16).padStart(64, '0');
}

/** What an operating system's tools do with a TPM: each line ends with success, or the guest says so. */
const TOOLS = [
  'getcap properties-fixed',
  'selftest --fulltest',
  'getrandom --hex 16',
  'readclock',
  'createprimary -C o -c /tmp/primary.ctx',
  'create -C /tmp/primary.ctx -G rsa2048 -u /tmp/key.pub -r /tmp/key.priv',
  'load -C /tmp/primary.ctx -u /tmp/key.pub -r /tmp/key.priv -c /tmp/key.ctx',
  'sign -c /tmp/key.ctx -g sha256 -o /tmp/signature /init',
  'verifysignature -c /tmp/key.ctx -g sha256 -m /init -s /tmp/signature',
  'create -C /tmp/primary.ctx -i /message -u /tmp/seal.pub -r /tmp/seal.priv',
  'load -C /tmp/primary.ctx -u /tmp/seal.pub -r /tmp/seal.priv -c /tmp/seal.ctx',
  'unseal -c /tmp/seal.ctx -o /tmp/unsealed',
  'nvdefine 0x1500001 -C o -s 8',
  'nvwrite 0x1500001 -C o -i /message',
  'nvread 0x1500001 -C o -s 8',
  'createek -G ecc -c 0x81010005 -u /tmp/ek.pub',
  'startauthsession -S /tmp/session.ctx --policy-session',
  'policypcr -S /tmp/session.ctx -l sha256:0,1,2,3,4,5,6,7',
  'flushcontext /tmp/session.ctx',
  'quote -c /tmp/key.ctx -l sha256:0,4,16 -q 00112233 -m /tmp/quote -s /tmp/quote.sig',
  'pcrread sha256:0,1,2,3,4,5,6,7,17',
  'evictcontrol -C o -c /tmp/key.ctx 0x81000007',
];

const INIT = `#!/busybox sh
/busybox mount -t devtmpfs dev /dev
/busybox mount -t proc proc /proc
/busybox mount -t sysfs sys /sys
echo "DEVICE $(/busybox cat /sys/class/tpm/tpm0/tpm_version_major)"
export TPM2TOOLS_TCTI=device:/dev/tpmrm0
tool() {
  if /usr/bin/tpm2 "$@" >/tmp/said 2>&1; then echo "DONE $1"; else echo "FAILED $*"; /busybox cat /tmp/said; fi
}
${TOOLS.map((tool) => `tool ${tool}`).join('\n')}
/busybox cmp /message /tmp/unsealed && echo UNSEALED
count=1
while [ $count -le ${EXTENDS} ]; do
  tool pcrextend "16:sha256=$(/busybox printf %064x $count)"
  echo "EXTENDED $count"
  count=$((count + 1))
done
echo END
while :; do /busybox sleep 1; done
`;

/** A small Linux with tpm2-tools. @returns QEMU's arguments for it */
export function linuxGuest(directory: string): string[] {
  const { kernel, initramfs } = bootable(
    directory,
    () => INIT,
    ['/usr/bin/tpm2'],
    (tree) => writeFileSync(join(tree, 'message'), 'a secret'),
  );
  return [
    ...['-m', '512', '-cpu', 'max', '-serial', 'stdio', '-no-reboot'],
    ...['-kernel', kernel, '-initrd', initramfs, '-append', 'console=ttyS0 quiet panic=-1'],
  ];
}

/** How many tools the guest runs before it extends. */
export const TOOL_COUNT = TOOLS.length;
