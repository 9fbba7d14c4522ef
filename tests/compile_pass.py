"""Compile every kernel of the 26B's passes for a card that is not here, as they are launched, and list what they take.

    python tests/compile_pass.py --recipe 4bit --arch sm_90        # half a minute; exit code 1 if one spills

A denoising pass, one up to the choice of a language with 150 classes of tokens, passes that read 64, 256 and 1,024
tokens, and a canvas read in the next one's first pass. The
kernels' own tests do this for each at its shipped sizes; this finds what a whole pass launches beside, and shows it
together.
"""

from __future__ import annotations

import sys
from typing import Any

import click
import torch

from dgemma.backends.cuda.kernels import configs
from dgemma.backends.cuda.ops import CudaOps
from dgemma.core.model import encode, encode_and_step, step
from dgemma.core.parts import Model, StepState
from dgemma.core.within import predict
from dgemma.tools import bench
from kernel_harness import ARCHITECTURES, Launch, compile_ahead_launch, launched
from test_cuda_ops import empty, meta_cache, meta_ops, meta_weight, random_model
from test_joined import meta_draws

CONTEXT = 2048
CARDS = {"sm_80": (80, 108), "sm_89": (89, 128), "sm_90": (90, 132), "sm_100": (100, 148)}
"""Generation and multiprocessors of an A100, an RTX 4090, an H100 and a B200."""


def launches(ops: CudaOps, model: Model) -> list[Launch]:
    """Return what these passes launch; nothing has contents, and nothing runs."""
    cache = meta_cache(model.config, CONTEXT, scratch=1024)
    tokens, number = empty(1, 256, dtype=torch.int32), empty(1, dtype=torch.int32)
    state = StepState(
        canvas=tokens, soft=empty(1, 256, model.config.hidden_size), argmax=tokens, stable=number, accepted=None,
        entropy=None, stop=None,
    )  # fmt: skip

    def run() -> None:
        step(ops, model, cache, state, meta_draws(tokens))
        predict(ops, model, cache, state, meta_draws(tokens), empty(model.config.vocab_size, dtype=torch.int32), 150)
        encode_and_step(ops, model, cache, tokens, state, meta_draws(tokens))
        for length in (64, 256, 1024):
            encode(ops, model, cache, empty(1, length, dtype=torch.int32), number)

    return launched(run)


def same(launch: Launch) -> Any:
    """What tells one compilation from another."""
    given = ((k, v.dtype if isinstance(v, torch.Tensor) else v) for k, v in launch.arguments.items())
    return launch.name, tuple(given), tuple(sorted((k, str(v)) for k, v in launch.options.items()))


@click.command(help=__doc__)
@click.option("--recipe", default="4bit", show_default=True)
@click.option("--arch", type=click.Choice(ARCHITECTURES), default="sm_90", show_default=True)
def main(recipe: str, arch: str) -> None:
    ops = meta_ops()
    ops._arch = arch
    generation, multiprocessors = CARDS[arch]
    configs.ASSUMED = configs.Card(generation=generation, multiprocessors=multiprocessors)
    found = launches(ops, random_model(ops, bench.config_of("26b"), recipe, meta_weight))
    kinds = {same(launch): launch for launch in found}
    click.echo(f"{len(found)} launches, {len(kinds)} kernels for {arch}")
    spilt = 0
    for launch in kinds.values():
        built = compile_ahead_launch(launch, arch)
        spilt += built.spills > 0
        click.echo(
            f"{built.name:16} {launch.grid!s:18} {built.registers:4} registers {built.shared:7} bytes shared "
            f"{built.warps:2} warps {built.spills:4} bytes spilt"
        )
    sys.exit(1 if spilt else 0)


if __name__ == "__main__":
    main()
