"""What a row holds in a pass, where the pass is begun before the one in front of it has been seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.core.config import ModelConfig
from dgemma.core.engine import Engine
from dgemma.core.events import Commit, Done, Draft
from dgemma.core.parts import Draws
from dgemma.core.passes import Starts, StepResult
from fake_passes import CHUNK, FakePasses, finish, request
from tiny import IDS, tiny_checkpoint

OPEN, CLOSE = IDS["<|channel>"], IDS["<channel|>"]


class Tokenizer:
    def id_of(self, token: str) -> int | None:
        return IDS.get(token)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


def changed(draft: np.ndarray) -> np.ndarray:
    """Put marks of the channel into a draft, where its tokens say."""
    draw = np.random.default_rng(int(draft.sum()))
    return np.where(draw.random(len(draft)) < 0.1, draw.choice([OPEN, CLOSE], len(draft)), draft).astype(np.int32)


class Thinking(FakePasses):
    """Keeps what is held, and opens and closes its channel in one draft and not in the next: every pass differs."""

    def step(self, slots: Sequence[int], draws: Draws, starts: Starts) -> Callable[[], StepResult]:
        result = super().step(slots, draws, starts)()
        argmax = np.stack(
            [np.where(held < 0, changed(row), held) for row, held in zip(result.argmax, draws.held, strict=True)]
        )
        result = StepResult(
            canvas=argmax, argmax=argmax, accepted=result.accepted, entropy=result.entropy, stop=result.stop
        )
        return lambda: result


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return Checkpoint.open(tiny_checkpoint(tmp_path_factory.mktemp("ahead"), max_position_embeddings=4096)).config


def events(config: ModelConfig, rows: Sequence[Any], kind: type[FakePasses] = Thinking, **how: Any) -> list[Any]:
    passes = kind(config, chunk=CHUNK, **how)
    engine = Engine(passes, Tokenizer())
    handles = [engine.add(one) for one in rows]
    finish(engine)
    return [list(handle.events()) for handle in handles]


def told(found: list[Any]) -> list[Any]:
    """Everything but times."""
    said: list[Any] = []
    for one in found:
        match one:
            case Draft():
                held = None if one.held is None else one.held.tolist()
                said.append((one.canvas, one.step, one.tokens.tolist(), held))
            case Commit():
                said.append((one.canvas, one.tokens, one.text, one.thinking))
            case Done():
                said.append((one.finish_reason, one.stats.steps, one.stats.canvases))
    return said


AHEAD = [{"lookahead": 1}, {"joined": True}, {"lookahead": 1, "joined": True}]


ROW = st.tuples(st.integers(1, 70), st.booleans(), st.one_of(st.none(), st.integers(0, 40)))


@given(
    rows=st.lists(ROW, min_size=1, max_size=4), how=st.sampled_from(AHEAD), steps=st.integers(1, 6),
)  # fmt: skip
def test_the_channel_is_closed_as_without_looking_ahead(
    config: ModelConfig, rows: list[Any], how: dict[str, Any], steps: int
) -> None:
    wanted = [
        request((20, 21 + i, OPEN) if inside else (20, 21 + i), tokens, seed=i, thinking_budget=budget,
                sampler={"steps": steps})
        for i, (tokens, inside, budget) in enumerate(rows)
    ]  # fmt: skip
    got, want = (list(map(told, events(config, wanted, **one))) for one in (how, {}))
    assert got == want


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_canvas_ends_with_the_channel_closed_where_its_draft_asks_for_it(config: ModelConfig, ahead: int) -> None:
    """Whatever drafts do, unless there is no pass left."""
    ended = 0
    for seed in range(20):
        one = request((20, OPEN), 16, seed=seed, thinking_budget=9, sampler={"steps": 24})
        drafts = [event for event in events(config, [one], lookahead=ahead)[0] if isinstance(event, Draft)]
        last = drafts[-1]
        marks = [OPEN] + [token for token in last.tokens[:9].tolist() if token in (OPEN, CLOSE)]
        wants, held = marks[-1] == OPEN, last.held is not None and bool(last.held[9])
        assert wants == held or len(drafts) == 24
        ended += len(drafts) < 24
    assert ended > 10


@pytest.mark.parametrize("how", [{}, *AHEAD])
def test_canvases_that_are_all_held_take_no_pass(config: ModelConfig, how: dict[str, Any]) -> None:
    """Three of them, the second and third behind one that has been read at once; and another row next to them."""
    canvas = config.canvas_length
    held = tuple(int(token) for token in np.random.default_rng(0).integers(20, 200, 3 * canvas))
    rows = [request(5, 3 * canvas, held=held), request(6, 3 * canvas, seed=1)]
    found = events(config, rows, **how)
    assert [token for one in found[0] if isinstance(one, Commit) for token in one.tokens] == list(held)
    assert not any(isinstance(one, Draft) for one in found[0]) and found[0][-1].stats.steps == 0
    assert told(found[1]) == told(events(config, rows[1:])[0])
