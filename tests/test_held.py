"""Held tokens, drafts to start from and the thinking budget, through the engine, on every backend that walks the graph.

`held_cases.py` says what has to be true of an answer, and runs as many random requests as one likes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dgemma.backends.numpy import NumpyOps, NumpyPasses
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.core import model as graph
from dgemma.core.canvas import FREE, part
from dgemma.core.config import SamplerConfig
from dgemma.core.engine import Engine
from dgemma.core.errors import DgemmaError
from dgemma.core.events import Commit, Done, Draft
from dgemma.core.row import Request
from dgemma.core.sampler import accept
from held_cases import EOS, check, engine_on, small_checkpoint, sweep
from tiny import IDS, SPECIAL
from under_test import build, make_ops

CASES = int(os.environ.get("DGEMMA_HELD_CASES", 96))
"""Random requests on each backend."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return small_checkpoint(tmp_path_factory.mktemp("held"))


@pytest.fixture(scope="module", params=["numpy", "inference", "mlx"])
def engine(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Engine:
    return engine_on(request.param, checkpoint)


def asked(budget: int = 40, **how: Any) -> Request:
    sampler = how.pop("sampler", SamplerConfig(steps=3, schedule_steps=3, confidence=0.0))
    return Request(prompt=(7, 8, 9), max_new_tokens=budget, seed=3, sampler=sampler, **{"eos_token_ids": ()} | how)


def answer(engine: Engine, request: Request) -> tuple[tuple[int, ...], list[Draft], Done]:
    """Tokens, drafts and the end of a request that keeps to the rules."""
    events = list(engine.add(request).events())
    found, done = check(request, events), events[-1]
    assert isinstance(done, Done)
    return found, [event for event in events if isinstance(event, Draft)], done


def at_places(length: int, **tokens: int) -> tuple[int, ...]:
    """Held tokens by place: p3=17 holds token 17 at position 3."""
    found = [FREE] * length
    for place, token in tokens.items():
        found[int(place[1:])] = token
    return tuple(found)


# ---- Held ---------------------------------------------------------------------------------------------------------


def test_random_requests_keep_what_is_held(engine: Engine) -> None:
    """Mixed batches, canvases that end early, budgets that cut, end tokens that are held, drafts; alone or not."""
    tally = sweep(engine, CASES, alone=1)
    assert tally.held > 2 * CASES and tally.drafts > 3 * CASES, "the cases are too mild"


def test_held_tokens_stay_over_canvases(engine: Engine) -> None:
    held = at_places(40, p0=20, p15=21, p16=22, p31=23, p39=24)
    found, drafts, _ = answer(engine, asked(held=held))
    assert [found[i] for i in (0, 15, 16, 31, 39)] == [20, 21, 22, 23, 24]
    assert {draft.canvas for draft in drafts} == {0, 1, 2} and len(found) == 40


def test_a_canvas_that_is_all_held_takes_no_pass(engine: Engine) -> None:
    whole = tuple(range(20, 60))
    found, drafts, done = answer(engine, asked(held=whole))
    assert found == whole and not drafts and done.stats.steps == 0
    middle = (*[FREE] * 16, *range(20, 36), *[FREE] * 8)
    found, drafts, _ = answer(engine, asked(held=middle))
    assert found[16:32] == middle[16:32] and {draft.canvas for draft in drafts} == {0, 2}


def test_an_end_that_is_held_ends_the_text(engine: Engine) -> None:
    found, _, done = answer(engine, asked(held=at_places(30, p21=EOS[0]), eos_token_ids=EOS))
    assert len(found) <= 21 and done.finish_reason == "stop"


def test_what_shares_a_batch_changes_nothing(engine: Engine) -> None:
    requests = [
        asked(held=at_places(20, p3=30, p18=31)), asked(), asked(held=tuple(range(20, 60))),
        asked(init=tuple(range(30, 50)), strength=0.5), asked(fit=True, held=at_places(40, p38=50)),
    ]  # fmt: skip
    handles = [engine.add(one) for one in requests]
    together = [check(one, list(handle.events())) for one, handle in zip(requests, handles, strict=True)]
    assert together == [answer(engine, one)[0] for one in requests]


def test_held_tokens_are_equal_everywhere(checkpoint: Checkpoint) -> None:
    requests = [asked(held=at_places(40, p1=30, p20=31)), asked(init=tuple(range(30, 60)), strength=0.4)]
    found = [
        [answer(engine_on(backend, checkpoint), one)[0] for one in requests]
        for backend in ("numpy", "inference", "mlx")
    ]
    assert found[0] == found[1] == found[2]


def test_without_held_tokens_nothing_changes(engine: Engine) -> None:
    """Bit for bit: an array of free positions is as good as none."""
    plain, free = (list(engine.add(asked(held=held)).events()) for held in ((), (FREE,) * 40))
    assert len(plain) == len(free)
    for one, other in zip(plain, free, strict=True):
        if isinstance(one, Draft):
            assert isinstance(other, Draft) and one.held is None and other.held is None
            for name in ("tokens", "accepted", "entropy", "following"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        if isinstance(one, Commit):
            assert one == other


# ---- Drafts to start from -----------------------------------------------------------------------------------------


def test_a_draft_that_is_kept_is_the_answer(engine: Engine) -> None:
    draft = tuple(range(30, 70))
    found, drafts, done = answer(engine, asked(init=draft, strength=0.0))
    assert found == draft and not drafts and done.stats.steps == 0


def test_a_draft_that_is_forgotten_is_none(engine: Engine) -> None:
    (found, drafts, _), (want, others, _) = (
        answer(engine, one) for one in (asked(init=tuple(range(30, 70)), strength=1.0), asked())
    )
    assert found == want
    for one, other in zip(drafts, others, strict=True):
        np.testing.assert_array_equal(one.entropy, other.entropy)


def test_held_tokens_are_before_a_drafts(engine: Engine) -> None:
    held = at_places(40, p5=99, p17=98)
    found, *_ = answer(engine, asked(init=tuple(range(30, 70)), strength=0.0, held=held))
    assert found[5] == 99 and found[17] == 98 and found[6] == 36
    found, *_ = answer(engine, asked(init=tuple(range(30, 70)), strength=0.6, held=held))
    assert found[5] == 99 and found[17] == 98


# ---- The thinking budget, of a model that is written down -----------------------------------------------------------

OPEN, CLOSE, LENGTH = IDS["<|channel>"], IDS["<channel|>"], 8


class Scripted(NumpyOps):
    """A head that sees whatever the script says: of each pass the argmax canvas, and the same entropies."""

    def __init__(self, script: Sequence[Sequence[int]], entropy: Sequence[float] | None = None) -> None:
        super().__init__("float32")
        self.script, self.entropy, self.passes = script, entropy or [0.001] * LENGTH, 0

    def vocab_head(self, x: Any, table: Any, softcap: float, temperature: Any, u: Any) -> Any:
        said = np.asarray([self.script[min(self.passes, len(self.script) - 1)]], np.int32)
        self.passes += 1
        return said, said, np.asarray([self.entropy], np.float32), np.zeros_like(x)


class Words:
    def id_of(self, token: str) -> int | None:
        return IDS.get(token)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(64 + i % 64) for i in ids if i >= len(SPECIAL))


def scripted(checkpoint: Checkpoint, script: Sequence[Sequence[int]], entropy: Any = None) -> Engine:
    ops = Scripted(script, entropy)
    config = replace(checkpoint.config, image_token_ids=())
    return Engine(NumpyPasses(ops, build(ops, config, checkpoint.tensor)), Words())  # type: ignore[arg-type]


def thought(
    checkpoint: Checkpoint, script: Sequence[Sequence[int]], budget: int | None, *, new: int = 16, **how: Any
) -> tuple[tuple[int, ...], list[Draft]]:  # fmt: skip
    """Tokens and drafts of an answer in canvases of 8, of three passes each."""
    sampler = SamplerConfig(steps=3, schedule_steps=3, confidence=0.0)
    request = asked(new, canvas_length=LENGTH, thinking_budget=budget, sampler=sampler, **how)
    events = list(scripted(checkpoint, script).add(request).events())
    tokens = [token for event in events if isinstance(event, Commit) for token in event.tokens]
    return tuple(tokens), [event for event in events if isinstance(event, Draft)]


RUNS_ON = (OPEN, *range(40, 47))
MORE = tuple(range(60, 68))


def test_thinking_that_runs_on_is_closed_where_its_budget_ends(checkpoint: Checkpoint) -> None:
    found, drafts = thought(checkpoint, [RUNS_ON] * 3 + [MORE], 5)
    assert found == (*RUNS_ON[:5], CLOSE, *RUNS_ON[6:], *MORE)
    assert drafts[0].held is None, "nothing is known of the first pass before it"
    for draft in drafts[1:3]:
        assert draft.held is not None and np.flatnonzero(draft.held).tolist() == [5] and draft.tokens[5] == CLOSE
    assert all(draft.held is None for draft in drafts[3:])


def test_thinking_is_closed_in_a_later_canvas(checkpoint: Checkpoint) -> None:
    for budget, place in ((12, 4), (8, 0)):
        found, drafts = thought(checkpoint, [RUNS_ON] * 3 + [MORE], budget)
        assert found == (*RUNS_ON, *MORE[:place], CLOSE, *MORE[place + 1 :])
        assert all(draft.held is None for draft in drafts[:3])
        assert all(np.flatnonzero(draft.held).tolist() == [place] for draft in drafts[3:])  # type: ignore[arg-type]


@pytest.mark.parametrize("said", [(OPEN, 40, 41, CLOSE, 42, 43, 44, 45), tuple(range(40, 48))])
def test_a_model_that_ends_its_thinking_is_left_alone(checkpoint: Checkpoint, said: tuple[int, ...]) -> None:
    found, drafts = thought(checkpoint, [said] * 3 + [MORE], 5)
    assert found == (*said, *MORE) and all(draft.held is None for draft in drafts)


def test_thinking_that_a_prompt_begins_is_closed(checkpoint: Checkpoint) -> None:
    said = tuple(range(40, 48))
    request = replace(asked(8, canvas_length=LENGTH, thinking_budget=3), prompt=(7, OPEN, 9))
    events = list(scripted(checkpoint, [said]).add(request).events())
    commit = next(event for event in events if isinstance(event, Commit))
    assert commit.tokens == (*said[:3], CLOSE, *said[4:])
    drafts = [event for event in events if isinstance(event, Draft)]
    assert all(draft.held is not None and draft.held[3] for draft in drafts), "from the first pass on"


def test_a_held_token_is_before_the_channels_end(checkpoint: Checkpoint) -> None:
    found, _ = thought(checkpoint, [RUNS_ON] * 3 + [MORE], 5, held=at_places(8, p5=99))
    assert found[5] == 99


def test_a_canvas_is_not_finished_on_a_draft_that_asks_for_the_end(checkpoint: Checkpoint) -> None:
    """Sure at once, but its first pass did not hold what its own draft asks for."""
    sampler = SamplerConfig(steps=6, schedule_steps=6, confidence=1.0, stability=0)
    request = asked(8, canvas_length=LENGTH, thinking_budget=5, sampler=sampler)
    events = list(scripted(checkpoint, [RUNS_ON]).add(request).events())
    commit = next(event for event in events if isinstance(event, Commit))
    assert commit.tokens[5] == CLOSE and sum(isinstance(event, Draft) for event in events) == 2


def test_a_budget_without_a_channel_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(DgemmaError, match=r"^thinking_budget: the checkpoint's tokenizer has no thinking channel"):
        engine_on("numpy", checkpoint).add(asked(thinking_budget=4))


# ---- A peer's way, shown wrong --------------------------------------------------------------------------------------


def vllm(
    argmax: np.ndarray, entropy: np.ndarray, held: np.ndarray, bound: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """vLLM 0.33: pins are put into the input and nowhere else. Returns what is accepted, the next input, the commit."""
    ops = NumpyOps("float32")
    accepted = accept(ops, entropy[None].astype(np.float32), np.full((1, 1), bound, np.float32))[0]
    return accepted, np.where(held == FREE, argmax, held), argmax


def test_a_pin_of_the_input_alone_is_lost_at_commit(checkpoint: Checkpoint) -> None:
    """A model that would write something else at a pin, and is a little unsure there."""
    said = np.arange(40, 48)
    held = part(at_places(8, p2=99, p3=98), 0, 8)
    entropy, bound = np.array([0.30, 0.9, 0.1, 0.2, 0.8, 0.9, 0.9, 0.9]), 0.25
    accepted, shown, committed = vllm(said, entropy, held, bound)
    assert shown[2] == 99 and committed[2] == 42 and committed[3] == 43, "both pins are in the input and lost at commit"
    assert np.flatnonzero(accepted).tolist() == [2, 3], "they use up the bound, and no free position is accepted"

    sampler = SamplerConfig(steps=2, schedule_steps=2, confidence=0.0, entropy_bound=bound)
    request = asked(8, canvas_length=LENGTH, held=tuple(held.tolist()), sampler=sampler)
    events = list(scripted(checkpoint, [said], entropy.tolist()).add(request).events())
    draft = next(event for event in events if isinstance(event, Draft))
    commit = next(event for event in events if isinstance(event, Commit))
    assert commit.tokens[2:4] == (99, 98) and commit.tokens[:2] == (40, 41)
    assert np.flatnonzero(draft.accepted).tolist() == [0, 2, 3], "the surest free one is accepted"


@pytest.mark.parametrize("backend", ["numpy", "torch", "mlx"])
def test_self_conditioning_is_told_what_is_held(checkpoint: Checkpoint, backend: str) -> None:
    """A pass with held tokens is one whose last distribution was certain of them, the first one included."""
    ops = make_ops(backend, "float32")
    model = build(ops, checkpoint.config, checkpoint.tensor)
    draw = np.random.default_rng(0)
    cache = graph.new_cache(ops, checkpoint.config, slots=1, capacity=8, scratch=8)
    canvas = ops.asarray(draw.integers(6, 200, (1, 8)).astype(np.int32))
    soft = draw.standard_normal((1, 8, checkpoint.config.hidden_size)).astype(np.float32)
    held = np.array([[-1, 9, -1, -1, 70, 71, -1, -1]], np.int32)
    own = ops.to_numpy(ops.embed(model.embed_tokens, ops.asarray(np.maximum(held, 0)), 1.0))
    for before in (soft, 0 * soft):
        told = np.where(held[..., None] < 0, before, own).astype(np.float32)
        got = graph.denoise(ops, model, cache, canvas, ops.asarray(before, ops.dtype), ops.asarray(held))
        want = graph.denoise(ops, model, cache, canvas, ops.asarray(told, ops.dtype))
        np.testing.assert_array_equal(ops.to_numpy(got), ops.to_numpy(want))
        free = graph.denoise(ops, model, cache, canvas, ops.asarray(before, ops.dtype), ops.asarray(0 * held - 1))
        bare = graph.denoise(ops, model, cache, canvas, ops.asarray(before, ops.dtype))
        np.testing.assert_array_equal(ops.to_numpy(free), ops.to_numpy(bare))
