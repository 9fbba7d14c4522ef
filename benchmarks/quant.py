"""Speed and error of every format beside MLX's on the same CPU: `python benchmarks/quant.py [--rows R] [--width N]`.

Prints a table, then one line of JSON. Error is ‖w - ŵ‖ / ‖w‖ of bf16 weights; MLX stores
bf16 scales, as in a checkpoint. Speed is million weights per CPU second, best of five, both on one thread (`two`: per
second of wall time, with two workers): CPU time, because the machine may be busy with something else. Symmetric
formats, which MLX has not, stand beside MLX's affine of the same bits and group: half a bit a weight more.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from dgemma.checkpoints.quant import (
    Format,
    carry,
    dequantize,
    from_bf16,
    nvfp4_global_scale,
    quantize,
    relative_error,
    to_bf16,
)

FORMATS = [
    Format(bits=4, symmetric=True), Format(bits=8, symmetric=True),
    *(Format(bits=bits, group_size=64) for bits in (2, 3, 4, 5, 6, 8)), Format(bits=4), Format(bits=8),
    Format(mode="mxfp4"), Format(mode="mxfp8", bits=8), Format(mode="nvfp4", group_size=16),
]  # fmt: skip


def best(call: Callable[[], object], clock: Callable[[], float] = time.process_time, times: int = 5) -> float:
    """Return the shortest time of a call, in seconds of the clock."""
    spans = []
    for _ in range(times):
        start = clock()
        call()
        spans.append(clock() - start)
    return min(spans)


def mlx_parts(w: mx.array, kind: Format) -> list[mx.array]:
    parts = mx.quantize(w, group_size=kind.group_size, bits=kind.bits, mode=kind.mode, stream=mx.cpu)
    mx.eval(parts)
    return list(parts)


def measure(kind: Format, samples: dict[str, np.ndarray], scaled: bool) -> dict[str, object]:
    """Return one row of the table."""
    row: dict[str, object] = {"format": json.dumps(kind.to_config()), "bits": kind.bits_per_weight, "scaled": scaled}
    plain = Format(mode=kind.mode, bits=kind.bits, group_size=kind.group_size)
    for which, w in samples.items():
        factor = float(nvfp4_global_scale(w)) if scaled else None
        parts = mlx_parts(mx.array(w).astype(mx.bfloat16), kind)
        stored = [np.array(part.view(mx.uint16) if part.dtype == mx.bfloat16 else part) for part in parts]
        row[which] = relative_error(w, quantize(w, kind, global_scale=factor))
        row[f"mlx {which}"] = relative_error(w, carry(*stored, format=plain))
    w = to_bf16(samples["normal"])
    array = mx.array(w).view(mx.bfloat16)
    factor = float(nvfp4_global_scale(w)) if scaled else None
    q = quantize(w, kind, global_scale=factor)
    rate = {
        "ours": best(lambda: quantize(w, kind, global_scale=factor)),
        "two": best(lambda: quantize(w, kind, global_scale=factor, workers=2), time.perf_counter),
        "mlx": best(lambda: mlx_parts(array, kind)),
        "dequantize": best(lambda: dequantize(q)),
    }
    row |= {key: w.size / span / 1e6 for key, span in rate.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--width", type=int, default=2816)
    options = parser.parse_args()
    generator, shape = np.random.default_rng(0), (options.rows, options.width)
    draws = {
        "normal": generator.standard_normal(shape),
        "laplace": generator.laplace(size=shape),
        "t5": generator.standard_t(5, size=shape),
    }
    samples = {which: from_bf16(to_bf16((0.02 * draw).astype(np.float32))) for which, draw in draws.items()}
    print(f"{'format':24} bpw   {'normal':13} {'laplace':13} {'t5':13}  Mw/s: ours  two  mlx  ratio  dequantize")
    rows = []
    for kind, scaled in [*((kind, False) for kind in FORMATS), (FORMATS[-1], True)]:
        row = measure(kind, samples, scaled)
        rows.append(row)
        label = f"{kind.mode} {kind.bits} g{kind.group_size}{' symmetric' * kind.symmetric}{' scaled' * scaled}"
        errors = " ".join(f"{row[which]:.4f}/{row[f'mlx {which}']:.4f}" for which in samples)
        speeds = f"{row['ours']:15.0f} {row['two']:5.0f} {row['mlx']:4.0f}  {row['ours'] / row['mlx']:5.2f}"
        print(f"{label:24} {kind.bits_per_weight:.2f}  {errors} {speeds} {row['dequantize']:6.0f}", flush=True)
    print(json.dumps({"bench": "quant", "shape": shape, "mlx": mx.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
