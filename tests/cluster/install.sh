#!/usr/bin/env bash
# Installs what the cluster under test needs, on Debian or Ubuntu, as root: ip and tc.
set -euo pipefail
if command -v ip tc nsenter unshare setpriv >/dev/null; then exit; fi
apt-get update
apt-get install --yes --no-install-recommends iproute2 util-linux
