#!/usr/bin/env bash
# Starts a Slurm host's daemons: daemons.sh node|head|head-with-accounting LOG. They go into the background by themselves.
set -euo pipefail
role=$1 log=$2
ulimit -c 0
mkdir -p /run/munge /run/sshd /run/slurm

# until_it_works COMMAND...: at most 60 s
until_it_works() {
    local end=$((SECONDS + 60))
    until "$@" &>/dev/null; do
        ((SECONDS < end)) || { "$@"; return; }
        sleep 0.05
    done
}

start_accounting() {
    mkdir -p /run/mysqld
    mariadb-install-db --no-defaults --user=root --datadir=/run/mysql --skip-test-db
    setsid mariadbd --no-defaults --user=root --datadir=/run/mysql --skip-networking --socket=/run/mysqld/mysqld.sock \
        --innodb-flush-log-at-trx-commit=0 &
    until_it_works mariadb-admin ping
    slurmdbd
    until_it_works sacctmgr --noheader show cluster
    sacctmgr --immediate add cluster hpctrain
}

# By force, since in a user namespace / is nobody's, and munged finds its key insecure there.
munged --force --seed-file /run/munge/seed --log-file "$log/munged-$HOSTNAME.log"
if [[ $role == node ]]; then
    "$(command -v sshd)" -E "$log/sshd-$HOSTNAME.log" # by its full path, which it starts itself again by
    slurmd
else
    if [[ $role == head-with-accounting ]]; then start_accounting >"$log/accounting.log" 2>&1; fi
    "$(command -v sshd)" -E "$log/sshd-$HOSTNAME.log"
    slurmctld
fi
