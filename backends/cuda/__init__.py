"""PyTorch on CUDA: Triton's kernels and CUDA graphs, and what a card asks of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ...checkpoints import loading, sizes, weights
from ...checkpoints.checkpoint import Checkpoint
from ...core import memory
from ...core.config import ModelConfig
from ...core.primitives import DType

if TYPE_CHECKING:
    from .card import CardOps
    from .passes import CardPasses


def open(
    checkpoint: Checkpoint, device: str, dtype: DType, progress: Callable[[int, int], None] | None = None
) -> CardPasses:
    """Load a checkpoint on a card, `cuda:N`.

    Raises:
        DgemmaError: the model does not fit, by the numbers and before anything is allocated; or memory ran out.
    """
    held = memory.held_bytes(sizes.of_checkpoint(checkpoint), "torch", dtype, gpu=True)
    return passes_of(checkpoint.config, loading.reader(checkpoint, dtype, progress), device, dtype, int(held))


def passes_of(
    config: ModelConfig, weight: Callable[[str], Any], device: str, dtype: DType, nbytes: int
) -> CardPasses:  # fmt: skip
    """Make a model of weights that are at hand; see `backends.passes_of`."""
    from .passes import CardPasses, admit

    ops = card_ops(dtype, device)
    admit(config, nbytes, ops)
    with _loading(ops) as stager:
        model = weights.build(config, lambda name: ops.pack(weight(name), stager), ops.stack)
    from .graph import CudaCapture

    return CardPasses(ops, model, capture=CudaCapture(ops.device))


def plain(captured: CardPasses) -> CardPasses:
    """Return passes over the same weights that start every kernel from the host."""
    from .passes import CardPasses

    twin = CardPasses(captured.ops, captured.model)
    # Filled up alike: attention cuts its keys by the length of slots and the size of a batch, and rounds by that.
    twin.batch_sizes, twin.read_sizes = captured.batch_sizes, captured.read_sizes
    return twin


def card_ops(dtype: DType, device: str) -> CardOps:
    """Return the ops for a card: with kernels where there is Triton and the card has bfloat16 matrix units."""
    import torch

    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        from .card import CardOps

        return CardOps(dtype, device)
    from .ops import CudaOps

    return CudaOps(dtype, device)


@contextmanager
def _loading(ops: CardOps) -> Iterator[Any]:
    """Give what brings weights to the card; what was taken is given back where memory runs out."""
    from .graph import on
    from .load import Stager, releasing

    remedy = "take a smaller recipe (dgemma convert --recipe 4bit)"
    with on(ops.device), releasing(ops.device, "loading the weights", remedy):
        stager = Stager(ops.device)
        try:
            yield stager
        finally:
            stager.close()
