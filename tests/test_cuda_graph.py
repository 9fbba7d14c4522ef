"""Captured passes: the same tokens as the plain loop, few captures, nothing overwritten that is still to be read.

Without a card "capture" keeps the function and "replay" calls it on the same buffers, which is where mistakes are made:
what a graph reads, what it overwrites, and what the engine reads of it one pass late. That CUDA captures what it is
given is for `-m gpu` to show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import loops
from dgemma.backends import cuda
from dgemma.backends.cuda import graph as graphs
from dgemma.backends.cuda.card import CardOps
from dgemma.backends.cuda.graph import Canvases, CapturedFunction, rerun
from dgemma.backends.cuda.load import BUCKET
from dgemma.backends.cuda.passes import CardPasses
from dgemma.backends.torch.inference import InferenceOps
from dgemma.backends.torch.passes import TorchPasses
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.core import graph_passes
from dgemma.core.config import SamplerConfig
from dgemma.core.engine import Engine
from dgemma.core.ops import Ops
from dgemma.core.parts import KV, Cache, Model
from loops import FIXED
from tiny import tiny_checkpoint
from under_test import build

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


class Capturable(CardOps):
    """Without a card nothing is in the way of a capture but what its tests are to show."""

    def can_capture(self, weights: Model) -> bool:
        return True

    can_capture_classes = can_capture

    def class_head(self, *args: Any) -> Any:
        return Ops.class_head(self, *args)  # torch's own lays classes out on the host, once for an array of them


def card_passes(checkpoint: Checkpoint, capture: Any = rerun, **options: Any) -> CardPasses:
    ops = Capturable("float32", "cpu")
    passes = CardPasses(ops, build(ops, checkpoint.config, checkpoint.tensor), capture=capture, **options)
    passes.chunk, passes.read_sizes = 40, (CANVAS, 40)
    return passes


def engine(passes: graph_passes.GraphPasses, **options: Any) -> Engine:
    return Engine(passes, None, prefix_bytes=0, **options)


def plain_engine(checkpoint: Checkpoint) -> Engine:
    ops = InferenceOps()
    passes = TorchPasses(ops, build(ops, checkpoint.config, checkpoint.tensor))
    passes.chunk = 40
    return engine(passes)


def written(engine: Engine, prompt: int, sampler: SamplerConfig, *, canvases: int = 3) -> list[Any]:
    return loops.written(engine, prompt, sampler, max_new_tokens=canvases * CANVAS - 3)


SAMPLERS = loops.SAMPLERS | {
    "stops on the last": SamplerConfig(steps=2, schedule_steps=2, confidence=1e9, stability=0),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prompt", [1, 11, 30, 95])
def test_the_captured_loop_is_the_plain_loop(checkpoint: Checkpoint, prompt: int, sampler: str) -> None:
    """Prompts below and beyond the window of 12, shorter than a captured chunk of 40, and several of them."""
    want = written(plain_engine(checkpoint), prompt, SAMPLERS[sampler])
    got = written(engine(card_passes(checkpoint)), prompt, SAMPLERS[sampler])
    assert got == want


def test_one_pass_too_many_is_begun_and_not_read(checkpoint: Checkpoint) -> None:
    capture = Counting()
    seen = written(engine(card_passes(checkpoint, capture)), 11, SAMPLERS["stops after the first"])
    assert seen[-1][1] == 3, "three canvases of one pass each"
    # Passes run: two for each canvas, the first of which captured the graph; and the reading passes, likewise.
    assert (capture.captured, capture.replayed) == (2, 5 + 2)


def test_one_capture_serves_every_length_and_request_of_a_bucket(checkpoint: Checkpoint) -> None:
    capture = Counting()
    passes = card_passes(checkpoint, capture)
    one = engine(passes)
    for prompt in (5, 60, 100):
        written(one, prompt, FIXED)
    assert capture.captured == 1 + 2  # the pass; reading 16 and 40
    # Longer than the bucket: another pool, other graphs, and those of the old one are let go.
    written(one, BUCKET, FIXED, canvases=2)
    assert (capture.captured, passes.captured()) == (2 * 3, 3)


def requests(count: int) -> list[Any]:
    """Requests of one, two or three canvases, each with settings of its own."""
    return [
        loops.request(
            1 + 37 * i % 90, SamplerConfig(
                steps=1 + i % 4, schedule_steps=4, confidence=0.001 * i, stability=i % 3, entropy_bound=0.05 + 0.01 * i,
                t_max=0.8 + 0.001 * i, greedy=i % 7 == 0,
            ), max_new_tokens=1 + 11 * i % 40, seed=i,
        )
        for i in range(count)
    ]  # fmt: skip


def test_three_hundred_settings_are_one_capture(checkpoint: Checkpoint) -> None:
    """And nothing of a request stays behind."""
    capture = Counting()
    passes = card_passes(checkpoint, capture)
    one = engine(passes)
    for request in requests(300):
        for _ in one.add(replace(request, max_new_tokens=min(request.max_new_tokens, 20))).events():
            pass
    one.step()
    assert capture.captured == 1 + 2, "the pass; reading 16 and 40"
    assert not (passes._lengths or passes._on_canvas or passes._states)
    assert (passes.captured(), passes._slots, list(passes._canvases)) == (3, 1, [CANVAS])


def test_forty_requests_join_and_leave(checkpoint: Checkpoint) -> None:
    """At most eight at a time, batches of every size from one to eight: each answer is the one it has alone."""
    given = requests(40)
    want = [loops.seen(plain_engine(checkpoint).add(request)) for request in given]
    capture = Counting()
    passes = card_passes(checkpoint, capture)
    one = engine(passes, most_rows=8)
    handles = [one.add(request) for request in given]
    assert [loops.seen(handle)[:-1] for handle in handles] == [answer[:-1] for answer in want]
    assert passes._slots == 8 and passes.captured() <= 4 * 3, "sizes 1, 2, 4 and 8, of a pass and two that read"
    again = capture.captured
    handles = [one.add(request) for request in given[::-1]]
    assert [loops.seen(handle)[:-1] for handle in handles] == [answer[:-1] for answer in want[::-1]]
    assert capture.captured - again <= 2, "the pool stays, and every graph but what an odd mixture asks for first"


@pytest.mark.parametrize("others", [0, 3], ids=["nobody's", "another row's"])
def test_rows_that_fill_up_leave_slots_as_they_are(checkpoint: Checkpoint, others: int) -> None:
    """Three rows in a batch of four: valid entries of the fourth slot, and its canvas, are as they were."""
    passes, draw = card_passes(checkpoint), np.random.default_rng(0)
    slots = [passes.open(60, CANVAS) for _ in range(4)]
    passes.read([(slot, draw.integers(0, 200, 20, np.int32)) for slot in slots])
    starts = {slot: draw.integers(0, 200, CANVAS, np.int32) for slot in slots}
    draws = loops.draws_for(FIXED, [1, 2, 3, 4], CANVAS)
    passes.step(slots, draws, starts)()
    before, soft = passes.save(slots[3]), passes.soft(slots[3])
    if not others:
        passes.close(slots[3])
    passes.read([(slot, draw.integers(0, 200, 9, np.int32)) for slot in slots[:3]])
    passes.step(slots[:3], loops.draws_for(FIXED, [1, 2, 3], CANVAS), {})()
    if others:
        after = passes.save(slots[3])
        for x, y in zip(before.data, after.data, strict=True):
            assert all(torch.equal(*pair) for pair in zip(x, y, strict=True))
        np.testing.assert_array_equal(passes.soft(slots[3]), soft)


def test_the_pool_grows_under_rows(checkpoint: Checkpoint) -> None:
    """A row whose canvas is half done goes on when another joins that needs a longer pool, and more slots."""
    sampler = SamplerConfig(steps=6, schedule_steps=6, confidence=0.0)
    first, second = loops.request(20, sampler, max_new_tokens=30), loops.request(BUCKET, sampler, max_new_tokens=20)
    want = [loops.seen(plain_engine(checkpoint).add(request)) for request in (first, second)]
    passes = card_passes(checkpoint)
    one = engine(passes)
    early = one.add(first)
    for _ in range(3):
        one.step()
    assert passes._slots == 1
    late = one.add(second)
    assert [loops.seen(early), loops.seen(late)] == want and passes._slots == 2


def test_canvases_of_several_lengths_at_once(checkpoint: Checkpoint) -> None:
    given = [
        loops.request(9 + i, FIXED, max_new_tokens=2 * length, canvas_length=length, seed=i)
        for i, length in enumerate((16, 5, 9, 16, 5))
    ]
    want = [loops.seen(plain_engine(checkpoint).add(request)) for request in given]
    passes = card_passes(checkpoint)
    handles = [engine_of.add(request) for engine_of in [engine(passes)] for request in given]
    assert [loops.seen(handle)[:-1] for handle in handles] == [answer[:-1] for answer in want]
    assert sorted(passes._canvases) == [5, 9, 16]


def test_what_was_fetched_stays_when_the_buffers_are_overwritten(checkpoint: Checkpoint) -> None:
    x = torch.arange(3)
    read = card_passes(checkpoint).fetch(x)
    x.fill_(9)
    assert read()[0].tolist() == [0, 1, 2]


def test_no_buffer_is_kept_from_call_to_call() -> None:
    """A captured pass writes where it was captured for good, so nobody may replace a buffer by a larger one."""
    workspace = CardOps("float32", "cpu")._workspace
    first, second = (workspace.take("block", (4,), torch.float32, CPU) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()


# ---- Graphs -----------------------------------------------------------------------------------------------------


def test_canvases_are_written_where_they_lie() -> None:
    def turn(canvases: Canvases, x: torch.Tensor) -> torch.Tensor:
        canvases.stable.add_(x)
        return canvases.stable * 2

    capture = Counting()
    run = CapturedFunction(turn, capture, CPU)
    pools = [Canvases(*(torch.zeros(2, dtype=torch.int32) for _ in range(4))) for _ in range(2)]
    one = torch.ones(2, dtype=torch.int32)
    first, again = (run(pools[0], one).tolist() for _ in range(2))
    assert (first, again, pools[0].stable.tolist()) == ([2, 2], [4, 4], [2, 2])
    run(pools[1], one)
    assert capture.captured == 2, "another pool, another graph"


def test_shapes_and_dtypes_are_part_of_a_graph_and_values_are_not() -> None:
    capture = Counting()
    run = CapturedFunction(lambda n, x: x * n, capture, CPU)
    numbers = [torch.tensor([n]) for n in (3, 4, 5)]
    assert [run(n, torch.ones(2)).tolist() for n in numbers] == [[3.0] * 2, [4.0] * 2, [5.0] * 2]
    assert capture.captured == 1
    run(numbers[0], torch.ones(3))
    run(numbers[0], torch.ones(2, dtype=torch.float64))
    assert capture.captured == 3


def test_kept_graphs_can_be_let_go() -> None:
    capture = Counting()
    run = CapturedFunction(lambda x: x + 1, capture, CPU)
    run(torch.ones(1))
    run.clear()
    assert len(run) == 0
    run(torch.ones(1))
    assert capture.captured == 2


def test_a_cache_is_written_where_it_lies_and_is_no_copy() -> None:
    def write(cache: Cache, x: torch.Tensor) -> Cache:
        for layer in cache.layers:
            layer.keys[:, :, 0] = x
        return Cache(cache.layers[::-1], cache.length + 1)

    capture = Counting()
    run = CapturedFunction(write, capture, CPU)
    layers = tuple(KV(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)) for _ in range(2))
    for n in (1.0, 2.0):
        after = run(Cache(layers, torch.tensor([7])), torch.tensor(n))
        assert after.length.tolist() == [8] and after.layers[0].keys is layers[1].keys
        assert layers[0].keys[0, 0, 0].tolist() == [n, n]
    other = (KV(*(torch.zeros(1, 1, 4, 2) for _ in range(2))), layers[1])
    run(Cache(other, torch.tensor([7])), torch.tensor(3.0))
    assert capture.captured == 2 and other[0].keys[0, 0, 0].tolist() == [3.0, 3.0], "another address, another graph"


def test_a_cache_of_its_own_cannot_be_returned() -> None:
    run = CapturedFunction(lambda kv: KV(kv.keys + 1, kv.values), rerun, CPU)
    with pytest.raises(TypeError, match="not its argument's"):
        run(KV(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)))


def test_what_cannot_be_captured_is_named() -> None:
    with pytest.raises(TypeError, match="not dict"):
        CapturedFunction(lambda x: x, rerun, CPU)({"a": 1})


def test_the_graph_unused_for_longest_goes_first() -> None:
    capture = Counting()
    run = CapturedFunction(lambda x: x + 1, capture, CPU)
    for size in range(1, graphs.KEPT + 2):
        run(torch.ones(size))
        run(torch.ones(1))
    assert len(run) == graphs.KEPT
    run(torch.ones(1))
    assert capture.captured == graphs.KEPT + 1
    run(torch.ones(2))
    assert capture.captured == graphs.KEPT + 2


# ---- The pool ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, capacity", [(1, 1024), (1024, 1024), (1025, 1536), (1537, 2048), (3000, 3072), (3073, 4096)]
)
def test_slots_are_cut_to_few_lengths(checkpoint: Checkpoint, tokens: int, capacity: int) -> None:
    """With or without capture: attention's parts follow the slots' length, and low precision follows the parts."""
    for capture in (rerun, None):
        assert card_passes(checkpoint, capture).rounded_up(tokens) == capacity


def test_the_pool_keeps_its_addresses_until_it_grows(checkpoint: Checkpoint) -> None:
    passes = card_passes(checkpoint)

    def places() -> list[int]:
        return [x.data_ptr() for layer in passes._pool for x in layer]

    first = passes.open(10, CANVAS)
    before = places()
    passes.close(first)
    assert passes.open(BUCKET, CANVAS) == first and places() == before, "idle, it stays"
    passes.open(10, CANVAS)
    assert places() != before


def test_a_large_pool_is_given_back_for_a_small_request(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dgemma.backends.cuda import passes as module

    passes = card_passes(checkpoint)
    for kept, capacity in ((module.KEPT, 4096), (1, 1024)):
        monkeypatch.setattr(module, "KEPT", kept)
        passes.close(passes.open(4000, CANVAS))
        slot = passes.open(10, CANVAS)
        assert passes._capacity == capacity
        passes.close(slot)


def test_plain_passes_are_filled_up_as_captured_ones(checkpoint: Checkpoint) -> None:
    """Low precision follows the length of slots and the size of batches."""
    captured = card_passes(checkpoint)
    plain = cuda.plain(captured)
    assert captured.captures and not plain.captures and plain.lookahead == 0
    for one in (captured, plain):
        one.chunk = 40
        for _ in range(3):
            one.open(10, CANVAS)
    shapes = [[x.shape for layer in one._pool for x in layer] for one in (captured, plain)]
    assert shapes[0] == shapes[1] and captured._filled(3) == plain._filled(3) == [0, 1, 2, 2]


def test_without_capture_nothing_looks_ahead(checkpoint: Checkpoint) -> None:
    ops = CardOps("float32", "cpu")
    passes = CardPasses(ops, build(ops, checkpoint.config, checkpoint.tensor), capture=rerun)
    assert (passes.lookahead, passes.read_sizes, passes.batch_sizes) == (0, (), ())
    assert passes.compile(np.square) is np.square
