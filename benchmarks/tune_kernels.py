"""Time every cut of the matrix kernels on this card: `python benchmarks/tune_kernels.py [--rows N] [--only experts]`.

Prints, for each product of the 26B model's layer, the fastest cuts with their bandwidth and rate, and last the lines
for `TUNED` in backends/cuda/kernels/configs.py. Before it is timed, every cut's result is compared with that of a cut
whose result was compared with torch's on the dequantized weights; one that is wrong, or does not compile, is named and
left out.

Times are medians of replays of a CUDA graph. Weights of dense layers rotate among copies that no cache holds together;
the experts' are larger than any cache. Rows choose 8 of 128 experts at random, or, with --skew, some far oftener.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import triton

from dgemma.backends.cuda.kernels import experts, linear, routing
from dgemma.backends.cuda.kernels.configs import Config, card, for_experts, for_linear
from dgemma.backends.cuda.kernels.unpack import Weight, arrange, stored
from dgemma.backends.torch import experts as dense_experts
from dgemma.backends.torch.packed import QuantizedTensor, dequantize
from dgemma.checkpoints.quant import Format
from dgemma.tools.bench_card import copy_bandwidth, describe, maker

EXPERTS, CHOICES, WIDTH, INNER = 128, 8, 2816, 704
DENSE = {
    "q, k, v": ("linear", (8192, 2816)),
    "q, k (full)": ("linear", (9216, 2816)),
    "o": ("linear", (2816, 4096)),
    "o (full)": ("linear", (2816, 8192)),
    "gate, up": ("geglu", (4224, 2816)),
    "down": ("linear", (2816, 2112)),
}
COLD = 256 << 20
"""Bytes of weights to rotate among: five times the largest L2 cache of today."""

TOLERANCE = 0.02
"""Of the signal: bfloat16 results are within 0.005, a wrong one is far beyond."""


def formats(bits: int) -> Format | None:
    return None if bits == 16 else Format(bits=bits, group_size=32, symmetric=True)


def cuts(tokens: Iterable[int], bits: int, depths: Iterable[int], split: int = 1) -> list[Config]:
    """Return what is tried."""
    shapes = ((64, 4), (128, 4), (128, 8), (256, 8))
    return [
        Config(rows=rows, tokens=columns, block=block, stages=stages, warps=warps, split=split)
        for (rows, warps), columns, block, stages in itertools.product(
            shapes, tokens, (32, 64) if bits == 16 else (64, 128), depths
        )
        if rows * columns <= 128 * 256
    ]


def median_us(run: Callable[[], Any], times: int = 1) -> float:
    """Return microseconds of one of `times` calls that `run` makes."""
    return float(triton.testing.do_bench_cudagraph(run, rep=40, return_mode="median")) * 1e3 / times


class Bench:
    """Tries cuts of one product and keeps the times."""

    def __init__(self, name: str, key: tuple[Any, ...], moved: float, work: float, copy: float) -> None:
        self.name, self.key, self.moved, self.work, self.copy = name, key, moved, work, copy
        self.times: list[tuple[float, Config]] = []

    def try_cut(
        self, cut: Config, run: Callable[[], torch.Tensor], want: torch.Tensor, timed: Callable[[], float] | None = None
    ) -> None:
        try:
            error = relative(run(), want)
            if error < TOLERANCE:
                self.times.append((timed() if timed else median_us(run), cut))
            else:
                print(f"  {self.name}: WRONG by {error:.3g}: {cut}")
        except (triton.errors.TritonError, RuntimeError) as failed:  # the compiler's, the assembler's, or the card's
            print(f"  {self.name}: {type(failed).__name__}: {cut}")

    def table(self, most: int = 6) -> None:
        print(f"\n{self.name}: {self.moved / 1e6:.1f} MB, {self.work / 1e9:.1f} GFLOP")
        for us, cut in sorted(self.times, key=lambda one: one[0])[:most]:
            rate = self.moved / us * 1e6
            print(
                f"  {us:8.1f} µs {rate / 1e9:6.0f} GB/s ({rate / self.copy:4.0%} of copy)"
                f" {self.work / us / 1e6:5.0f} TFLOP/s"
                f"   {cut.rows}x{cut.tokens}x{cut.block} stages {cut.stages} warps {cut.warps} split {cut.split}"
            )

    def best(self, allowed: Callable[[Config], bool] = lambda _: True) -> tuple[float, Config] | None:
        return min((one for one in self.times if allowed(one[1])), key=lambda one: one[0], default=None)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def whole(weight: Weight) -> torch.Tensor:
    return dequantize(weight, torch.bfloat16) if isinstance(weight, QuantizedTensor) else weight


def drawn(rows: int, skew: float, device: torch.device) -> torch.Tensor:
    """Return int32 [rows, 8]: experts, by weights that fall as rank^-skew."""
    chance = torch.arange(1, EXPERTS + 1, device=device).float() ** -skew
    return torch.multinomial(chance.expand(rows, -1), CHOICES).int()


def tune_experts(rows: int, bits: int, skew: float, copy: float, device: torch.device) -> list[Bench]:
    make = maker(device)
    gate_up = make((EXPERTS, 2 * INNER, WIDTH), formats(bits), 1)
    down = make((EXPERTS, WIDTH, INNER), formats(bits), 2)
    x = torch.randn(rows, WIDTH, device=device).bfloat16()
    index = drawn(rows, skew, device)
    mean = -(-rows * CHOICES // EXPERTS)
    first, second = stored(gate_up), stored(down)
    work = 2.0 * rows * CHOICES * WIDTH * INNER
    touched = len(index.unique()) / EXPERTS
    gate = Bench(
        "gate_up",
        ("gate_up", bits, 2 * INNER, WIDTH, mean),
        touched * gate_up.nbytes + 2 * rows * WIDTH,
        2 * work,
        copy,
    )
    back = Bench(
        "down",
        ("down", bits, WIDTH, INNER, mean),
        touched * down.nbytes + 2 * rows * CHOICES * (WIDTH + INNER),
        work,
        copy,
    )
    shares = torch.ones(rows, CHOICES, device=device) / CHOICES
    want = dense_experts.expert_mlp(x, index, shares, whole(gate_up), whole(down))
    table = for_experts(card(device), bits, (2 * INNER, WIDTH), mean)
    ready = arrange(x, bits)
    for tile in (16,) if mean <= 8 else (16, 32) if mean <= 20 else (32, 64, 128):
        plan = routing.schedule(index, EXPERTS, tile)
        usual = [replace(cut, tokens=tile, stages=3) for cut in table]
        hidden = experts.gate_up_geglu(ready, plan, first, bits, CHOICES, usual[0])
        results = experts.down_project(hidden, plan, second, usual[1])
        error = relative(experts.combine(results, shares), want)
        if not error < TOLERANCE:
            raise SystemExit(f"tune_kernels: the experts in tiles of {tile} are wrong by {error:.3g}")
        for cut in cuts((tile,), bits, (3, 4, 5)):
            gate.try_cut(cut, partial(experts.gate_up_geglu, ready, plan, first, bits, CHOICES, cut), hidden)
            back.try_cut(cut, partial(experts.down_project, hidden, plan, second, cut), results)
    return [gate, back]


def tune_dense(name: str, rows: int, bits: int, copy: float, device: torch.device) -> Bench:
    kernel, (height, width) = DENSE[name]
    make = maker(device)
    first = make((height, width), formats(bits), 3)
    copies = [first, *(make((height, width), formats(bits), 4 + i) for i in range(COLD // first.nbytes))]
    x = torch.randn(rows, width, device=device).bfloat16()
    ready = arrange(x, bits)
    moved = first.nbytes + 2.0 * rows * (width + height // (2 if kernel == "geglu" else 1))
    bench = Bench(name, (kernel, bits, height, width, rows), moved, 2.0 * rows * height * width, copy)
    dense = whole(first)
    product = torch.nn.functional.linear(x, dense)
    if kernel == "geglu":
        gate, up = product.float().chunk(2, -1)
        want = torch.nn.functional.gelu(gate, approximate="tanh") * up
    else:
        want = product
    run = linear.geglu if kernel == "geglu" else linear.linear
    sizes = [size for size in (32, 64, 128, 256) if rows // 4 <= size <= max(32, rows)]
    tried = [for_linear(card(device), kernel, bits, (height, width), rows), *cuts(sizes, bits, (3, 4))]
    if kernel == "linear" and height < 4096:
        tried += cuts(sizes, bits, (3,), split=2)
    for cut in tried:

        def every(cut: Config = cut) -> None:
            for one in copies:
                run(ready, one, arranged=True, config=cut)

        timed = partial(median_us, every, len(copies))
        bench.try_cut(cut, partial(run, ready, first, arranged=True, config=cut), want, timed)
    many = [whole(one) for one in copies[: 1 + COLD // dense.nbytes]]
    plain = median_us(lambda: [torch.nn.functional.linear(x, one) for one in many], len(many))
    print(f"\n{name} in bf16 by torch's matmul: {plain:.1f} µs")
    return bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="rows of activations: 256 is one canvas")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8, 16), help="of the experts")
    parser.add_argument("--dense-bits", type=int, default=8, choices=(4, 8), help="of attention and dense MLP")
    parser.add_argument("--skew", type=float, default=0.0, help="0: every expert as likely; 1: as 1/rank")
    parser.add_argument("--only", nargs="*", default=["experts", *DENSE], help=f"of experts, {', '.join(DENSE)}")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune_kernels: needs a CUDA card")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    copy = copy_bandwidth(device)
    print(json.dumps(describe(device) | {"copy_gb_s": round(copy / 1e9)}))
    found: dict[tuple[Any, ...], Config] = {}
    if "experts" in given.only:
        gate, back = tune_experts(given.rows, given.bits, given.skew, copy, device)
        gate.table()
        back.table()
        pairs = [
            (first[0] + second[0], first[1], second[1])
            for tile in (16, 32, 64, 128)
            if (first := gate.best(lambda cut, tile=tile: cut.tokens == tile))
            and (second := back.best(lambda cut, tile=tile: cut.tokens == tile))
        ]
        if pairs:
            total, found[gate.key], found[back.key] = min(pairs, key=lambda pair: pair[0])
            print(f"\nexperts, both products: {total:.1f} µs")
        torch.cuda.empty_cache()
    for name in (name for name in DENSE if name in given.only):
        bench = tune_dense(name, given.rows, given.dense_bits, copy, device)
        bench.table()
        if best := bench.best():
            found[bench.key] = best[1]
        torch.cuda.empty_cache()
    print("\nTUNED = {")
    for key, cut in found.items():
        fields = ", ".join(f"{name}={value}" for name, value in asdict(cut).items() if value is not None)
        print(f"    ({card(device).generation}, {', '.join(map(repr, key))}): Config({fields}),")
    print("}")


if __name__ == "__main__":
    main()
