"""A denoising pass on the CPU in every width, over weights of every kind, as this processor is and as a plain AVX2 one.

    python benchmarks/cpu_widths.py                       # the processor as it is, and limited to AVX2
    python benchmarks/cpu_widths.py --processor native    # as it is, alone
    python benchmarks/cpu_widths.py --cpu --threads 1     # CPU time, which a busy machine changes least

110 M parameters at random: a bfloat16 file, the same in float32, and what the recipes 4bit and 8bit make of it. Each
setting of the processor is a process of its own, because torch and oneDNN read their limits when they are loaded. In it
passes of all models take turns, so that a busy machine slows all; a ratio is the median of the ratios to its neighbour
among the passes over the float32 file. `auto` is the width that `dgemma.load` takes by default, `best` the fastest for
a kind of weights. The table goes to stderr, rows to results/cpu_widths.jsonl, and the last line is JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from operator import truediv
from pathlib import Path
from typing import Any

import click
import rows
from quant_step import CANVAS, PROMPT, passes, write

from dgemma.convert import convert

LIMITS = {
    "native": {},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}  # fmt: skip
WIDTHS = ("float32", "bfloat16")
FOLDERS = ("bf16", "4bit", "8bit")
BASE = ("f32", "float32")
"""The folder and the width that all are compared with."""


def measure(work: Path, repeats: int, threads: int, *, cpu: bool) -> list[dict[str, Any]]:
    """Time all folders in all widths in turn, in this process; return rows."""
    from dgemma import backends
    from dgemma.checkpoints.checkpoint import Checkpoint
    from dgemma.runtime import auto_dtype

    runs = {BASE: work / BASE[0]} | {(name, width): work / name for name in FOLDERS for width in WIDTHS}
    times = passes(runs, repeats, threads, time.process_time if cpu else time.perf_counter)
    middle = {key: statistics.median(map(truediv, taken, times[BASE])) for key, taken in times.items()}
    found = []
    for name in (BASE[0], *FOLDERS):
        checkpoint = Checkpoint.open(work / name)
        auto = auto_dtype(checkpoint.config, checkpoint.stored_dtype, "torch", lambda: backends.native("torch", "cpu"))
        best = min(ratio for (folder, _), ratio in middle.items() if folder == name)
        for (folder, width), ratio in middle.items():
            if folder == name:
                found.append(
                    {
                        "weights": name, "width": width, "auto": width == auto,
                        "step_s": round(statistics.median(times[folder, width]), 4), "of_float32": round(ratio, 3),
                        "of_best": round(ratio / best, 3),
                    }
                )  # fmt: skip
    return found


def table(processor: str, found: list[dict[str, Any]]) -> list[str]:
    """The rows for people."""
    lines = [f"{processor}", f"  {'weights':<8} {'width':<9} {'pass':>8} {'of float32':>11} {'of best':>8}"]
    for row in found:
        lines.append(
            f"  {row['weights']:<8} {row['width']:<9} {row['step_s']:>6.3f} s {row['of_float32']:>11.2f} "
            f"{row['of_best']:>8.2f}{'  auto' if row['auto'] else ''}"
        )
    return lines


@click.command(help=__doc__)
@click.option("--processor", "processors", multiple=True, type=click.Choice(list(LIMITS)), help="[default: both]")
@click.option("--repeats", default=11, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--cpu", is_flag=True, help="Count CPU time; with one thread.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work; by default a temporary folder.")
@click.option("--child", is_flag=True, hidden=True)
def main(
    processors: tuple[str, ...], repeats: int, threads: int, cpu: bool, folder: Path | None, child: bool
) -> None:  # fmt: skip
    if child:
        assert folder is not None
        click.echo(json.dumps(measure(folder, repeats, threads, cpu=cpu)))
        return
    taken: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="dgemma-widths-", dir=folder) as made:
        work = Path(made)
        parameters = write(work / "bf16")
        write(work / "f32", dtype="float32")
        for recipe in FOLDERS[1:]:
            convert(work / "bf16", work / recipe, recipe)
        for processor in processors or tuple(LIMITS):
            arguments = ["--child", "--folder", str(work), "--repeats", str(repeats), "--threads", str(threads)]
            arguments += ["--cpu"] if cpu else []
            done = subprocess.run(
                [sys.executable, __file__, *arguments], env=os.environ | LIMITS[processor], stdout=subprocess.PIPE,
                text=True, check=True,
            )  # fmt: skip
            found = json.loads(done.stdout.splitlines()[-1])
            click.echo("\n".join(table(processor, found)), err=True)
            common = {
                "benchmark": "cpu_widths", "limited_to": processor, "parameters": parameters, "canvas": CANVAS,
                "prompt": PROMPT, "repeats": repeats, "threads": threads,
                "clock": "CPU time" if cpu else "wall",
            }  # fmt: skip
            taken += [rows.append("cpu_widths", common | row, "torch") for row in found]
    click.echo(json.dumps(taken))


if __name__ == "__main__":
    main()
