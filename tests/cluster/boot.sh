#!/usr/bin/env bash
# Pid 1 of a host, in namespaces just made: boot.sh NAME SHARED [FOLDER...]. Prints its pid as the machine counts once the
# host is ready. SHARED and the FOLDERs are seen on the host also where they lie in /tmp or another place of its own.
# The host lives until this process ends, which it does when whoever holds its stdin closes it or dies.
set -euo pipefail
name=$1 shared=$2

read -r pid _ </proc/self/stat # /proc is still the machine's
hostname "$name"
mount -t tmpfs "$name" /mnt
number=0
for folder in "${@:2}"; do
    mkdir "/mnt/$((++number))"
    mount --rbind "$folder" "/mnt/$number"
done
for folder in /tmp /run /dev/shm; do mount -t tmpfs -o mode=1777 "$name" "$folder"; done
number=0
for folder in "${@:2}"; do
    number=$((number + 1))
    if [[ -d $folder ]]; then continue; fi # not hidden, or within one that came before
    mkdir -p "$folder"
    mount --move "/mnt/$number" "$folder"
done
umount --recursive /mnt
mount -t overlay -o "lowerdir=$shared/etc:/etc" overlay /etc
mount -t proc proc /proc
mount -t sysfs sysfs /sys
ip link set lo up
echo "$pid"
exec >/dev/null
while read -r _; do :; done # bash reaps what the host orphans meanwhile
