#!/usr/bin/env bash
# Everything about a card that this project claims, or will: in under nine minutes, appended to benchmarks/results/.
#
#     bash benchmarks/gpu.sh                 # all stages
#     bash benchmarks/gpu.sh check bench     # some of them
#
# Stages stand in order of worth and have their own time limits; one that fails is said so at the end and stops nothing.
# Rows go to gpu.jsonl with the device, its driver, the versions and the commit; everything printed to gpu.log.
# PYTHON names the interpreter (python3); the package need not be installed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
results=${RESULTS:-benchmarks/results}
mkdir -p "$results"
rows=$results/gpu.jsonl
log=$results/gpu.log
summary=()
began=$SECONDS
limit=${LIMIT:-530}

if ! "$python" -c "import dgemma.core.ops" 2>/dev/null; then  # from a bare copy: the folder itself is the package
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    ln -s "$PWD" "$site/dgemma"
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONUNBUFFERED=1

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
    timeout -k 5 "$seconds" "$@" 2>&1 | tee -a "$log" | tail -n "${SHOWN:-12}"
    code=${PIPESTATUS[0]}
    case $code in
        0) summary+=("$name: $((SECONDS - at)) s") ;;
        124 | 137) summary+=("$name: STOPPED after $seconds s") ;;
        *) summary+=("$name: FAILED ($code) after $((SECONDS - at)) s") ;;
    esac
}

bench() {  # name, seconds, options …: one row
    local name=$1 seconds=$2
    shift 2
    stage "$name" "$seconds" bash -c '"$0" -m dgemma bench "${@:2}" | tee >(tail -n 1 | grep "^{" >>"$1")' \
        "$python" "$rows" --random 26b --device cuda --steps 16 --json "$@"
}

declare -A stages
stages[check]=1 stages[bench]=1 stages[context]=1 stages[batch]=1 stages[profile]=1 stages[versus]=1
if (($#)); then
    for one in "${!stages[@]}"; do stages[$one]=0; done
    for one in "$@"; do stages[$one]=1; done
fi

{
    echo "#### $(date -u +%FT%TZ) $(git rev-parse --short HEAD 2>/dev/null)"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
} | tee -a "$log"

# Does it run at all, and is it right? Small first: a kernel that does not compile shows here, in seconds.
if ((stages[check])); then
    stage "smoke" 60 "$python" -m dgemma bench --random 110m --device cuda --steps 4 --canvases 2 --check --json
    stage "kernels against float64" 120 "$python" -m pytest -m gpu -q -p no:warnings tests/test_cuda_*.py tests/test_kernels_*.py
fi
# The headline, with the graph's tokens against the plain loop's; the time to the first draft is among its figures.
((stages[bench])) && bench "4bit" 75 --recipe 4bit --context 1024 --check
((stages[bench])) && bench "8bit" 60 --recipe 8bit --context 1024
((stages[bench])) && bench "bf16" 60 --recipe bf16 --context 1024
((stages[context])) && bench "4bit behind 32k" 60 --recipe 4bit --context 32768 --canvases 2
((stages[batch])) && bench "4bit, batch 4" 60 --recipe 4bit --context 1024 --batch 4
((stages[profile])) && bench "4bit, kernel by kernel" 60 --recipe 4bit --context 1024 --canvases 2 --profile
# Last, because transformers compiles for minutes.
((stages[versus])) && stage "against transformers" 240 \
    "$python" benchmarks/vs_transformers.py --device cuda --prompt 1024 --steps 16 --repeats 3

echo
printf '%s\n' "${summary[@]}" "in all: $((SECONDS - began)) s" | tee -a "$log"
"$python" - "$rows" <<'END'
import json, sys
from pathlib import Path

path = Path(sys.argv[1])
rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
for row in rows[-8:]:
    if row["benchmark"] == "bench":
        print(f"{row['recipe']:5} context {row['context']:6} batch {row['batch']}: {row['tokens_per_second']:8.1f} tok/s "
              f"(engine {row['engine_tokens_per_second']:8.1f}), forward {row['forward_ms']:7.3f} ms, "
              f"denoise {row['denoise_ms']:7.3f}, commit {row['commit_ms']:7.3f}, first draft {row['first_draft_ms']:6.1f}, "
              f"{row['share_of_copy']:.0%} of copy, peak {row['peak_gb']} GB, graph = plain: "
              f"{row.get('captured_equals_plain', 'not asked')}")
    else:
        print(f"transformers {row['transformers']}: {row['transformers_tokens_per_second']} tok/s, ours "
              f"{row['dgemma_tokens_per_second']}, {row['speedup']} times")
END
