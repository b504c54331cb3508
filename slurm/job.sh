#!/usr/bin/env bash
# What the job scripts have in common. Each has set `script` to its name and `home` to the checkout, sources this file, and
# calls, in this order, what it needs of
#
#   load_site             the site file that HPCTRAIN_SITE names, and the modules of HPCTRAIN_MODULES
#   enter_environment     the virtual environment HPCTRAIN_VENV
#   count_ranks           sets gpus and tasks of a node, cpus of a task, and rank_options, by which srun starts a rank for each
#   choose_meeting_place  exports MASTER_ADDR and MASTER_PORT
#   enter_container       sets inside, the words before a command that is to run in HPCTRAIN_CONTAINER
#
# What cannot work ends the job: one sentence, exit status 2. Not yet run: modules, Apptainer.
# shellcheck disable=SC2034,SC2154 # the scripts set and read what this file does not

fail() {
    echo "$script: $*" >&2
    exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
    fail "bash $BASH_VERSION on node $(hostname) is too old: put one from 4.4 on first on your PATH where you submit"

# Slurm notes how a job was submitted with --export=NAMES or NONE, and srun would start ranks with no more than that.
export SLURM_EXPORT_ENV=ALL

load_site() {
    if [[ -n ${HPCTRAIN_SITE:-} ]]; then
        [[ -r $HPCTRAIN_SITE ]] || fail "the site file $HPCTRAIN_SITE cannot be read on node $(hostname)"
        local told key
        local -A given=()
        # Tried apart: at a variable that is not set bash would end this script.
        # shellcheck source=/dev/null
        if ! told=$({ source "$HPCTRAIN_SITE"; } 2>&1); then
            fail "the site file $HPCTRAIN_SITE does not work on node $(hostname) (${told#"$HPCTRAIN_SITE: "}): \
correct that line, or export what it uses where you submit"
        fi
        for key in "${!HPCTRAIN_@}"; do given[$key]=${!key}; done
        set -a
        # shellcheck source=/dev/null
        source "$HPCTRAIN_SITE"
        # What was exported for this job comes before the file; an empty value is none, there as here.
        for key in "${!given[@]}"; do [[ -z ${given[$key]} ]] || printf -v "$key" %s "${given[$key]}"; done
        set +a
    fi
    [[ -z ${HPCTRAIN_MODULES:-} ]] || load_modules
}

load_modules() {
    local init
    set +u # module functions look at unset variables
    # A batch shell lacks the function where the login shell is zsh or tcsh, and where cron submits.
    for init in "$MODULESHOME/init/bash" /etc/profile.d/lmod.sh /etc/profile.d/modules.sh; do
        if ! type -t module >/dev/null && [[ -r $init ]]; then
            # shellcheck source=/dev/null
            source "$init" || true # whether there is the function is looked at next
        fi
    done
    type -t module >/dev/null ||
        fail "node $(hostname) has no \`module\` command for HPCTRAIN_MODULES=$HPCTRAIN_MODULES: export MODULESHOME, the \
folder that has init/bash, where you submit"
    # shellcheck disable=SC2086 # several names
    module load $HPCTRAIN_MODULES || fail "module load $HPCTRAIN_MODULES failed: correct HPCTRAIN_MODULES"
    set -u
}

enter_environment() {
    if [[ -n ${HPCTRAIN_VENV:-} ]]; then
        [[ -r $HPCTRAIN_VENV/bin/activate ]] ||
            fail "there is no environment in HPCTRAIN_VENV=$HPCTRAIN_VENV on node $(hostname): make it with slurm/install.sbatch"
        # shellcheck source=/dev/null
        source "$HPCTRAIN_VENV/bin/activate"
    fi
    python -m hpctrain --version >/dev/null ||
        fail "python on node $(hostname) has no hpctrain: set HPCTRAIN_VENV or HPCTRAIN_MODULES in the site file"
}

# One rank a GPU; without GPUs as many as were asked for.
count_ranks() {
    local mpi=${HPCTRAIN_MPI:-pmix} nodes=$SLURM_JOB_NUM_NODES
    case $mpi in
        pmix | pmix_v[0-9]* | none) ;;
        *)
            fail "HPCTRAIN_MPI is $mpi, with which each rank would start as a separate one-process MPI job: set it to pmix \
(srun --mpi=list)"
            ;;
    esac
    ((${SLURM_HET_SIZE:-1} == 1)) ||
        fail "this is a heterogeneous job of $SLURM_HET_SIZE parts, but ranks are started in one: submit it without \` : \`"
    [[ $mpi == none || $(srun --mpi=list 2>&1) =~ (^|[[:space:],])$mpi([[:space:],]|$) ]] ||
        fail "this Slurm has no $mpi for ranks to find each other by (srun --mpi=list): set HPCTRAIN_MPI to the pmix that it \
has, or to none together with HPCTRAIN_ENGINE=torch"
    gpus=${SLURM_GPUS_ON_NODE:-0}
    tasks=$((gpus > 0 ? gpus : 1))
    if [[ -n ${SLURM_NTASKS_PER_NODE:-} ]]; then
        tasks=$SLURM_NTASKS_PER_NODE
        ((${SLURM_NTASKS:-tasks * nodes} == tasks * nodes)) ||
            fail "SLURM_NTASKS=$SLURM_NTASKS and SLURM_NTASKS_PER_NODE=$tasks contradict each other on $nodes nodes: give one of \
--ntasks and --ntasks-per-node, and unset both variables where you submit"
    elif [[ -n ${SLURM_NTASKS:-} ]]; then
        ((SLURM_NTASKS % nodes == 0)) ||
            fail "$SLURM_NTASKS ranks cannot be shared out evenly among $nodes nodes: correct --ntasks, or give --ntasks-per-node"
        tasks=$((SLURM_NTASKS / nodes))
    fi
    ((gpus == 0 || tasks == gpus)) ||
        fail "tasks and GPUs differ, $tasks and $gpus a node: submit with --ntasks-per-node=$gpus, or ask for $tasks GPUs"
    ((gpus > 0 || ${HPCTRAIN_GPUS_PER_NODE:-0} == 0)) ||
        fail "this job has no GPUs, but the nodes of this site have $HPCTRAIN_GPUS_PER_NODE: add --gres=gpu:$HPCTRAIN_GPUS_PER_NODE"
    # What Slurm counts as a CPU: a hardware thread, where cores have two.
    cpus=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / tasks))}
    ((cpus >= 1 && cpus * tasks <= SLURM_CPUS_ON_NODE)) ||
        fail "$tasks ranks of $cpus CPUs do not fit the $SLURM_CPUS_ON_NODE that this job has of a node: \
correct --cpus-per-task, and unset SLURM_CPUS_PER_TASK where you submit"

    # Slurm from 22.05 on gives a step no CPUs by itself.
    rank_options=(--nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" --distribution=block
        --cpus-per-task="$cpus" --mpi="$mpi")
    # Rank 0 leaves last, when it has drawn what it measured; a site's WaitTime may be shorter than that takes. Here it is the
    # bound on ranks that hang while they leave.
    rank_options+=(--wait=300)
    # Every rank sees all GPUs of its node and takes its own: peers that cannot see each other cannot copy directly.
    ((gpus == 0)) || rank_options+=(--gpu-bind=none)
    # Open MPI of a virtual environment does not know Slurm's way to prove who is who, and says so on a page of text.
    export PMIX_MCA_psec=${PMIX_MCA_psec:-native}
}

# Where ranks meet: the job's first node, and a port of this job below those that any program may be given.
choose_meeting_place() {
    local hosts
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${hosts[0]:?scontrol did not tell the hosts of this job}
    if [[ -n ${MASTER_PORT:-} ]]; then
        ! is_taken "$MASTER_PORT" ||
            fail "port $MASTER_PORT of $MASTER_ADDR, where the ranks were to meet, is taken by another program: export another \
MASTER_PORT, or none"
    else
        MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
        while is_taken "$MASTER_PORT"; do MASTER_PORT=$((MASTER_PORT + 1)); done
        export MASTER_PORT
    fi
}

is_taken() { (exec 3<>"/dev/tcp/$MASTER_ADDR/$1") 2>/dev/null; } # a job script runs on that node

# With the folders that are named, and the one the job was submitted in, as they are outside.
enter_container() {
    local folder target name
    inside=()
    [[ -n ${HPCTRAIN_CONTAINER:-} ]] || return 0
    [[ -r $HPCTRAIN_CONTAINER ]] || fail "the container $HPCTRAIN_CONTAINER cannot be read on node $(hostname)"
    # PMIx would look for what Slurm tells the ranks in shared memory, whose files are not seen inside; hash is without files.
    inside=(apptainer exec --env PMIX_MCA_gds=hash)
    ((${SLURM_GPUS_ON_NODE:-0} == 0)) || inside+=(--nv)
    for folder in "$PWD" "$@"; do
        target=$(realpath -m -- "$folder") # of HPCTRAIN_SCRATCH not all may be there yet
        inside+=(--bind "$target")
        # Ranks are told of it by a name that may lead there through links.
        name=$(realpath -m -s -- "$folder")
        [[ $target == "$name" ]] || inside+=(--bind "$target:$name")
    done
    inside+=("$HPCTRAIN_CONTAINER")
}
