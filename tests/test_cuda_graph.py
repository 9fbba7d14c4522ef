"""Captured passes: the same tokens as the plain loop, few captures, nothing overwritten that is still to be read.

Without a card "capture" keeps the function and "replay" calls it on the same buffers, which is where mistakes are made:
what a graph reads, what it overwrites, and what the engine reads of it one pass late. That CUDA captures what it is
given is for `-m gpu` to show.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import loops
from dgemma.backends.cuda import graph as graphs
from dgemma.backends.cuda.card import CardOps
from dgemma.backends.cuda.graph import Buffers, Graphs, rerun
from dgemma.backends.cuda.load import BUCKET
from dgemma.backends.torch.inference import InferenceOps
from dgemma.checkpoints import weights
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.core.config import SamplerConfig
from dgemma.core.engine import Engine
from dgemma.core.model import Cache
from dgemma.core.ops import KV, Ops
from loops import FIXED
from tiny import tiny_checkpoint

CPU = torch.device("cpu")
CANVAS = 16


class Counting:
    """Counts captures and replays, and makes every buffer that a replay has not written obvious."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            run()

        return replay


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path_factory.mktemp("graph"), max_position_embeddings=4096))


def engine(ops: Ops, checkpoint: Checkpoint) -> Engine:
    return Engine(ops, weights.build(ops, checkpoint.config, checkpoint.tensor), None)


def device_ops(capture: Any = rerun, sizes: tuple[int, ...] = (CANVAS, 40)) -> CardOps:
    return CardOps("float32", "cpu", capture=capture, encode_sizes=sizes)


def written(engine: Engine, prompt: int, sampler: SamplerConfig, *, canvases: int = 3) -> list[Any]:
    return loops.written(engine, prompt, sampler, max_new_tokens=canvases * CANVAS - 3)


SAMPLERS = loops.SAMPLERS | {
    "stops on the last": SamplerConfig(steps=2, schedule_steps=2, confidence=1e9, stability=0),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prompt", [1, 11, 30, 95])
def test_the_captured_loop_is_the_plain_loop(checkpoint: Checkpoint, prompt: int, sampler: str) -> None:
    """Prompts below and beyond the window of 12, shorter than a captured chunk of 40, and several of them."""
    want = written(engine(InferenceOps(), checkpoint), prompt, SAMPLERS[sampler])
    got = written(engine(device_ops(), checkpoint), prompt, SAMPLERS[sampler])
    assert got[:-1] == want[:-1]
    more = -(-prompt // 40) - 1  # chunks of the prompt, which the plain loop reads in one
    reason, steps, encodes, *rest = want[-1]
    assert got[-1] == (reason, steps, encodes + more, *rest)


def test_one_pass_too_many_is_begun_and_not_read(checkpoint: Checkpoint) -> None:
    capture = Counting()
    seen = written(engine(device_ops(capture), checkpoint), 11, SAMPLERS["stops after the first"])
    assert seen[-1][1] == 3, "three canvases of one pass each"
    # Passes run: two for each canvas, the first of which captured the graph; and the encode passes, likewise.
    assert (capture.captured, capture.replayed) == (2, 5 + 2)


def test_one_capture_serves_every_length_and_request_of_a_bucket(checkpoint: Checkpoint) -> None:
    capture = Counting()
    one = engine(device_ops(capture), checkpoint)
    for prompt in (5, 60, 100):
        written(one, prompt, FIXED)
        gc.collect()
    assert capture.captured == 1 + 2  # the pass; encode passes of 16 and 40
    # Longer than the bucket: other buffers, other graphs.
    written(one, BUCKET, FIXED, canvases=2)
    assert capture.captured == 2 * 3


def test_what_was_fetched_stays_when_the_buffers_are_overwritten() -> None:
    ops = device_ops()
    x = torch.arange(3)
    read = ops.fetch(x)
    x.fill_(9)
    assert read()[0].tolist() == [0, 1, 2]


def test_no_buffer_is_kept_from_call_to_call() -> None:
    """A captured pass writes where it was captured for good, so nobody may replace a buffer by a larger one."""
    scratch = device_ops()._scratch
    first, second = (scratch.take("block", (4,), torch.float32, CPU) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()


# ---- Graphs -----------------------------------------------------------------------------------------------------


class State(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


def test_results_of_an_arguments_type_go_back_into_it() -> None:
    """The two are exchanged: each result is the other's place."""
    run = Graphs(lambda state, x: State(state.b, state.a.view(1)), rerun, CPU)
    state = run(State(torch.tensor([1.0]), torch.tensor([10.0])), torch.tensor([5.0]))
    assert (state.a.item(), state.b.item()) == (10.0, 1.0)
    place = state.a.data_ptr()
    for _ in range(3):
        before = State(*(x.clone() for x in state))
        state = run(state, torch.tensor([0.0]))
        assert state.a.data_ptr() == place, "handed on, it is where the graph reads it"
        assert (state.a.item(), state.b.item()) == (before.b.item(), before.a.item())


def test_integers_are_values_and_not_part_of_the_graph() -> None:
    capture = Counting()
    run = Graphs(lambda n, x: x * n, capture, CPU)
    assert [run(n, torch.ones(2)).tolist() for n in (3, 4, 5)] == [[3.0] * 2, [4.0] * 2, [5.0] * 2]
    assert capture.captured == 1
    run(3, torch.ones(3))
    run(3, torch.ones(2, dtype=torch.float64))
    assert capture.captured == 3, "shapes and dtypes are"


def test_a_cache_is_written_where_it_lies_and_is_no_copy() -> None:
    def write(cache: Cache, x: torch.Tensor) -> Cache:
        for layer in cache.layers:
            layer.keys[:, :, 0] = x
        return Cache(cache.layers[::-1], cache.length + 1)

    capture = Counting()
    run = Graphs(write, capture, CPU)
    layers = tuple(KV(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)) for _ in range(2))
    for n in (1.0, 2.0):
        after = run(Cache(layers, 7), torch.tensor(n))
        assert after.length.tolist() == [8] and after.layers[0].keys is layers[1].keys
        assert layers[0].keys[0, 0, 0].tolist() == [n, n]
    other = (KV(*(torch.zeros(1, 1, 4, 2) for _ in range(2))), layers[1])
    run(Cache(other, 7), torch.tensor(3.0))
    assert capture.captured == 2 and other[0].keys[0, 0, 0].tolist() == [3.0, 3.0], "another address, another graph"


def test_a_cache_of_its_own_cannot_be_returned() -> None:
    run = Graphs(lambda kv: KV(kv.keys + 1, kv.values), rerun, CPU)
    with pytest.raises(TypeError, match="not its argument's"):
        run(KV(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)))


def test_what_cannot_be_captured_is_named() -> None:
    with pytest.raises(TypeError, match="not dict"):
        Graphs(lambda x: x, rerun, CPU)({"a": 1})


def test_the_graph_unused_for_longest_goes_first() -> None:
    capture = Counting()
    run = Graphs(lambda x: x + 1, capture, CPU)
    for size in range(1, graphs.KEPT + 2):
        run(torch.ones(size))
        run(torch.ones(1))
    assert len(run) == graphs.KEPT
    run(torch.ones(1))
    assert capture.captured == graphs.KEPT + 1
    run(torch.ones(2))
    assert capture.captured == graphs.KEPT + 2


# ---- Buffers ----------------------------------------------------------------------------------------------------


def test_buffers_come_back_in_order_and_only_when_nobody_has_them() -> None:
    buffers = Buffers()

    def lend(rows: int = 4) -> torch.Tensor:
        return buffers.lend((1, 2, rows, 3), torch.float32, CPU)

    first, second = lend(), lend()
    places = [first.data_ptr(), second.data_ptr()]
    assert places[0] != places[1]
    view = first[:, :1]
    del first
    again = lend()
    assert again.data_ptr() not in places, "a view still has the first one"
    del view, again, second
    kept = [lend(), lend()]
    assert [x.data_ptr() for x in kept] == places
    del kept
    lend(8)
    assert [len(slots) for slots in buffers._all.values()] == [0, 1], "those of another length are given back"


def test_a_graph_keeps_no_cache_lent(checkpoint: Checkpoint) -> None:
    ops = device_ops()
    one = engine(ops, checkpoint)
    written(one, 20, FIXED)
    gc.collect()
    slots = [slot for some in ops._buffers._all.values() for slot in some]
    assert slots and all(slot[1]() is None for slot in slots)


@pytest.mark.parametrize(
    "capacity, rows", [(1, 1024), (1024, 1024), (1025, 1536), (1537, 2048), (3000, 3072), (3073, 4096)]
)
def test_caches_are_cut_to_few_lengths(capacity: int, rows: int) -> None:
    assert device_ops().new_cache(1, 1, 2, capacity).keys.shape[2] == rows


def test_the_plain_loop_cuts_its_keys_as_the_captured_one_does() -> None:
    """Attention's parts follow the buffers' length, and low precision follows the parts."""
    ops = device_ops()
    for capacity in (1, 1100, 3000):
        captured, plain, plain_again = (
            one.new_cache(1, 1, 2, capacity).keys for one in (ops, ops.plain(), ops.plain())
        )  # fmt: skip
        assert captured.shape == plain.shape and len({x.data_ptr() for x in (captured, plain, plain_again)}) == 3


def test_without_capture_nothing_looks_ahead(tmp_path: Path) -> None:
    ops = CardOps("float32", "cpu")
    assert (ops.lookahead, ops.encode_sizes, ops.extent(3)) == (0, (), 3)
    assert ops.compile(np.square) is np.square
