"""A canvas read in the next one's first pass: the same states, the same cache, the same events, fewer passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import dgemma
import loops
import test_cuda_fake as fake
import under_test
from dgemma.backends.cuda.graph import rerun
from dgemma.backends.cuda.ops import CudaOps
from dgemma.backends.cuda.passes import CardPasses
from dgemma.backends.numpy.ops import NumpyOps
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.core.config import SamplerConfig
from dgemma.core.engine import Engine
from dgemma.core.events import Draft
from dgemma.core.graph_passes import GraphPasses
from dgemma.core.model import denoise, encode, encode_and_denoise, encode_and_step, new_cache
from dgemma.core.ops import Ops
from dgemma.core.parts import Cache, Draws, Model, StepState
from dgemma.text.tokens import Tokenizer
from dgemma.tools import bench
from fake_card import Card
from kernel_harness import launched, running
from law import assert_close_f32, assert_low_precision, nmse
from loops import FIXED, SAMPLERS
from test_cuda_fake import card as card
from test_cuda_graph import Capturable
from test_cuda_ops import SHAPE, card_passes, empty, meta_cache, meta_ops, meta_weight, random_model
from tiny import tiny_checkpoint
from under_test import BACKENDS, make_ops, passes_of, values

CANVAS, WINDOW = 16, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Every token goes to every expert: between two that all but tie, each of two right answers may choose another.
    return tiny_checkpoint(tmp_path_factory.mktemp("joined"), sliding_window=WINDOW, num_experts=3, top_k_experts=3)


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """For Triton's interpreter: a layer of each kind."""
    shape: dict[str, Any] = SHAPE | {"canvas_length": 4}
    return Checkpoint.open(tiny_checkpoint(tmp_path_factory.mktemp("small"), **shape))


def build(ops: Any, checkpoint: Checkpoint) -> Model:
    width = ml_dtypes.bfloat16 if ops.dtype == "bfloat16" else np.float32
    return under_test.build(ops, checkpoint.config, lambda name: np.asarray(checkpoint.tensor(name)).astype(width))


# ---- One pass -----------------------------------------------------------------------------------------------------

Turn = Callable[[Ops, Model, Cache, Any, Any, Any], tuple[Cache, Any]]


def apart(ops: Ops, model: Model, cache: Cache, tokens: Any, canvas: Any, soft: Any) -> tuple[Cache, Any]:
    cache = encode(ops, model, cache, tokens)
    return cache, denoise(ops, model, cache, canvas, soft)


def turns(
    ops: Ops, model: Model, turn: Turn, *lengths: int, read: int, canvas: int, ragged: bool = False,
    slots: list[int] | None = None,
) -> np.ndarray:  # fmt: skip
    """Two turns behind prompts of some lengths: the second shows what the first left in the cache. → [2, B, L, D]"""
    config, batch = model.config, len(lengths)
    draw = np.random.default_rng(sum(lengths))

    def tokens(count: int) -> Any:
        return ops.asarray(draw.integers(0, config.vocab_size, (batch, count), np.int32))

    longest = max(lengths)
    slots = range(batch) if slots is None else slots
    scratch = max(longest, read + canvas)
    pool = new_cache(ops, config, slots=max(slots) + 1, capacity=longest + 2 * read, scratch=scratch)
    prompt, fresh = tokens(longest), np.asarray(lengths, np.int32)
    where = ops.asarray(np.asarray(slots, np.int32))
    cache = Cache(pool.layers, ops.asarray(np.zeros(batch, np.int32)), where)
    cache = encode(ops, model, cache, prompt, ops.asarray(fresh)) if ragged else encode(ops, model, cache, prompt)
    found = []
    for i in range(2):
        soft = ops.asarray(values(i, batch, canvas, config.hidden_size), ops.dtype)
        cache, x = turn(ops, model, cache, tokens(read), tokens(canvas), soft)
        found.append(ops.to_numpy(x))
    return np.stack(found)


CASES = {
    "nothing much before": dict(lengths=(1,), read=CANVAS, canvas=CANVAS),
    "into the window": dict(lengths=(7,), read=3, canvas=CANVAS),
    "up to the window": dict(lengths=(WINDOW - 5,), read=4, canvas=5),
    "beyond the window": dict(lengths=(WINDOW + 9,), read=CANVAS, canvas=CANVAS),
    "less than the window": dict(lengths=(30,), read=2, canvas=3),
    "ragged": dict(lengths=(5, 30, 11), read=CANVAS, canvas=6, ragged=True),
    "ragged, in slots": dict(lengths=(5, 30, 11), read=CANVAS, canvas=6, ragged=True, slots=[3, 0, 2]),
}


@pytest.mark.parametrize("case", CASES)
def test_joined_states_are_those_of_two_passes(checkpoint: Checkpoint, case: str) -> None:
    options: dict[str, Any] = CASES[case] | {}
    lengths = options.pop("lengths")
    oracle = NumpyOps("float64")
    want = turns(oracle, build(oracle, checkpoint), apart, *lengths, **options)
    exact = turns(oracle, build(oracle, checkpoint), encode_and_denoise, *lengths, **options)
    assert nmse(exact, want) < 1e-25
    for name in BACKENDS:
        ops = make_ops(name, "float32")
        got = turns(ops, build(ops, checkpoint), encode_and_denoise, *lengths, **options)
        assert_close_f32(got, want, name)


@pytest.mark.parametrize("lengths, slots", [((WINDOW - 3,), None), ((2, 10), [2, 0])], ids=["one", "ragged"])
def test_joined_states_through_the_kernels(
    small: Checkpoint, device: str, lengths: tuple[int, ...], slots: list[int] | None
) -> None:
    options: dict[str, Any] = dict(read=5, canvas=3, ragged=slots is not None, slots=slots)
    exact, rounded = (
        turns(oracle, build(oracle, small), apart, *lengths, **options)
        for oracle in (NumpyOps("float64"), NumpyOps("bfloat16"))
    )
    ops = CudaOps("bfloat16", device)
    with running(device):
        got = turns(ops, build(ops, small), encode_and_denoise, *lengths, **options)
    assert_low_precision(got, rounded, exact)


# ---- The loop -----------------------------------------------------------------------------------------------------


def captured(checkpoint: Checkpoint, *, joined: bool) -> CardPasses:
    ops = Capturable("float32", "cpu")
    passes = CardPasses(ops, build(ops, checkpoint), capture=rerun, joined=joined)
    passes.read_sizes = (CANVAS, 40)
    return passes


def plain(name: str) -> Callable[..., GraphPasses]:
    def make(checkpoint: Checkpoint, *, joined: bool) -> GraphPasses:
        ops = make_ops(name, "float32")
        return passes_of(ops, build(ops, checkpoint), joined=joined)

    return make


PASSES: dict[str, Callable[..., GraphPasses]] = {
    "numpy": plain("numpy"), "torch": plain("inference"), "mlx": plain("mlx"), "captured": captured
}  # fmt: skip


def engine(passes: GraphPasses, checkpoint: Checkpoint) -> Engine:
    passes.chunk = 40
    tokenizer = Tokenizer(checkpoint.path, vocab_size=checkpoint.config.vocab_size)
    return Engine(passes, tokenizer, prefix_bytes=0)


def written(one: Engine, prompt: int, sampler: SamplerConfig, **options: Any) -> tuple[list[Any], int]:
    """Everything a reader sees, and how often the layers were run."""
    count = 0
    assert isinstance(one.passes, GraphPasses)
    ops = one.passes.ops
    body = ops.layers

    def layers(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return body(*arguments)

    ops.layers = layers  # type: ignore[method-assign]
    seen = loops.written(one, prompt, sampler, **{"max_new_tokens": 3 * CANVAS - 3, **options})
    one.step()  # what was begun is over
    del ops.layers
    return seen, count


@pytest.fixture(scope="module", params=PASSES)
def pair(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> tuple[Engine, Engine]:
    """One backend's engine with passes apart, and with passes joined."""
    off, on = (engine(PASSES[request.param](checkpoint, joined=joined), checkpoint) for joined in (False, True))
    return off, on


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prompt", [1, 11, 95])
def test_the_joined_loop_is_the_plain_loop(pair: tuple[Engine, Engine], prompt: int, sampler: str) -> None:
    """Prompts below and beyond the window, shorter than a captured chunk and several of them; three canvases."""
    (want, plain), (got, joined) = (written(one, prompt, SAMPLERS[sampler]) for one in pair)
    assert len(want) == want[-1][1] + 3 + 1 and got == want
    assert plain - joined == 2, "each of two commits saves a pass over the weights"


@pytest.mark.parametrize("tokens, seed", [(CANVAS, 0), (CANVAS + 1, 1), (2 * CANVAS, 1 << 63), (5 * CANVAS + 7, 5)])
def test_budgets_and_seeds(pair: tuple[Engine, Engine], tokens: int, seed: int) -> None:
    (want, plain), (got, joined) = (written(one, 9, FIXED, max_new_tokens=tokens, seed=seed) for one in pair)
    assert got == want and want[-1][-1] == tokens
    assert plain - joined == -(-tokens // CANVAS) - 1


def test_an_end_is_seen_before_anything_is_joined(pair: tuple[Engine, Engine]) -> None:
    whole, _ = written(pair[0], 9, FIXED)
    first, second = (row[1] for row in whole if isinstance(row[1], tuple) and len(row) == 3 and row[0] < 2)
    end = next(token for token in second if token not in first)
    (want, plain), (got, joined) = (written(one, 9, FIXED, eos_token_ids=(end,)) for one in pair)
    assert got == want and want[-1][:2] == ("stop", 6)
    assert plain - joined == 1, "the second canvas is not read, and there is no third"


def test_a_stop_string_ends_the_text_where_it_did(pair: tuple[Engine, Engine]) -> None:
    """Where the host looks ahead, the joined pass is on its way by then, and nothing of it is seen."""
    whole, _ = written(pair[0], 9, FIXED)
    text = "".join(row[2] for row in whole if len(row) == 3)
    for at in (2, len(text) // 2):
        (want, _), (got, _) = (written(one, 9, FIXED, stop=(text[at : at + 3],)) for one in pair)
        assert got == want and want[-1][0] == "stop"
    again, _ = written(pair[1], 9, FIXED)
    assert again == whole, "what was thrown away left nothing behind"


def test_a_trained_model_writes_the_same() -> None:
    """To the end of each canvas, wherever it stops by itself."""
    model = dgemma.load("nano", backend="torch")
    options: dict[str, Any] = dict(max_new_tokens=4 * model.config.canvas_length, eos=[])
    want = model.generate(".3.1 .2.. .... ...4", **options)
    model.engine.passes.joined = True
    got = model.generate(".3.1 .2.. .... ...4", **options)
    assert (got.token_ids, got.stats.steps) == (want.token_ids, want.stats.steps)
    assert want.stats.canvases == 4


def test_passes_that_are_sessions_run_apart(folder: Path) -> None:
    model = dgemma.load(folder, backend="onnx")
    want = model.generate([5] * 9, max_new_tokens=3 * CANVAS, steps=2, eos=[]).token_ids
    model.engine.passes.joined = True
    assert model.generate([5] * 9, max_new_tokens=3 * CANVAS, steps=2, eos=[]).token_ids == want


def test_captured_joined_tokens_are_plain_ones(small: Checkpoint, device: str) -> None:
    """Through the kernels. In bfloat16 a pass of other rows rounds otherwise, so joined is compared with joined."""
    ops = CudaOps("bfloat16", device)
    sampler = SamplerConfig(steps=2, schedule_steps=2, confidence=0.0)
    with running(device):
        model = build(ops, small)
        (want, _), (got, _) = (
            written(
                engine(card_passes(ops, model, captured=on, joined=True, reads=(4, 12)), small), 11, sampler,
                max_new_tokens=7,
            )
            for on in (False, True)
        )  # fmt: skip
    assert len(want) == 2 * 3 + 1 and got == want


def test_rows_that_join_together_or_not_at_all(checkpoint: Checkpoint) -> None:
    """Three rows finish canvases at once, a batch of four: with a free slot joined, else read and then begun."""
    sampler = SamplerConfig(steps=2, schedule_steps=2, confidence=0.0)
    given = [loops.request(5 + i, sampler, max_new_tokens=2 * CANVAS, seed=i) for i in range(4)]
    given[3] = loops.request(9, SamplerConfig(steps=9, schedule_steps=9, confidence=0.0), max_new_tokens=CANVAS)
    for requests in (given[:3], given):
        answers = []
        for on in (False, True):
            one = engine(captured(checkpoint, joined=on), checkpoint)
            handles = [one.add(request) for request in requests]
            answers.append([loops.seen(handle) for handle in handles])
        assert answers[0] == answers[1]


# ---- What a card would run ----------------------------------------------------------------------------------------


def test_a_card_captures_a_joined_pass_and_waits_for_nothing(card: Card) -> None:
    one = fake.engine(joined=True)
    fake.generate(one)
    assert card.captures == 3, "the pass, reading 1,024 tokens, and both at once; reading 256 is not needed"
    card.steady, card.waits = True, 0
    card.launches.clear()
    (events,) = fake.generate(one)
    drafts = [event for event in events if isinstance(event, Draft)]
    assert (card.captures, card.waits, len(drafts)) == (3, 0, fake.STEPS * fake.CANVASES)
    assert not card.launches, "every pass is a replay"


def test_a_joined_pass_of_the_26b_is_so_many_launches() -> None:
    """As many as a denoising pass: what reads a canvas adds rows, and no launch but where its window moves."""
    ops, config = meta_ops(), bench.config_of("26b")
    model = random_model(ops, config, "4bit", meta_weight)
    cache = meta_cache(config, 2048, scratch=1024)
    tokens, count = empty(1, 256, dtype=torch.int32), empty(1, dtype=torch.int32)
    state = StepState(
        canvas=tokens, soft=empty(1, 256, config.hidden_size), argmax=tokens, stable=count, accepted=None,
        entropy=None, stop=None,
    )  # fmt: skip
    draws = meta_draws(tokens)
    kernels = launched(lambda: encode_and_step(ops, model, cache, tokens, state, draws))
    assert 400 < len(kernels) <= 440


def meta_draws(tokens: torch.Tensor) -> Draws:
    wide = {"dtype": torch.float32}
    return Draws(
        temperature=empty(1, 1, **wide), uniforms=empty(*tokens.shape, **wide), noise=tokens,
        entropy_bound=empty(1, 1, **wide), confidence=empty(1, **wide), stability=empty(1, dtype=torch.int32),
        greedy=empty(1, 1, dtype=torch.bool), held=tokens,
    )  # fmt: skip
