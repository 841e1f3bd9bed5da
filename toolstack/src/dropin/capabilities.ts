/**
 * What programs that start swtpm look for before they use it. Named is only what is honoured: a program that needs a file
 * key, for example, learns here that there is none. The version is that of swtpm's interface that is meant: 0.8 is the
 * first with `cmdarg-migration`.
 */
const INTERFACE_VERSION = '0.8.0';

/** The answer to `swtpm socket --print-capabilities`. */
export function swtpmCapabilities(): string {
  return capabilities('swtpm', [
    'tpm-2.0',
    'tpm-send-command-header',
    'flags-opt-startup',
    'cmdarg-seccomp',
    'cmdarg-migration',
    'nvram-backend-dir',
    'nvram-backend-file',
    'rsa-keysize-1024',
    'rsa-keysize-2048',
    'rsa-keysize-3072',
  ]);
}

/** The answer to `swtpm_setup --print-capabilities`. */
export function setupCapabilities(): string {
  return capabilities('swtpm_setup', ['tpm-2.0', 'cmdarg-reconfigure-pcr-banks', 'tpm2-rsa-keysize-2048']);
}

function capabilities(type: string, features: readonly string[]): string {
  const list = features.map((feature) => `"${feature}"`).join(', ');
  return `{ "type": "${type}", "features": [ ${list} ], "version": "${INTERFACE_VERSION}" }`;
}
