"""Temperature, greedy, and settings that are given alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma.core.config import COLDEST, SamplerConfig
from dgemma.core.random import step_noise
from dgemma.core.sampler import settings
from said import says
from tiny import tiny_checkpoint

BASE = SamplerConfig(t_min=0.6, t_max=1.2)
BOARD = ".3.1\n.2..\n....\n...4"


@pytest.mark.parametrize(
    ("given", "t_min", "t_max"),
    [
        ({}, 0.6, 1.2), ({"t_max": 0.5}, 0.5, 0.5), ({"t_max": 0.9}, 0.6, 0.9), ({"t_min": 1.5}, 1.5, 1.5),
        ({"t_min": 0.0}, 0.0, 1.2), ({"temperature": 1}, 0.6, 1.2), ({"temperature": 0.5}, 0.3, 0.6),
        ({"temperature": 2.0, "t_max": 0.5}, 1.0, 1.0), ({"temperature": 1e-9}, 6e-10, COLDEST),
        ({"temperature": 0}, 0.6, 1.2), ({"temperature": 0, "t_max": 0.5}, 0.5, 0.5),
    ],
)  # fmt: skip
def test_the_schedule(given: dict[str, Any], t_min: float, t_max: float) -> None:
    got = settings(BASE, **given)
    assert (got.t_min, got.t_max) == pytest.approx((t_min, t_max))
    assert got.greedy == (given.get("temperature") == 0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"t_max": -1}, ["t_max is -1"]), ({"t_max": False}, ["t_max is false"]),
        ({"t_max": 0}, ["t_max is 0", "greedy"]), ({"t_max": 0.1, "t_min": 0.9}, ["t_max is 0.1", "t_min 0.9"]),
        ({"temperature": -1}, ["temperature is -1", "0 (greedy)"]), ({"temperature": float("nan")}, ["temperature"]),
        ({"temperature": True}, ["temperature"]), ({"temperature": "hot"}, ["temperature"]),
        ({"greedy": 1}, ["greedy is 1", "True or False"]), ({"t_max": "x"}, ["t_max"]), ({"t_max": True}, ["t_max"]),
        ({"temperature": 99}, ["t_max", "100"]),
    ],
)  # fmt: skip
def test_what_cannot_be(given: dict[str, Any], words: list[str]) -> None:
    with says(*words):
        settings(BASE, **given)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("greedy"), canvas_length=16)


def drafts(model: dgemma.DiffusionGemma, prompt: str, **options: Any) -> list[tuple[list[int], list[bool]]]:
    return [
        (event.tokens.tolist(), event.accepted.tolist())
        for event in model.stream(prompt, max_new_tokens=32, **options)
        if isinstance(event, dgemma.Draft)
    ]


def test_temperature_zero_is_greedy() -> None:
    model = dgemma.load("nano", backend="numpy")
    assert drafts(model, BOARD, temperature=0) == drafts(model, BOARD, greedy=True)
    assert drafts(model, BOARD, temperature=1) == drafts(model, BOARD)


def test_greedy_passes_read_the_most_probable_tokens(tiny: Path) -> None:
    """Every accepted position of the canvas that the next pass reads is the draft's; the others are noise."""
    model = dgemma.load(tiny, backend="numpy")
    options: dict[str, Any] = dict(seed=2, steps=6, confidence=0.0, entropy_bound=5.0)

    def read(**how: Any) -> list[dgemma.Draft]:
        events = model.stream("x", max_new_tokens=32, **options, **how)
        return [event for event in events if isinstance(event, dgemma.Draft)]

    vocab, made = model.config.vocab_size, read(greedy=True)
    assert len(made) == 12
    for one in made:
        noise = step_noise(seed=2, canvas=one.canvas, step=one.step + 1, length=16, vocab_size=vocab)[1]
        np.testing.assert_array_equal(one.following, np.where(one.accepted, one.tokens, noise))
    assert any((one.following != one.tokens)[one.accepted].any() for one in read()), (
        "draws are the most probable tokens here in any case"
    )


@pytest.mark.parametrize("backend", ["torch", "mlx", "onnx"])
def test_greedy_is_the_same_on_every_backend(backend: str) -> None:
    """On a trained model: in a random one two tokens may be as good as each other."""
    pytest.importorskip({"mlx": "mlx.core", "onnx": "onnxruntime"}.get(backend, backend))
    oracle, other = (dgemma.load("nano", backend=one, dtype="float32") for one in ("numpy", backend))
    for prompt in (BOARD, "..4.2.\n.6...4\n2.....\n.....5\n5...1.\n.1.3.."):
        assert drafts(other, prompt, greedy=True) == drafts(oracle, prompt, greedy=True)
