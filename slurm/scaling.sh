#!/usr/bin/env bash
# Measures scaling: a training job for each size and repeat, then a job that reports on them when the last has ended.
#
#   slurm/scaling.sh configs/imagenet.yaml 1x1 1 2 4 8 --site slurm/sites/dgx.env --repeats 3 -- \
#       data.path=/data/imagenet train.max_steps=300 train.eval_every_epochs=none
#
# Sizes are nodes, each with all its GPUs; 1x1 is one node with one GPU, the smallest baseline. Options:
#   --repeats R         jobs of each size (default 3); the sizes take turns, so that a slow hour hits all of them
#   --strong | --weak   one kind of scaling alone (default: both). Weak leaves the batch a worker as it is; strong keeps
#                       the global batch of the smallest size
#   --site FILE         as for hpctrain submit (default: $HPCTRAIN_SITE)
#   --tasks-per-node T  ranks a node, on a site without GPUs
#   --engine E, --time T   as for hpctrain submit
#   --out DIR           folder of the runs and of the report (default: runs/scaling-…)
#   --dry-run           print all that would be submitted
# What stands behind -- changes the configuration, the same in all jobs. `hpctrain` must be on PATH here.
#
# Run on a CPU cluster of four nodes. Not yet run: sizes in GPUs.
set -euo pipefail

fail() {
    echo "scaling.sh: $*" >&2
    exit 2
}
usage() {
    sed -n '2,/^set -/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit "$1"
}

(($# > 0)) || usage 2
[[ $1 != -h && $1 != --help ]] || usage 0
config=$1
shift
[[ -r $config ]] || fail "the configuration $config cannot be read: name a YAML recipe first, then the sizes"
sizes=() modes=() common=() sets=()
repeats=3 tasks='' out='' dry_run=no
while (($# > 0)); do
    case $1 in
        --repeats | --site | --tasks-per-node | --engine | --time | --out)
            (($# > 1)) || fail "$1 wants a value behind it"
            ;;&
        --repeats) repeats=$2 && shift 2 ;;
        --tasks-per-node) tasks=$2 && shift 2 ;;
        --out) out=$2 && shift 2 ;;
        --site | --engine | --time) common+=("$1" "$2") && shift 2 ;;
        --strong | --weak) modes+=("$1") && shift ;;
        --dry-run) dry_run=yes && shift ;;
        --)
            shift
            for override in "$@"; do sets+=(--set "$override"); done
            break
            ;;
        *)
            [[ $1 =~ ^[1-9][0-9]*(x[1-9][0-9]*)?$ ]] ||
                fail "$1 is neither a size (4, or 1x2 for a node with two GPUs) nor an option: see scaling.sh --help"
            sizes+=("$1") && shift
            ;;
    esac
done
[[ $repeats =~ ^[1-9][0-9]*$ ]] || fail "--repeats is $repeats: give a number from 1 up"
((${#sizes[@]} > 0)) || fail "no sizes given: name at least two, such as 1 2 4 8"
command -v hpctrain >/dev/null || fail "hpctrain is not on PATH: activate its environment here"
name=${config##*/}
out=$(realpath -m -- "${out:-runs/scaling-${name%.*}-$(date +%Y%m%d-%H%M%S)}")
export HPCTRAIN_RUNS=$out

# The words of `hpctrain submit` for a size, in the array `size_options`.
set_size() {
    local nodes=${1%x*} ranks=${tasks}
    [[ $1 != *x* ]] || ranks=${1#*x}
    size_options=(--nodes "$nodes")
    if [[ -n $tasks ]]; then
        size_options+=(--tasks-per-node "$ranks")
    elif [[ -n $ranks ]]; then
        size_options+=(--gpus-per-node "$ranks")
    fi
}

# What a size comes to is for `hpctrain submit` to say; whatever it refuses, it refuses before any job is there.
declare -A size_of
workers=() options_of_site=()
for size in "${sizes[@]}"; do
    set_size "$size"
    line=$(hpctrain submit "$config" "${size_options[@]}" "${common[@]}" "${sets[@]}" --dry-run)
    line=${line%%/slurm/train.sbatch*} # sbatch and its options
    [[ $line =~ --nodes=([0-9]+)\ --ntasks-per-node=([0-9]+) ]] || fail "hpctrain submit tells no size in: $line"
    count=$((BASH_REMATCH[1] * BASH_REMATCH[2]))
    [[ -z ${size_of[$count]:-} ]] || fail "$size and ${size_of[$count]} are both $count workers: leave one out"
    size_of[$count]=$size
    workers+=("$count")
    mapfile -t options_of_site < <(grep -oE -- "--(partition|account|qos)=[^[:space:]']+" <<<"$line")
done
plan=$(hpctrain scaling plan "$config" "${modes[@]}" "${sets[@]}" -- "${workers[@]}")
smallest=$(printf '%s\n' "${workers[@]}" | sort -n | head -n 1)
((smallest == 1)) || echo "the smallest size has $smallest workers, and efficiency will be against it: add the size 1x1 to have \
it against one (strong scaling then keeps the global batch of that one)"
[[ $dry_run == no ]] || printf 'HPCTRAIN_RUNS=%q for all that follows\n' "$out"

submitted=() runs=()
cancel() {
    ((${#submitted[@]} == 0)) || scancel "${submitted[@]}" || true
    fail "not all jobs could be submitted, so those that were are cancelled: ${submitted[*]:-none}"
}
for ((repeat = 1; repeat <= repeats; repeat++)); do
    while read -r count batch; do
        set_size "${size_of[$count]}"
        submit=(hpctrain submit "$config" "${size_options[@]}" "${common[@]}" "${sets[@]}"
            --set "train.batch_per_worker=$batch")
        if [[ $dry_run == yes ]]; then
            told=$("${submit[@]}" --dry-run)
            echo "repeat $repeat: ${told%%$'\n\n# '*}"
            continue
        fi
        told=$("${submit[@]}" --parsable) || cancel
        { read -r job && IFS= read -r run; } <<<"$told" || cancel
        submitted+=("$job") runs+=("$run")
        echo "job ${submitted[-1]}: $count workers, $batch samples each, repeat $repeat: ${runs[-1]}"
    done <<<"$plan"
done

# A script of its own, to be run again by hand when a run was repeated.
((${#runs[@]} > 0)) || runs=("RUN...")
report=(hpctrain scaling report --skip-unfinished "${runs[@]}" --out "$out/report" --json "$out/report/scaling.json")
report_text="#!/usr/bin/env bash
exec$(printf ' %q' "$(command -v hpctrain)" "${report[@]:1}")"
dependency=$(IFS=: && echo "afterany:${submitted[*]:-JOB:...}")
batch=(sbatch --parsable --nodes=1 --ntasks=1 --time=10 --job-name=scaling-report --dependency="$dependency"
    --output="${out//%/%%}/report-%j.log" "${options_of_site[@]}" "$out/report.sbatch")
if [[ $dry_run == yes ]]; then
    printf 'then:%s\n' "$(printf ' %q' "${batch[@]}")"
    echo "$report_text"
    exit 0
fi
mkdir -p "$out"
echo "$report_text" >"$out/report.sbatch"
job=$("${batch[@]}") || fail "no job for the report; when all have ended, run: bash $(printf '%q' "$out/report.sbatch")"
echo "job $job: the report, when all have ended: $out/report/scaling.txt"
