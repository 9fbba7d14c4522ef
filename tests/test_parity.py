"""Second rung of the ladder: the whole graph against transformers 5.23, float32, on random models of three shapes."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import pytest

import hf
from dgemma.core.ops import Ops
from dgemma.core.parts import Model
from law import NMSE, assert_close_f32, nmse
from mutations import MUTATIONS
from under_test import BACKENDS, Margins, make_ops


class Case(NamedTuple):
    """A question to both sides. Lengths are tokens, or (windows, tokens) for a multiple of the window plus tokens."""

    lengths: tuple[int | tuple[int, int], ...]
    previous: bool


CASES: dict[str, Case] = {
    "one token": Case((1,), False),
    "odd": Case((7,), True),
    "window - 1": Case(((1, -1),), False),
    "window": Case(((1, 0),), True),
    "window + 1": Case(((1, 1),), False),
    "window + 2": Case(((1, 2),), True),
    "two windows and more": Case(((2, 3),), False),
    "two windows and more, conditioned": Case(((2, 3),), True),
    "second canvas": Case((3, 16), False),
    "second canvas, conditioned": Case(((1, 0), 16), True),
    "second canvas, long prompt, conditioned": Case(((2, 3), 16), True),
    "third canvas": Case(((1, -1), 16, 16), True),
    "third canvas, long prompt": Case(((2, 1), 16, 16), False),
}


SALT = 33
"""Chosen so that `test_no_choice_of_experts_is_a_near_tie` holds."""


def question(shape: str, case: str) -> tuple[list[np.ndarray], np.ndarray, np.ndarray | None]:
    """Random prompt and committed canvases, canvas and previous logits; the same for every backend."""
    text = hf.SHAPES[shape]
    draw = np.random.default_rng([SALT, *f"{shape} {case}".encode()])
    window, vocab = text["sliding_window"], text["vocab_size"]
    sizes = [n if isinstance(n, int) else n[0] * window + n[1] for n in CASES[case].lengths]
    prompts = [draw.integers(6, vocab, n) for n in sizes]  # the first six are special tokens; one stands for an image
    canvas = draw.integers(6, vocab, 16)
    previous = draw.normal(0.0, 4.0, (16, vocab)).astype(np.float32) if CASES[case].previous else None
    return prompts, canvas, previous


@cache
def reference_logits(shape: str, case: str) -> np.ndarray:
    return hf.logits(hf.shared(shape), *question(shape, case))


@cache
def loaded(backend: str, shape: str) -> tuple[Ops, Model]:
    ops = make_ops(backend, "float32")
    return ops, hf.load(ops, hf.shared(shape))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", hf.SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_equal_transformers(backend: str, shape: str, case: str) -> None:
    got = hf.our_logits(*loaded(backend, shape), *question(shape, case))
    assert_close_f32(got, reference_logits(shape, case), f"{backend} logits")


@pytest.mark.parametrize("name", MUTATIONS)
def test_parity_can_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong detail must show far above the law's own bound, or the tests above would let it through."""
    shape, case = "top4", "second canvas, long prompt, conditioned"
    ops, model = MUTATIONS[name](monkeypatch, *loaded("numpy", shape))
    figure = nmse(hf.our_logits(ops, model, *question(shape, case)), reference_logits(shape, case))
    assert figure > 100 * NMSE, f"{name}: NMSE is only {figure:.1e}"


@pytest.mark.parametrize("shape", hf.SHAPES)
def test_no_choice_of_experts_is_a_near_tie(shape: str) -> None:
    oracle = Margins()
    model = hf.load(oracle, hf.shared(shape))
    for case in CASES:
        hf.our_logits(oracle, model, *question(shape, case))
        assert oracle.smallest > 1e-5, f"{case}: choose another salt"
