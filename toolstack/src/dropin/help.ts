/** What each command says of itself. Longer: docs/dropin.md. */
export const SWTPM_HELP = `Usage: swtpm socket --tpm2 --tpmstate dir=DIR --ctrl type=unixio,path=PATH [options]

Takes swtpm's arguments and has a vTPM of the vTPM manager serve what they name. The vTPM is that of the token in DIR,
which swtpm_setup makes.

  --tpm2                         needed: a TPM 2.0
  --tpmstate dir=DIR | backend-uri=dir://DIR | backend-uri=file://FILE
  --ctrl type=unixio,path=PATH[,mode=0600][,uid=N][,gid=N] | type=tcp,port=N | type=unixio,fd=N | clientfd=N
  --server type=unixio,path=PATH | type=tcp,port=N[,disconnect] | fd=N      -p N, -f N as well
  --flags not-need-init,startup-clear | startup-none
  --migration incoming,release-lock-outgoing
  -t, --terminate                ends when the client on the data channel is gone
  -d, --daemon   --pid file=PATH | fd=N   --log file=PATH | fd=N   -r, --runas USER
  --seccomp action=...           every worker has its own, stricter filter, whatever is asked
  --print-capabilities   --version   --help
`;

export const SETUP_HELP = `Usage: swtpm_setup --tpm2 --tpmstate DIR [options]

Makes a vTPM in the vTPM manager and leaves its token in DIR.

  --tpm2                         needed: a TPM 2.0
  --tpmstate DIR | dir://DIR | file://FILE
  --vmid NAME:UUID               of the VM that it belongs to
  --createek --create-ek-cert --create-platform-cert --lock-nvram --decryption --ecc
  --pcr-banks BANKS              sha256 unless given; - for all
  --not-overwrite | --overwrite  where there is one already; it is never replaced
  --reconfigure                  changes the PCR banks of one that there is
  --config FILE                  of swtpm_setup, for the program that makes certificates
  --write-ek-cert-files DIR   --logfile FILE   --runas USER
  --print-capabilities   --version   --help
`;

export const IOCTL_HELP = `Usage: swtpm_ioctl --unix PATH | --tcp [HOST]:PORT COMMAND

One request to the control socket of a TPM:

  -c              capabilities            -i           power on (CMD_INIT)
  -s              shut down               --stop       power off
  -e              the established bit     -r LOCALITY  resets it
  -l LOCALITY     the locality of the data channel
  -v              keep volatile state     -C           cancel the command that runs
  -g              which keys are in use   -b BYTES     buffer size; 0 shows it
  --info FLAGS    what libtpms says       --lock-storage RETRIES
`;
