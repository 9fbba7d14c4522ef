"""Time the way of weights from the page cache to a card: `python benchmarks/loading.py --gb 4`.

A file of random bytes is written, and `--repeats` times mapped anew and copied tensor by tensor, as `dgemma.load` does
it (`load.Stager`), after once that does not count. A row with the median is appended to results/gpu.jsonl. What arrived
last is compared with the file. With `--device cpu` the same code runs without pinned memory and streams, and no row is
kept.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import rows
import torch

from dgemma.backends.cuda.load import CHUNK, LANES, THREADS, Stager
from dgemma.tools.bench_card import describe

TENSOR = 190 << 20
"""Bytes of one tensor: the 26B's gate and up projection of one layer has 260 MB in 4 bits, down 130."""

HEADER = 8 + 81_921
"""Bytes before the first tensor: in files they begin anywhere."""


def mapped(path: Path) -> np.ndarray:
    return np.memmap(path, np.uint8, "r", HEADER)


def send(path: Path, device: torch.device) -> tuple[float, list[torch.Tensor]]:
    """Copy all of a file that is mapped for it, since a page's first touch is part of loading → seconds, tensors."""
    began = time.perf_counter()
    stored, stager = mapped(path), Stager(device)
    sent = [stager.send(stored[at : at + TENSOR], torch.uint8) for at in range(0, len(stored), TENSOR)]
    stager.close()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, sent


@click.command(help=__doc__)
@click.option("--gb", type=click.FloatRange(min=0.1), default=4.0, show_default=True, help="10^9 bytes of the file.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
def main(gb: float, repeats: int, device: str) -> None:
    where = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        block = generator.integers(0, 256, 1 << 26, np.uint8)
        with path.open("wb") as file:
            file.write(bytes(HEADER))
            for i in range(int(gb * 1e9) // len(block)):
                file.write(np.roll(block, i).data)
        seconds = [send(path, where)[0] for _ in range(repeats + 1)][1:]
        stored, (_, sent) = mapped(path), send(path, where)
        for at, tensor in zip(range(0, len(stored), TENSOR), sent, strict=True):
            assert np.array_equal(tensor.cpu().numpy(), stored[at : at + TENSOR]), f"byte {at} and on arrived otherwise"
    row = {
        "benchmark": "loading", "gb": round(len(stored) / 1e9, 3), "repeats": repeats, "chunk_mb": CHUNK >> 20,
        "lanes": LANES, "threads": THREADS, "gb_per_second": round(len(stored) / statistics.median(seconds) / 1e9, 2),
    }  # fmt: skip
    row |= describe(where)
    click.echo(json.dumps(rows.append("gpu", row) if where.type == "cuda" else row))


if __name__ == "__main__":
    main()
