"""How the matrix kernels are cut, by card and by number of rows: data, and the rule that picks.

The tables are predictions until somebody measures: `benchmarks/tune_kernels.py` times the alternatives on a card and
prints the lines for `TUNED`, which come before everything else here. Nothing is tuned while a model runs, because a
captured graph keeps whatever it was captured with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, kw_only=True)
class Config:
    """One cut of a product of weights and activations."""

    rows: int
    """Weight rows of one program."""
    tokens: int
    """Activation rows of one program."""
    block: int
    """Elements of K in one turn of the loop."""
    stages: int
    """Turns in flight."""
    warps: int
    split: int = 1
    """Parts of K that go to programs of their own (linear only)."""
    registers: int | None = None
    """Most registers of a thread, where the assembler aims at fewer or more programs on a multiprocessor."""


EARLY = False
"""Whether kernels on Hopper and later come up while the one in front ends (programmatic dependent launch), instead of
after it. Off until a card has shown what it gains; `unpack.wait_turn` says why it is safe."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What cuts depend on."""

    generation: int
    """80: A100. 89: cards with 99 KiB of shared memory: L4, L40, RTX 30 to 50. 90: Hopper. 100: B200."""
    multiprocessors: int
    early: bool = False
    """Launch as `EARLY` says."""


ASSUMED = Card(generation=90, multiprocessors=132)
"""For tensors that are on no card: Triton's interpreter, and compiling ahead of time."""


@lru_cache
def card(device: torch.device) -> Card:
    if device.type != "cuda":
        return ASSUMED
    major, minor = torch.cuda.get_device_capability(device)
    generation = {(8, 0): 80, (8, 7): 80}.get((major, minor), {8: 89, 9: 90, 10: 100, 12: 89}.get(major, 80))
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return Card(generation=generation, multiprocessors=count, early=EARLY and major >= 9)


def _cuts(*lines: str, registers: int | None = None) -> tuple[Config, ...]:
    """rows × tokens × block, stages, warps and, where not 1, split."""
    made = []
    for line in lines:
        rows, tokens, block, stages, warps, *split = map(int, line.split())
        cut = Config(
            rows=rows, tokens=tokens, block=block, stages=stages, warps=warps, split=split[0] if split else 1,
            registers=registers,
        )  # fmt: skip
        made.append(cut)
    return tuple(made)


EXPERTS: dict[int, dict[int, tuple[tuple[int, tuple[Config, ...]], ...]]] = {
    # Generation → bits → up to so many rows per expert on average: gate_up, down. The token tile of both is the same.
    # 32 rows for a mean of 16: where 256 rows draw 8 of 128 experts at random, one expert in 14,000 gets more.
    90: {
        4: (
            (8, _cuts("128 16 128 5 4", "128 16 128 4 4")),
            (20, _cuts("128 32 128 4 4", "128 32 128 4 4")),
            (1 << 30, _cuts("128 64 128 3 8", "128 64 128 3 8")),
        ),
        8: (
            (8, _cuts("128 16 128 4 4", "128 16 64 4 4")),
            (20, _cuts("128 32 128 3 4", "128 32 64 4 4")),
            (1 << 30, _cuts("128 64 128 3 8", "128 64 64 4 8")),
        ),
        16: (
            (8, _cuts("128 16 64 4 4", "128 16 64 4 4")),
            (20, _cuts("128 32 64 4 4", "128 32 64 4 4")),
            (1 << 30, _cuts("128 64 64 4 4", "128 64 64 4 4")),
        ),
    },
    89: {
        4: (
            (20, _cuts("128 32 64 4 8", "128 32 64 4 8")),
            (1 << 30, _cuts("128 64 64 3 8", "128 64 64 3 8")),
        ),
        8: (
            (20, _cuts("128 32 64 3 8", "128 32 64 3 8")),
            (1 << 30, _cuts("128 64 64 3 8", "128 64 64 3 8")),
        ),
        16: (
            (20, _cuts("128 32 64 3 8", "128 32 64 3 8")),
            (1 << 30, _cuts("128 64 64 3 8", "128 64 64 3 8")),
        ),
    },
}
EXPERTS[80] = EXPERTS[89]
# Eight warps on Blackwell: with four, Triton 3.6 fails to lay out an operand that comes out of a reshape. Registers are
# what a thread has where shared memory is full, with three programs in 4 bits and two in 8. By itself the assembler
# aims at one program more, and spills: 32 bytes in 4 bits with biases, and in 8 bits 16 behind Triton 3.9.
EXPERTS[100] = {
    bits: (
        (20, _cuts(f"128 32 {block} 4 8", f"128 32 {block} 4 8", registers=registers)),
        (1 << 30, _cuts("128 64 64 4 8", "128 64 64 4 8")),
    )
    for bits, block, registers in ((4, 128, 80), (8, 128, 128), (16, 64, None))
}

LINEAR: dict[int, dict[int, tuple[Config, ...]]] = {
    # Generation → bits → cuts from large to small: the first that gives each multiprocessor a program.
    90: {
        4: _cuts("128 128 64 4 8", "128 64 128 3 8", "64 64 128 3 4", "64 32 128 3 4"),
        8: _cuts("128 128 64 4 8", "128 64 128 3 8", "64 64 128 3 4", "64 32 128 3 4"),
        16: _cuts("128 128 64 3 8", "128 64 64 4 4", "64 64 64 4 4", "64 32 64 4 4"),
    },
    89: {
        4: _cuts("128 64 64 3 8", "64 64 64 3 4", "64 32 64 3 4"),
        8: _cuts("128 64 64 3 8", "64 64 64 3 4", "64 32 64 3 4"),
        16: _cuts("128 64 64 3 8", "64 64 64 3 4", "64 32 64 3 4"),
    },
}
LINEAR[80] = {bits: _cuts("128 64 64 3 8", "64 64 64 3 8", "64 32 64 3 4") for bits in (4, 8, 16)}
LINEAR[100] = {bits: _cuts("128 128 64 4 8", "128 64 64 4 8", "128 32 64 4 8") for bits in (4, 8, 16)}

TUNED: dict[tuple[int, str, int, int, int, int], Config] = {}
"""(generation, kernel, bits, weight rows, K, activation rows) → the fastest cut measured."""


def for_experts(on: Card, bits: int, gate_up: tuple[int, int], rows_per_expert: int) -> tuple[Config, Config]:
    """Return the cuts of gate_up [2F, D] and down, for so many rows of each expert on average."""
    double, width = gate_up
    first, second = next(cuts for most, cuts in EXPERTS[on.generation][bits] if rows_per_expert <= most)
    first = TUNED.get((on.generation, "gate_up", bits, double, width, rows_per_expert), first)
    second = TUNED.get((on.generation, "down", bits, width, double // 2, rows_per_expert), second)
    return first, second


def for_linear(on: Card, kernel: str, bits: int, weight: tuple[int, int], rows: int) -> Config:
    """Return the cut of `linear` or `geglu` with a weight [R, K] and so many activation rows."""
    tuned = TUNED.get((on.generation, kernel, bits, *weight, rows))
    if tuned is not None:
        return tuned
    cuts = [cut for cut in LINEAR[on.generation][bits] if cut.tokens <= max(32, rows)]
    for cut in cuts:
        if -(-weight[0] // cut.rows) * -(-rows // cut.tokens) >= 0.9 * on.multiprocessors:
            return cut
    return cuts[-1]
