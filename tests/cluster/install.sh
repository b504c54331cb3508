#!/usr/bin/env bash
# Installs what the cluster under test needs, on Debian or Ubuntu, as root: ip and tc, Slurm with its accounting, munge,
# sshd; and shellcheck for the job scripts. No service is started or enabled: the tests start their own, elsewhere.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

packages=(
    iproute2 util-linux slurm-wlm slurmdbd mariadb-server munge openssh-server shellcheck
    gcc libc6-dev # for cables with a latency
    uidmap      # for users other than root
    libpmix-dev # srun --mpi=pmix opens libpmix.so, the name without a version
)

installed() {
    [[ $(dpkg-query --show --showformat='${Status}' "$1" 2>/dev/null) == *' installed' ]]
}

missing=()
for package in "${packages[@]}"; do installed "$package" || missing+=("$package"); done
if ((${#missing[@]} == 0)); then exit; fi

# Debian's packages start their services; this file of its policy says no.
if [[ ! -e /usr/sbin/policy-rc.d ]]; then
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
fi
export DEBIAN_FRONTEND=noninteractive
echo "== installing ${missing[*]}"
mapfile -t before < <(dpkg-query --show --showformat='${Package}\n' | sort)
apt-get update --quiet=2
apt-get install --yes --quiet=2 --no-install-recommends "${missing[@]}" >/dev/null

if command -v systemctl >/dev/null; then
    dpkg-query --show --showformat='${Package}\n' | sort | comm -13 <(printf '%s\n' "${before[@]}") - |
        xargs --no-run-if-empty dpkg --listfiles | sed -n 's#^\(/usr\)\?/lib/systemd/system/\([^/@]*\.\(service\|socket\)\)$#\2#p' |
        xargs --no-run-if-empty systemctl --quiet disable || true # not every unit can be enabled in the first place
fi
