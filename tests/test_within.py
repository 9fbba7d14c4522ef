"""Passes inside a language, through the engine: the same tokens on every backend, whatever shares the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.constraints.walk import Constraint
from dgemma.core.config import SamplerConfig
from dgemma.core.engine import Engine
from dgemma.core.errors import DgemmaError
from dgemma.core.events import Commit
from dgemma.core.row import Request
from held_cases import engine_on, small_checkpoint
from lattices import automaton_of
from under_test import build, make_ops, passes_of

BACKENDS = ("numpy", "inference", "mlx")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return small_checkpoint(tmp_path_factory.mktemp("within"))


def language(seed: int, vocab: int, *, feedback: float = 0.0) -> Constraint:
    """A random automaton of six states over a vocabulary in some twenty classes; every state accepts."""
    draw = np.random.default_rng(seed)
    columns = draw.integers(0, 6, (6, 20))
    columns[draw.random(columns.shape) < 0.4] = -1
    return Constraint(
        automaton=automaton_of(columns[:, draw.integers(0, 20, vocab)], np.ones(6, bool)), feedback=feedback
    )


def asked(seed: int, constraint: Constraint | None, **how: Any) -> Request:
    sampler = SamplerConfig(steps=3, schedule_steps=3, confidence=0.0, entropy_bound=1.0, **how)
    return Request(
        prompt=(7, 8, 9, 10 + seed), max_new_tokens=24, seed=seed, sampler=sampler, eos_token_ids=(),
        constraint=constraint,
    )  # fmt: skip


def tokens(engine: Engine, *requests: Request) -> list[tuple[int, ...]]:
    handles = [engine.add(one) for one in requests]
    return [
        tuple(token for event in handle.events() if isinstance(event, Commit) for token in event.tokens)
        for handle in handles
    ]


def test_tokens_are_equal_everywhere_and_in_the_language(checkpoint: Checkpoint) -> None:
    vocab = checkpoint.config.vocab_size
    requests = [
        asked(1, language(1, vocab)), asked(2, language(2, vocab, feedback=0.5)),
        asked(3, language(1, vocab), greedy=True), asked(4, None),
    ]  # fmt: skip
    found = {}
    for backend in BACKENDS:
        engine = engine_on(backend, checkpoint)
        alone = [tokens(engine, one)[0] for one in requests]
        assert tokens(engine, *requests) == alone, f"{backend}: what shares a batch"
        found[backend] = alone
    assert found["numpy"] == found["inference"] == found["mlx"]
    for request, answer in zip(requests, found["numpy"], strict=True):
        if request.constraint is not None:
            assert len(answer) == 24 and request.constraint.automaton.accepts(list(answer))  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pass_that_is_no_number_is_said_to_be(backend: str, checkpoint: Checkpoint) -> None:
    """Damaged weights are not taken for a language that nothing fits, and the row beside it is told the same."""
    ops = make_ops(backend, "float32")
    config = replace(checkpoint.config, image_token_ids=())

    def damaged(name: str) -> Any:
        tensor = np.array(checkpoint.tensor(name))
        if name.endswith("embed_tokens.weight"):
            tensor[20] = np.nan
        return tensor

    engine = Engine(passes_of(ops, build(ops, config, damaged)), None)
    with pytest.raises(DgemmaError, match="a pass in float32 came to NaN or infinity"):
        tokens(engine, asked(1, language(1, config.vocab_size)))


def test_classes_of_many_requests_stay_on_the_device(checkpoint: Checkpoint) -> None:
    """Requests of different languages take turns; none is brought to the device, or laid out, more than once."""
    engine = engine_on("inference", checkpoint)
    seen: list[int] = []
    asarray = engine.passes.ops.asarray  # type: ignore[attr-defined]

    def counting(x: Any, *how: Any) -> Any:
        if getattr(x, "shape", None) == (checkpoint.config.vocab_size,):
            seen.append(1)
        return asarray(x, *how)

    engine.passes.ops.asarray = counting  # type: ignore[attr-defined]
    languages = [language(seed, checkpoint.config.vocab_size) for seed in range(3)]
    tokens(engine, *(asked(seed, one) for seed, one in enumerate(languages)))
    assert len(seen) == 3
