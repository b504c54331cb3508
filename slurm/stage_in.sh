#!/usr/bin/env bash
# Copies a packed data set (`hpctrain data pack`) to the disk of the node it runs on, and checks every byte of it.
#
#   srun --ntasks-per-node=1 slurm/stage_in.sh /shared/imagenet "$TMPDIR/imagenet"
#
# What is there with the right size and SHA-256 is not copied again; a file takes its name only when it is whole. Started
# several times on one node, one copies and the others wait. train.sbatch calls it when HPCTRAIN_STAGE names a data set.
# Exit status: 0 all there, 1 a copy failed or came out wrong, 2 a mistake in what was asked for.
set -euo pipefail

fail() {
    echo "stage_in.sh: $2 on node $(hostname)" >&2
    exit "$1"
}

(($# == 2)) || fail 2 "two arguments are wanted, the packed data set and where to copy it, but there are $#"
source=$1 target=$2
[[ -r $source/dataset.json ]] ||
    fail 2 "$source/dataset.json cannot be read: name a folder that \`hpctrain data pack\` has finished"
mkdir -p "$target" 2>/dev/null || fail 2 "the folder $target cannot be made: set HPCTRAIN_SCRATCH to a disk of the nodes"
exec 9>"$target/.staging"
flock 9

# dataset.json as lines of size, SHA-256 and name; the size of an index is not in it.
files=$(
    python3 - "$source/dataset.json" <<'PYTHON'
import json, os, sys

folder = os.path.dirname(sys.argv[1])
for name, split in json.load(open(sys.argv[1]))["splits"].items():
    for shard in split["shards"]:
        print(shard["bytes"], shard["sha256"], shard["name"])
    index = f"{name}.index.npy"
    print(os.path.getsize(os.path.join(folder, index)), split["index_sha256"], index)
PYTHON
) || fail 2 "$source/dataset.json is not that of a packed data set: run \`hpctrain data pack\` again"

is_there() { # SIZE SHA256 PATH
    [[ -f $3 && $(stat -c %s "$3") == "$1" ]] && echo "$2 *$3" | sha256sum --check --status
}

stage() { # SIZE SHA256 NAME
    is_there "$1" "$2" "$target/$3" && return
    cp "$source/$3" "$target/$3.part" || fail 1 "copying $source/$3 to $target failed"
    is_there "$1" "$2" "$target/$3.part" ||
        fail 1 "$target/$3 came out other than $source/dataset.json says: \`hpctrain data verify $source\` tells which is wrong"
    mv "$target/$3.part" "$target/$3"
    echo "$3" >>"$target/.staged"
}

wanted=$(awk '{ sum += $1 } END { print sum + 0 }' <<<"$files")
have=$(du --apparent-size --block-size=1 --summarize "$target" | cut -f 1)
free=$(df --output=avail --block-size=1 "$target" | tail -n 1)
((wanted <= have + free)) ||
    fail 2 "$target has room for $(((have + free) >> 20)) MiB, but $source has $((wanted >> 20)) MiB: remove what is not needed in \
$(dirname "$target"), such as other versions, or choose another HPCTRAIN_SCRATCH"

export -f fail is_there stage
export source target
: >"$target/.staged"
# Several at a time: checking is bound by one core, copying by the file system's answers.
# shellcheck disable=SC2016 # expanded by the inner shell
xargs --max-procs="$(nproc)" --max-lines=1 bash -c 'set -euo pipefail; stage "$@"' stage <<<"$files" ||
    fail 1 "$source was not copied to $target"
cp "$source/dataset.json" "$target/dataset.json.part"
mv "$target/dataset.json.part" "$target/dataset.json"
echo "stage_in.sh: $(hostname): $(wc -l <"$target/.staged") of $(wc -l <<<"$files") files copied to $target, all checked"
