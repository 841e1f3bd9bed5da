#!/usr/bin/env bash
# Brings a checkout to the point where it runs: Debian packages, npm packages, build. Says what it does; does and says
# nothing where nothing is missing.
#
#   scripts/setup.sh build   what building and generating need: no Debian packages
#   scripts/setup.sh run     also what the service needs
#   scripts/setup.sh test    also what the tests and benchmarks need
#   scripts/setup.sh long    also what the long tests need: libvirt, and the packages a VM image is made of (27 MB, not installed)
set -euo pipefail
cd "$(dirname "$0")/.."
purpose=${1:-run}

packages=()
if [ "$purpose" != build ]; then
  packages+=(libtpms0 bubblewrap)
fi
if [ "$purpose" = test ] || [ "$purpose" = long ]; then
  packages+=(swtpm swtpm-tools tpm2-tools libtss2-tcti-swtpm0 libtss2-tcti-cmd0 libtss2-tcti-mssim0)
  packages+=(socat strace openssl systemd qemu-system-x86)
fi
if [ "$purpose" = long ]; then
  packages+=(e2fsprogs libtss2-tcti-device0 libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients)
fi

die() { printf '%s\n' "$@" >&2; exit 1; }

libraries=$(PATH=$PATH:/sbin:/usr/sbin ldconfig -p)

# A package counts as there when what we use of it is there, so that other systems pass too.
present() {
  case "$1" in
    libtpms0) [[ $libraries == *'libtpms.so.0 '* ]] ;;
    bubblewrap) command -v bwrap >/dev/null ;;
    socat) command -v socat >/dev/null ;;
    strace) command -v strace >/dev/null ;;
    qemu-system-x86) command -v qemu-system-x86_64 >/dev/null ;;
    e2fsprogs) PATH=$PATH:/sbin:/usr/sbin command -v mkfs.ext4 >/dev/null ;;
    libvirt-daemon) PATH=$PATH:/sbin:/usr/sbin command -v libvirtd >/dev/null ;;
    libvirt-daemon-driver-qemu) compgen -G '/usr/lib/*/libvirt/connection-driver/libvirt_driver_qemu.so' >/dev/null ;;
    libvirt-clients) command -v virsh >/dev/null ;;
    openssl) command -v openssl >/dev/null ;;
    systemd) command -v systemd-analyze >/dev/null ;;
    swtpm) command -v swtpm >/dev/null ;;
    swtpm-tools) command -v swtpm_setup >/dev/null ;;
    tpm2-tools) command -v tpm2_getrandom >/dev/null ;;
    libtss2-tcti-*) [[ $libraries == *"${1%0}.so.0 "* ]] ;;
  esac
}

command -v node >/dev/null || die 'Node.js is not installed. Install Node.js 20.19 or newer, then run this again.'
node -e 'const [a, b] = process.versions.node.split(".").map(Number); process.exit(a > 20 || (a === 20 && b >= 19) ? 0 : 1)' ||
  die "This is Node.js $(node --version); 20.19 or newer is needed. Upgrade it, then run this again."

missing=()
for package in "${packages[@]}"; do
  present "$package" || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  command -v apt-get >/dev/null ||
    die "These packages are missing, and this system has no apt-get to install them with: ${missing[*]}" \
      '(Debian names: libtpms 0.9 or newer, bubblewrap, swtpm, tpm2-tools, the TSS TCTI libraries.)' \
      'Install them by hand, then run this again.'
  as_root=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || die "These packages are missing: ${missing[*]}" \
      "As root, run: apt-get install --no-install-recommends ${missing[*]}" 'Then run this again.'
    as_root=(sudo)
  fi
  echo "Installing Debian packages: ${missing[*]}"
  log=$(mktemp)
  if ! { "${as_root[@]}" apt-get update && "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 </dev/null; then
    tail -n 20 "$log" >&2
    die "apt-get could not install ${missing[*]}; its last lines are above. Mend that, then run this again."
  fi
  rm -f "$log"
fi

if [ "$purpose" = long ]; then
  kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p')
  mkdir -p .build/debian
  for package in "$kernel" busybox-static; do
    if ! compgen -G ".build/debian/${package}_*.deb" >/dev/null; then
      echo "Downloading Debian package: $package"
      (cd .build/debian && apt-get download -q "$package" >/dev/null 2>"$package.log") ||
        die "apt-get could not download $package; .build/debian/$package.log says why. Mend that, then run this again."
    fi
  done
fi

if [ ! -f node_modules/.package-lock.json ] || [ package-lock.json -nt node_modules/.package-lock.json ]; then
  echo 'Installing npm packages (nothing is compiled)'
  npm ci --loglevel=error >/dev/null
  touch node_modules/.package-lock.json
fi

# In a copy without Git nothing is listed, and times alone count.
listed() { git ls-files -- "${sources[@]}" 2>/dev/null || true; }
sources=(common proto tpm2-ts-bindings manager vtpmd frontend-driver toolstack quickstart test)
changed() {
  [ ! -f .build/stamp ] || [ -n "$(find tsconfig.base.json tsconfig.json scripts package-lock.json "${sources[@]}" \
    \( -name node_modules -o -name dist -o -name generated \) -prune -o -newer .build/stamp -type f -print -quit)" ] ||
    [ "$(listed | sha256sum)" != "$(cat .build/stamp)" ]
}
if changed; then
  echo 'Building'
  node scripts/build.mjs --clean
  mkdir -p .build
  listed | sha256sum >.build/stamp
fi
