#!/usr/bin/env bash
# Pid 1 of a host, in namespaces just made: boot.sh NAME SHARED. Prints its pid as the machine counts once the host is
# ready. The host lives until this process ends, which it does when whoever holds its stdin closes it or dies.
set -euo pipefail
name=$1 shared=$2

read -r pid _ </proc/self/stat # /proc is still the machine's
hostname "$name"
mount --rbind "$shared" /mnt # SHARED may lie under a folder about to be hidden
for folder in /tmp /run /dev/shm; do mount -t tmpfs -o mode=1777 "$name" "$folder"; done
mkdir -p "$shared"
mount --move /mnt "$shared"
mount -t overlay -o "lowerdir=$shared/etc:/etc" overlay /etc
mount -t proc proc /proc
mount -t sysfs sysfs /sys
ip link set lo up
echo "$pid"
exec >/dev/null
while read -r _; do :; done # bash reaps what the host orphans meanwhile
