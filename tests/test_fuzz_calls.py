"""Whatever a caller passes in, the outcome is success or one line: no trace, no hang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from fuzzing import JSON, LEAVES, TEXT, attempt, many, some


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import dgemma

    folder = tiny.tiny_checkpoint(tmp_path_factory.mktemp("prompts"), canvas_length=8, max_position_embeddings=64)
    return dgemma.load(str(folder), backend="torch", device="cpu")


IDS = st.one_of(st.integers(-2, tiny.VOCAB + 2), st.sampled_from([2**31, 2**63, 2**64, 10**30, -(2**63) - 1]))
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": TEXT}),
        st.dictionaries(st.sampled_from(["role", "content", "x"]), JSON),
    ),
    max_size=3,
)
PROMPTS = st.one_of(
    TEXT,
    st.text(max_size=200),
    st.lists(st.sampled_from(tiny.SPECIAL), max_size=6).map("".join),
    st.lists(IDS, max_size=80),
    st.lists(IDS, max_size=4).map(tuple),
    MESSAGES,
    JSON,
    st.binary(max_size=4),
    st.lists(st.one_of(LEAVES, st.lists(IDS, max_size=2)), max_size=3),
    st.sampled_from(
        [np.arange(3), np.zeros((2, 2), int), np.array([1.5]), np.array([], int), {1, 2}, iter([1]), object()]
    ),
)
PLAIN = {
    "max_new_tokens": st.integers(1, 40), "seed": st.integers(0, 2**64 - 1), "steps": st.integers(1, 3),
    "schedule_steps": st.integers(1, 50), "entropy_bound": st.floats(0, 10), "t_min": st.floats(0, 0.5),
    "t_max": st.floats(0.5, 2), "confidence": st.floats(0, 1), "stability": st.integers(0, 3),
    "stop": st.one_of(st.text(min_size=1, max_size=2), st.lists(st.text(min_size=1, max_size=2), max_size=2)),
    "eos": st.lists(st.integers(0, tiny.VOCAB - 1), max_size=3), "thinking": st.booleans(), "raw": st.booleans(),
}  # fmt: skip


def check_generation(made: Any, options: dict[str, Any]) -> None:
    assert len(made.token_ids) <= (options.get("max_new_tokens") or 256) and made.finish_reason in ("stop", "length")
    assert all(0 <= token < tiny.VOCAB for token in made.token_ids)
    ends = options.get("eos", ())
    assert not set(made.token_ids) & set([ends] if isinstance(ends, int | np.integer) else ends or ())
    stops = options.get("stop", ())
    assert not any(stop in made.text for stop in ([stops] if isinstance(stops, str) else stops))


@settings(some, max_examples=40)
@given(prompt=PROMPTS, options=st.fixed_dictionaries({}, optional=PLAIN))
def test_prompts(model: Any, prompt: Any, options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 12, "steps": 2} | options
    made = attempt(lambda: model.generate(prompt, **options))
    for one in made if isinstance(made, list) else [made] if made else []:  # a list of texts is several prompts
        check_generation(one, options)


STRANGE = st.one_of(JSON, IDS, st.lists(IDS, max_size=2), st.binary(), st.just(object()), st.just(np.int64(3)))


@many
@given(options=st.dictionaries(st.sampled_from(sorted(PLAIN)), STRANGE, min_size=1, max_size=3))
def test_options(model: Any, options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 8, "steps": 1} | options
    if type(options["steps"]) is int:
        options["steps"] = min(options["steps"], 3)  # more are right, and slow
    made = attempt(lambda: model.generate([5, 6, 7], **options))
    if made is not None:
        check_generation(made, options)


@settings(some, max_examples=40)
@given(prompt=PROMPTS, canvas=PROMPTS, previous=st.sampled_from(["none", "right", "wrong", "junk"]))
def test_logits(model: Any, prompt: Any, canvas: Any, previous: str) -> None:
    length = len(canvas) if isinstance(canvas, list | tuple) else 3
    given_logits = {
        "none": None, "right": np.zeros((length, tiny.VOCAB), np.float32), "wrong": np.zeros((length, 7)), "junk": "x",
    }[previous]  # fmt: skip
    made = attempt(lambda: model.logits(prompt, canvas, given_logits))
    assert made is None or (made.ndim == 2 and made.shape[1] == tiny.VOCAB and made.dtype == np.float32)


NAMES = [
    "auto",
    "torch",
    "numpy",
    "cpu",
    "cpu:",
    "cpu:1",
    "cuda:",
    "cuda:\u00b2",
    "cuda:-1",
    "gpu",
    "float64",
    "float16",
]
WAYS = st.one_of(st.sampled_from(NAMES), TEXT, LEAVES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("ways"))


@some
@given(options=st.dictionaries(st.sampled_from(["backend", "device", "dtype"]), WAYS, min_size=1))
def test_ways_to_load(folder: Path, options: dict[str, Any]) -> None:
    import dgemma

    attempt(lambda: dgemma.load(str(folder), **options))
