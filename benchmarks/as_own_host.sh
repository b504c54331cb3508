#!/usr/bin/env bash
# Run a rank as if its host were its own: NCCL refuses two ranks on one GPU of one host, and asks NCCL_HOSTID which
# host it is on. Ranks then talk through sockets on loopback, so this shows that things work, never how fast.
set -euo pipefail
export NCCL_HOSTID="rank-${RANK:-${HOROVOD_RANK:-${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}}}}"
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}"
exec "$@"
