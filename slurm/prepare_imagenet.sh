#!/usr/bin/env bash
# Packs ImageNet (ILSVRC2012) from its own archives into shards with an index, as a job of one node.
#
#   sbatch --nodes=1 --cpus-per-task=32 --mem=32G --time=12:00:00 slurm/prepare_imagenet.sh /archives /data/imagenet
#
# /archives holds ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, as image-net.org
# gives them to those who have agreed to its terms. 150 GB are read and written. Stopped by its time limit or otherwise,
# it goes on where it was when it is submitted again. Runs without Slurm as well. HPCTRAIN_SITE gives modules and
# environment, as for train.sbatch.
# Run on small archives of the same form. Not yet run: ImageNet itself.
#SBATCH --job-name=prepare-imagenet
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

script=prepare_imagenet.sh
fail() {
    echo "$script: $*" >&2
    exit 2
}

(($# == 2)) || fail "two arguments are wanted, the folder of the archives and the one to be made, but there are $#"
archives=$1 packed=$2
parts=(ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar ILSVRC2012_devkit_t12.tar.gz)
for part in "${parts[@]}"; do
    [[ -r $archives/$part ]] || fail "$archives/$part cannot be read: get it from image-net.org and put it there"
done

# ---- begin site: the same in every job script, since sbatch copies a script to the node without its neighbours ----
if [[ -n ${HPCTRAIN_SITE:-} ]]; then
    [[ -r $HPCTRAIN_SITE ]] || fail "the site file $HPCTRAIN_SITE cannot be read on node $(hostname)"
    set -a
    # shellcheck source=/dev/null
    source "$HPCTRAIN_SITE"
    set +a
fi
if [[ -n ${HPCTRAIN_MODULES:-} ]]; then
    set +u # module functions look at unset variables
    # shellcheck disable=SC2086 # several names
    module load $HPCTRAIN_MODULES || fail "module load $HPCTRAIN_MODULES failed: correct HPCTRAIN_MODULES"
    set -u
fi
# ---- end site ----
# ---- begin environment ----
if [[ -n ${HPCTRAIN_VENV:-} ]]; then
    [[ -r $HPCTRAIN_VENV/bin/activate ]] ||
        fail "there is no environment in HPCTRAIN_VENV=$HPCTRAIN_VENV on node $(hostname): make it with slurm/install.sbatch"
    # shellcheck source=/dev/null
    source "$HPCTRAIN_VENV/bin/activate"
fi
python -m hpctrain --version >/dev/null ||
    fail "python on node $(hostname) has no hpctrain: set HPCTRAIN_VENV or HPCTRAIN_MODULES in the site file"
# ---- end environment ----

python -m hpctrain data pack --ilsvrc "${parts[@]/#/$archives/}" "$packed"
python -m hpctrain data verify "$packed" --jobs "${SLURM_CPUS_PER_TASK:-$(nproc)}"
