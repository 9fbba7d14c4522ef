"""Converting, against what reading, `mx.quantize` and writing the same tensors takes in one script.

    python benchmarks/convert.py --gb 6
    python benchmarks/convert.py --gb 6 --kills 10

A random bf16 checkpoint of the released model's shapes is written (fewer layers, a smaller vocabulary), then each way
runs in a process of its own. The last line is JSON, which is appended to results/convert.jsonl.

Reported: megabytes of source a second of both ways, their ratio, CPU seconds, and the converter's peak resident memory:
that of its largest process, times their number.
MLX quantizes with its own fit (minimum and maximum); ours searches scales for the least squared error, measures the
error, syncs to the disk and hashes besides.

With --kills the converter is killed (SIGKILL, while its workers are at it) at so many random moments spread over the
conversion, each time taken up by the same command, and what it ends with is compared with a conversion in one go.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import rows

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent / "tests" / "data" / "config_26b.json"
LAYER = 1.63  # gigabytes of one layer


def make(folder: Path, gigabytes: float) -> int:
    """Write a random checkpoint of about so many bytes; returns the bytes of its tensors."""
    import ml_dtypes
    import numpy as np

    from dgemma.checkpoints import weights
    from dgemma.convert.plan import Component, lay_out_components
    from dgemma.core.config import ModelConfig

    config = json.loads(CONFIG.read_text())
    text = config["text_config"]
    layers = max(1, int((gigabytes - 0.2) / LAYER))
    text["num_hidden_layers"] = layers
    text["layer_types"] = ["sliding_attention"] * (layers - 1) + ["full_attention"]
    if gigabytes < 2:  # experts are most of a layer
        text["num_experts"] = max(8, int(128 * gigabytes / 2) // 8 * 8)
    left = int((gigabytes - layers * LAYER) * 1e9) if gigabytes > 2 else 0
    text["vocab_size"] = min(max(left // (2 * text["hidden_size"]), 1 << 15), 1 << 18)
    config["image_token_id"] = config["eoi_token_id"] = config["boi_token_id"] = 3
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = weights.shapes(ModelConfig.from_hf(config))
    parts = [
        Component(name=name, kind="weight", dtype="BF16", shape=shape, row_bytes=2 * shape[-1])
        for name, shape in shapes.items()
    ]
    (shard,) = lay_out_components([parts], style="pt")
    draw = np.random.default_rng(0)
    # One block of noise, again and again from different places: drawing 3 G numbers would take minutes.
    noise = (0.02 * draw.standard_normal(1 << 22, np.float32)).astype(ml_dtypes.bfloat16)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(shard.header)
        for name in sorted(shard.places, key=lambda one: shard.places[one]):
            left = next(one for one in parts if one.name == name).nbytes // 2
            while left:
                start = int(draw.integers(0, len(noise) // 2))
                run = noise[start : start + left]
                file.write(run.view(np.uint8).data)
                left -= len(run)
    return shard.size


BASELINE = """
import sys, time
import mlx.core as mx
from pathlib import Path

# What a straightforward script does: load lazily, quantize by the same recipe, write in files of bounded size.
mx.set_default_device(mx.cpu)
source, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir()
began = time.perf_counter()
tensors = mx.load(str(source / "model.safetensors"))
shard, size, count = {}, 0, 0
for name, value in tensors.items():
    module = name.removesuffix(".weight")
    matrix = module.endswith(("_proj", "embed_tokens"))
    if matrix:
        bits = 4 if ".experts." in name else 8
        parts = mx.quantize(value, group_size=32, bits=bits)
        shard |= {f"{module}.{kind}": part for kind, part in zip(("weight", "scales", "biases"), parts)}
    else:
        shard[name] = value
    mx.eval(shard)
    size += value.nbytes
    if size > 1 << 30:
        mx.save_safetensors(str(out / f"{count}.safetensors"), shard)
        shard, size, count = {}, 0, count + 1
mx.save_safetensors(str(out / f"{count}.safetensors"), shard)
print(time.perf_counter() - began)
"""

OURS = """
import sys, time, json
from dgemma.convert import convert
began = time.perf_counter()
report = convert(sys.argv[1], sys.argv[2], sys.argv[3], workers=int(sys.argv[4]))
print(json.dumps({"seconds": time.perf_counter() - began, "bits": report.bits_per_weight, "worst": report.worst[1]}))
"""


def timed(code: str, *args: Any) -> tuple[str, int, float]:
    """Run a script; returns what it printed last, the peak resident bytes so far, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout.strip().splitlines()[-1], after.ru_maxrss * (1 if sys.platform == "darwin" else 1024), spent


def killed(work: Path, recipe: str, workers: int, kills: int, seed: int) -> dict[str, Any]:
    """Convert in one go, then again with kills on the way; returns when they came, and whether all files are the same.

    Moments are drawn as shares of the conversion's runs of rows, and as a fraction of a second behind the first journal
    entry that reaches such a share: so every kill finds a run that has done some work of its own, and has some left.
    """
    from dgemma.convert import recipes
    from dgemma.convert.encode import runs
    from dgemma.convert.job import prepare

    job = prepare(work / "source", recipes.find(recipe))
    total = sum(len(list(runs(item))) for item in job.items)
    timed(OURS, work / "source", work / "whole", recipe, workers)
    draw = random.Random(seed)
    journal = work / "out.partial" / ".dgemma" / "journal.jsonl"
    moments: list[dict[str, float]] = []

    def done() -> int:
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    for share in sorted(draw.uniform(0.02, 0.95) for _ in range(kills)):
        before = done()
        command = [sys.executable, "-c", OURS, *map(str, (work / "source", work / "out", recipe, workers))]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and done() < max(share * total, before + 1):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        crew = psutil.Process(process.pid).children() if process.poll() is None else []
        active = sum(one.cpu_percent(0.05) > 0 for one in crew)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL or (work / "out").exists():
            raise SystemExit("it ended before it was killed: take a larger source")
        moments.append({"share": round(done() / total, 3), "before": round(before / total, 3), "workers": active})
        print(f"killed with {done()} of {total} runs done, {active} workers at work", file=sys.stderr, flush=True)
    timed(OURS, work / "source", work / "out", recipe, workers)
    one, other = ({path.name: file_hash(path) for path in (work / n).iterdir()} for n in ("whole", "out"))
    return {"kills": kills, "runs": total, "files": len(one), "same": one == other, "moments": moments}


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gb", type=float, default=6.0, help="size of the source")
    parser.add_argument("--recipe", default="4bit")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="both take turns; the best of each counts")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="kill it N times instead, and compare")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="dgemma-convert-", dir=args.folder))
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    peak = 0
    try:
        size = make(work / "source", args.gb)
        print(f"source of {size / 1e9:.2f} GB", file=sys.stderr)
        if args.kills:
            found = killed(work, args.recipe, args.workers, args.kills, args.seed)
            print(json.dumps(rows.append("convert", {"benchmark": "convert-kills"} | _common(args, size) | found)))
            return
        for i in range(args.rounds):
            said, held, cpu = timed(OURS, work / "source", work / f"ours-{i}", args.recipe, args.workers)
            ours.append(json.loads(said) | {"cpu": cpu})
            peak = peak or held  # before the script's own peak counts too
            shutil.rmtree(work / f"ours-{i}")
            said, _, cpu = timed(BASELINE, work / "source", work / f"theirs-{i}")
            theirs.append({"seconds": float(said), "cpu": cpu})
            shutil.rmtree(work / f"theirs-{i}")
            took = f"ours {ours[-1]['seconds']:.1f} s, the script {theirs[-1]['seconds']:.1f} s"
            print(f"round {i + 1}: {took}", file=sys.stderr)
    finally:
        shutil.rmtree(work)
    best, script = (min(one["seconds"] for one in way) for way in (ours, theirs))
    row = {
        "benchmark": "convert", **_common(args, size),
        "ours_s": round(best, 2), "script_s": round(script, 2),
        "ours_cpu_s": round(min(one["cpu"] for one in ours), 1),
        "script_cpu_s": round(min(one["cpu"] for one in theirs), 1),
        "ours_mb_per_s": round(size / best / 1e6, 1), "script_mb_per_s": round(size / script / 1e6, 1),
        "ratio": round(script / best, 3), "peak_gb": round(peak * (args.workers + 1) / 1e9, 3),
        "bits_per_weight": round(ours[0]["bits"], 3),
    }  # fmt: skip
    print(json.dumps(rows.append("convert", row)))


def _common(args: argparse.Namespace, size: int) -> dict[str, Any]:
    return {"workers": args.workers, "source_gb": round(size / 1e9, 3), "recipe": args.recipe}


if __name__ == "__main__":
    main()
