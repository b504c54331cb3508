#!/usr/bin/env bash
# Packs ImageNet (ILSVRC2012) from its own archives into shards with an index, as a job of one node.
#
#   sbatch --nodes=1 --cpus-per-task=32 --mem=32G --time=12:00:00 slurm/prepare_imagenet.sh /archives /data/imagenet
#
# /archives holds ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, as image-net.org
# gives them to those who have agreed to its terms. 150 GB are read and written. Stopped by its time limit or otherwise,
# it goes on where it was when it is submitted again. Runs without Slurm as well. HPCTRAIN_SITE gives modules,
# environment and container, as for train.sbatch.
# Run on small archives of the same form. Not yet run: ImageNet itself, modules, Apptainer.
#SBATCH --job-name=prepare-imagenet
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

script=prepare_imagenet.sh
# sbatch copies this script to the node without its neighbours, and knows where they are.
[[ $(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null) =~ Command=([^$'\n']*)/slurm/$script ]] || true
home=${HPCTRAIN_HOME:-${BASH_REMATCH[1]:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}}
if [[ ! -r $home/slurm/job.sh ]]; then
    echo "$script: $home is not hpctrain's checkout: submit this script there, or name it with HPCTRAIN_HOME" >&2
    exit 2
fi
# shellcheck source=slurm/job.sh
source "$home/slurm/job.sh"

(($# == 2)) || fail "two arguments are wanted, the folder of the archives and the one to be made, but there are $#"
archives=$1 packed=$2
parts=(ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar ILSVRC2012_devkit_t12.tar.gz)
for part in "${parts[@]}"; do
    [[ -r $archives/$part ]] || fail "$archives/$part cannot be read: get it from image-net.org and put it there"
done

load_site
enter_environment
mkdir -p "$packed" || fail "the folder $packed cannot be made: name one that can be"
enter_container "$archives" "$packed"

"${inside[@]}" python -m hpctrain data pack --ilsvrc "${parts[@]/#/$archives/}" "$packed"
"${inside[@]}" python -m hpctrain data verify "$packed" --jobs "${SLURM_CPUS_PER_TASK:-$(nproc)}"
