#!/usr/bin/env bash
# Everything about a card that this project claims, or will: in under nine minutes, appended to benchmarks/results/.
#
#     bash benchmarks/gpu.sh                 # all stages: check bench context batch profile loading tests versus
#     bash benchmarks/gpu.sh check bench     # some of them
#     bash benchmarks/gpu.sh options         # not among all: what is written and off, against what is on
#     bash benchmarks/gpu.sh tune            # not among all: every cut of the experts' kernels; the log has the tables
#     bash benchmarks/gpu.sh --dry           # every command on the CPU with a tiny model; rows go to a folder in /tmp
#
# Stages stand in order of worth and have their own time limits; one that fails is said so at the end and stops nothing.
# Rows go to gpu.jsonl with the device, its driver, the versions and the commit; everything printed to gpu.log. Where OUT
# names a folder, both are copied there after every stage.
# PYTHON names the interpreter (python3); the package need not be installed. COMMIT is written into rows where the tree
# is no repository. LIMIT is the seconds of the whole.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
results=benchmarks/results
limit=${LIMIT:-530}
model=(--random 26b --device cuda --steps 16) small=(--random 110m --device cuda --steps 4 --canvases 2)
same=(--check) uncaptured=(--plain) long=32768
tests=(-m gpu tests/test_cuda_*.py tests/test_kernels_*.py tests/test_joined.py)
versus=(--device cuda --prompt 1024 --steps 16 --repeats 3)
options=(--device cuda) tune=(--only experts) loading=(--gb 4)
if [[ ${1:-} == --dry ]]; then
    shift
    results=$(mktemp -d)
    model=(--random nano-like --device cpu --backend torch --steps 2 --canvases 2) small=("${model[@]}")
    same=() uncaptured=() long=2048
    tests=(tests/test_kernels_sampling.py)
    versus=(--help)
    options=(--device cpu --shape nano-like --context 64 --repeats 2) tune=(--help) loading=(--device cpu --gb 0.2)
fi
mkdir -p "$results"
rows=$results/gpu.jsonl
log=$results/gpu.log
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
summary=()
began=$SECONDS

if ! "$python" -c "import dgemma.core.ops" 2>/dev/null; then  # from a bare copy: the folder itself is the package
    ln -s "$PWD" "$work/dgemma"
    export PYTHONPATH=$work${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONUNBUFFERED=1

keep() {
    if [[ -n ${OUT:-} ]]; then cp -f "$rows" "$log" "$OUT" 2>/dev/null; fi
}

stage() {  # name, seconds, command …
    local name=$1 seconds=$2 left=$((limit - SECONDS + began)) code
    shift 2
    if ((left < 15)); then
        summary+=("$name: no time left")
        return
    fi
    ((seconds > left)) && seconds=$left
    echo "== $name: $*" | tee -a "$log"
    local at=$SECONDS
    timeout -k 5 "$seconds" "$@" 2>&1 | tee -a "$log" | tail -n 12
    code=${PIPESTATUS[0]}
    case $code in
        0) summary+=("$name: $((SECONDS - at)) s") ;;
        124 | 137) summary+=("$name: STOPPED after $seconds s") ;;
        *) summary+=("$name: FAILED ($code) after $((SECONDS - at)) s") ;;
    esac
    keep
}

bench() {  # name, seconds, options …: one row, also where the comparison with the plain loop fails
    local name=$1 seconds=$2
    shift 2
    : >"$work/row"
    stage "$name" "$seconds" bash -c 'exec "$0" -m dgemma --debug bench --json "${@:2}" >"$1"' \
        "$python" "$work/row" "$@"
    grep '^{' "$work/row" | tee -a "$log" >>"$rows"
    keep
}

declare -A stages=([options]=0 [tune]=0)
for one in check bench context batch versus tests profile loading; do stages[$one]=$(($# == 0)); done
for one in "$@"; do
    if [[ -z ${stages[$one]:-} ]]; then
        echo "gpu.sh: no stage '$one'; there are ${!stages[*]}, and --dry in front" >&2
        exit 2
    fi
    stages[$one]=1
done

{
    echo "#### $(date -u +%FT%TZ) ${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null)}"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$python" - <<'END'
import sys
from importlib.util import find_spec

stages = {"all": "torch triton numpy ml_dtypes click rich", "tests": "pytest hypothesis tokenizers",
          "versus": "transformers"}
print("python", sys.version.split()[0])
for stage, names in stages.items():
    missing = [name for name in names.split() if find_spec(name) is None]
    if missing:
        print(f"MISSING for {stage}: {', '.join(missing)}")
END
} 2>&1 | tee -a "$log"

# Does it run at all? Small first: a kernel that does not compile shows here. Kernels compile once and stay on the disk.
((stages[check])) && bench "smoke" 120 "${small[@]}" "${same[@]}"
# The headline, with the graph's tokens against the plain loop's; the time to the first draft is among its figures.
((stages[bench])) && bench "4bit" 150 "${model[@]}" --recipe 4bit --context 1024 "${same[@]}"
if ((stages[bench])) && [[ ! -s $work/row ]]; then  # what its kernels take, where nothing could be captured
    bench "4bit, uncaptured" 90 "${model[@]}" --recipe 4bit --context 1024 --canvases 2 --profile "${uncaptured[@]}"
fi
((stages[bench])) && bench "bf16" 75 "${model[@]}" --recipe bf16 --context 1024
((stages[bench])) && bench "8bit" 75 "${model[@]}" --recipe 8bit --context 1024
((stages[context])) && bench "4bit behind $long" 75 "${model[@]}" --recipe 4bit --context "$long" --canvases 2
((stages[batch])) && bench "4bit, batch 4" 90 "${model[@]}" --recipe 4bit --context 1024 --batch 4
((stages[profile])) && bench "4bit, kernel by kernel" 60 "${model[@]}" --recipe 4bit --context 1024 --canvases 2 --profile
((stages[loading])) && stage "loading" 60 "$python" benchmarks/loading.py "${loading[@]}"
if ((stages[tests])); then
    many=()  # each test compiles kernels of its own sizes, which is what takes the time
    "$python" -c "import xdist" 2>/dev/null && many=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
    stage "kernels against float64" 120 "$python" -m pytest -q -p no:warnings "${many[@]}" "${tests[@]}"
fi
((stages[options])) && stage "options" 200 "$python" benchmarks/pass_options.py "${options[@]}"
((stages[tune])) && stage "tune" 400 "$python" benchmarks/tune_kernels.py "${tune[@]}"
# Last, because transformers compiles for minutes.
((stages[versus])) && stage "against transformers" 300 "$python" benchmarks/vs_transformers.py "${versus[@]}"

if [[ -n ${COMMIT:-} && -f $rows ]]; then sed -i "s/\"commit\": \"unknown\"/\"commit\": \"$COMMIT\"/" "$rows"; fi
keep
echo
printf '%s\n' "${summary[@]}" "in all: $((SECONDS - began)) s" | tee -a "$log"
"$python" - "$rows" <<'END' 2>&1 | tee -a "$log"
import json, sys
from pathlib import Path

path = Path(sys.argv[1])
rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
for row in rows[-10:]:
    if row["benchmark"] == "bench":
        share = row["share_of_copy"]
        print(f"{row['shape']} {row['recipe']:5} context {row['context']:6} batch {row['batch']}: "
              f"{row['tokens_per_second']:8.1f} tok/s (engine {row['engine_tokens_per_second']:8.1f}), "
              f"forward {row['forward_ms']:7.3f} ms, denoise {row['denoise_ms']:7.3f}, commit {row['commit_ms']:7.3f}, "
              f"first draft {row['first_draft_ms']:6.1f}, {'?' if share is None else format(share, '.0%')} of copy, "
              f"peak {row['peak_gb']} GB, captured: {row['captured']}, "
              f"graph = plain: {row.get('captured_equals_plain', 'not asked')}")
    elif row["benchmark"] == "pass_options":
        took = f"{row['denoise_ms']:7.3f} ms a pass" if "denoise_ms" in row else f"{row['canvas_ms']:7.3f} ms a canvas"
        print(f"{row['option']:16} {took}, {row['of_shipped']:.3f} of shipped, same tokens: {row['same_tokens']}")
    elif row["benchmark"] == "loading":
        print(f"loading {row['gb']} GB from the page cache: {row['gb_per_second']} GB/s")
    else:
        print(f"transformers {row['transformers']}: {row['transformers_tokens_per_second']} tok/s, ours "
              f"{row['dgemma_tokens_per_second']}, {row['speedup']} times")
END
keep
echo "rows in $rows"
