"""ONNX Runtime's passes: rows that share an engine, snapshots that are the values themselves, single passes."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma import backends
from dgemma.backends.onnx.session import Session
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.core import memory
from dgemma.core.config import SamplerConfig
from dgemma.core.events import Commit, Done
from dgemma.core.passes import Passes
from dgemma.core.sampler import draws_of, first_canvas, stacked
from law import assert_close_f32
from said import says
from tiny import tiny_checkpoint

PROMPT = np.arange(20, 60, dtype=np.int32)  # past the window of 12
CANVAS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("rows"), hidden_size=64, intermediate_size=64)


@pytest.fixture(scope="module")
def passes(folder: Path) -> Passes:
    return opened(folder, "onnx")


def opened(folder: Path, name: str) -> Passes:
    return backends.open(name, Checkpoint.open(folder), device="cpu", dtype="float32")


def test_requests_at_once_have_the_tokens_that_each_has_alone(folder: Path) -> None:
    model = dgemma.load(folder, backend="onnx")
    draw = np.random.default_rng(0)
    same = draw.integers(16, 200, 30).tolist()
    given: list[tuple[list[int], dict[str, Any]]] = [
        (same, dict(seed=1)), (same, dict(seed=2)), (same, dict(seed=3, greedy=True)),
        (draw.integers(16, 200, 7).tolist(), dict(seed=4, temperature=0.5, steps=7)),
        (draw.integers(16, 200, 150).tolist(), dict(seed=5, entropy_bound=1.0, confidence=0.5)),
        (same + draw.integers(16, 200, 60).tolist(), dict(seed=6, stability=0, confidence=9.0)),
        (draw.integers(16, 200, 3).tolist(), dict(seed=7, t_min=0.1, t_max=2.0, max_new_tokens=20)),
    ]  # fmt: skip
    given = [(prompt, dict(max_new_tokens=100, steps=5, eos=()) | options) for prompt, options in given]
    alone = [model.generate(prompt, **options) for prompt, options in given]
    streams = [model.stream(prompt, **options) for prompt, options in given]
    gone = model.stream(same, 100, seed=8)
    assert len(list(islice(gone, 3))) == 3
    gone.close()  # type: ignore[attr-defined]
    for stream, want in zip(streams, alone, strict=True):
        tokens: list[int] = []
        for event in stream:
            tokens += event.tokens if isinstance(event, Commit) else ()
            steps = event.stats.steps if isinstance(event, Done) else None
        assert (tuple(tokens), steps) == (want.token_ids, want.stats.steps)
    assert len({one.token_ids for one in alone}) == len(alone)
    assert len({one.stats.steps for one in alone}) > 2


def test_a_prompt_goes_on_from_what_another_has_read(folder: Path) -> None:
    whole, kept = (dgemma.load(folder, backend="onnx") for _ in range(2))
    kept.generate(PROMPT[:30].tolist(), 16, eos=())
    got, want = (model.generate(PROMPT.tolist(), 40, 3, eos=()) for model in (kept, whole))
    assert (want.stats.cached_tokens, got.stats.cached_tokens) == (0, 30)
    assert got.token_ids == want.token_ids


def test_a_snapshot_is_the_values_themselves(passes: Passes) -> None:
    slot = passes.open(len(PROMPT), CANVAS)
    passes.read([(slot, PROMPT[:30])])
    kept = passes.save(slot)
    before = {name: value.numpy().copy() for name, value in kept.data.items()}
    passes.read([(slot, PROMPT[30:])])
    logits = passes.logits(slot, PROMPT[:CANVAS])
    passes.close(slot)
    for name, value in kept.data.items():
        np.testing.assert_array_equal(value.numpy(), before[name])
    assert kept.length == 30 and kept.nbytes == sum(array.nbytes for array in before.values())
    slots = [passes.open(len(PROMPT), CANVAS, kept) for _ in range(2)]
    assert all(passes.save(slot).data == kept.data for slot in slots)  # the very values: nothing was copied
    passes.read([(slots[0], PROMPT[30:])])
    np.testing.assert_array_equal(passes.logits(slots[0], PROMPT[:CANVAS]), logits)
    for slot in slots:
        passes.close(slot)


def test_passes_are_those_of_the_oracle(folder: Path, passes: Passes) -> None:
    """Rows of other lengths and settings, the outer two of which share runs, over three passes and a read."""
    found = []
    for one in (passes, opened(folder, "numpy")):
        config = one.config
        rows = [one.open(len(PROMPT) + CANVAS, CANVAS) for _ in range(3)]
        one.read([(rows[0], PROMPT), (rows[1], PROMPT[:5]), (rows[2], PROMPT[::-1])])
        made: dict[str, np.ndarray] = {}
        for canvas in range(2):
            starts = {slot: first_canvas(slot, canvas, CANVAS, config.vocab_size) for slot in rows}
            for step in range(3):
                draws = stacked([
                    draws_of(
                        # Hot: see test_onnx.check.
                        SamplerConfig(t_min=4.0, t_max=6.0, entropy_bound=bound, greedy=greedy, confidence=9.0),
                        seed=slot, canvas=canvas, step=step, length=CANVAS, vocab_size=config.vocab_size,
                    )
                    for slot, bound, greedy in zip(rows, (4.0, 9.0, 4.0), (False, True, True), strict=True)
                ])  # fmt: skip
                if step == 0 and canvas:
                    tokens = [(slot, made[f"0 2 argmax {slot}"]) for slot in rows]
                    result = one.read_and_step(tokens, draws, starts)()
                else:
                    result = one.step(rows, draws, {} if step else starts)()
                for name in ("canvas", "argmax", "accepted", "entropy", "stop"):
                    made |= {f"{canvas} {step} {name} {i}": row for i, row in enumerate(getattr(result, name))}
                made |= {f"{canvas} {step} soft {slot}": one.soft(slot) for slot in rows}
        previous = np.random.default_rng(0).normal(0, 4, (CANVAS, config.vocab_size)).astype(np.float32)
        for slot in rows:
            for given in (None, previous):
                states, logits = (ask(slot, PROMPT[:CANVAS], given) for ask in (one.states, one.logits))
                made |= {f"states {slot} {given is None}": states, f"logits {slot} {given is None}": logits}
                assert states.dtype == logits.dtype == np.float32
                assert_close_f32(one.head()(states), logits)
            one.close(slot)
        found.append(made | {"embedded": one.embed(PROMPT)})
    got, want = found
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].shape == array.shape, name
        if array.dtype.kind == "f":
            assert_close_f32(got[name], array, name)
        else:
            np.testing.assert_array_equal(got[name], array, name)
            assert got[name].dtype == array.dtype, name
    for row in (1, 2):
        greedy = got[f"0 1 accepted {row}"]
        np.testing.assert_array_equal(got[f"0 1 canvas {row}"][greedy], got[f"0 1 argmax {row}"][greedy])
        assert 0 < greedy.sum() < CANVAS


def test_rows_that_are_alike_share_a_run(passes: Passes, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    run = Session.run

    def counted(self: Session, feeds: Any, places: Any) -> Any:
        shapes.append(feeds["noise"].shape)
        return run(self, feeds, places)

    slots = [passes.open(len(PROMPT), CANVAS) for _ in range(5)]
    passes.read([(slot, PROMPT[:length]) for slot, length in zip(slots, (20, 7, 20, 20, 20), strict=True)])
    bounds = (1.0, 1.0, 1.0, 2.0, 1.0)
    vocab = passes.config.vocab_size
    draws = stacked([
        draws_of(SamplerConfig(entropy_bound=bound), seed=slot, canvas=0, step=0, length=CANVAS, vocab_size=vocab)
        for slot, bound in zip(slots, bounds, strict=True)
    ])  # fmt: skip
    starts = {slot: first_canvas(slot, 0, CANVAS, vocab) for slot in slots}
    monkeypatch.setattr(Session, "run", counted)
    passes.step(slots, draws, starts)()
    assert shapes == [(3, CANVAS), (1, CANVAS), (1, CANVAS)]
    shapes.clear()
    monkeypatch.setattr("dgemma.backends.onnx.passes.HEAD", 2 * 4 * CANVAS * vocab)  # of two rows
    passes.step(slots, draws, {})()
    assert shapes == [(2, CANVAS), (1, CANVAS), (1, CANVAS), (1, CANVAS)]
    for slot in slots:
        passes.close(slot)


def test_rows_of_a_packed_table(folder: Path, tmp_path: Path) -> None:
    dgemma.convert(folder, tmp_path / "4bit", recipe="4bit", workers=1)
    got, want = (opened(tmp_path / "4bit", name).embed(PROMPT) for name in ("onnx", "numpy"))
    np.testing.assert_array_equal(got, want)


def test_what_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = opened(folder, "onnx")
    assert passes.fits(100, CANVAS)
    with says("GB of memory; give a smaller max_new_tokens, or a shorter prompt"):
        passes.fits(1 << 40, CANVAS)
    whole = memory.cache_bytes(passes.config, 300, 4)
    monkeypatch.setattr(memory, "available", lambda: 8 * whole)  # a half of which is left alone
    slot = passes.open(300, CANVAS)
    assert passes.fits(300, CANVAS)  # a run may hold each twice
    assert not passes.fits(300, CANVAS, rows=2)
    passes.close(slot)
    assert passes.fits(300, CANVAS, rows=2)
