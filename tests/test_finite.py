"""NaN, infinity and float16's end are errors that say what to try, wherever they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma import DiffusionGemma
from said import says
from tiny import IDS, VOCAB, rewrite, tiny_checkpoint

BACKENDS = ("numpy", "torch", "mlx", "onnx")
PROMPT, CANVAS = [40, 41, 42], list(range(60, 76))
LAYER = "model.decoder.layers.1"
Change = Callable[[dict[str, np.ndarray]], Any]


def load(folder: Path, backend: str, dtype: str = "float32") -> DiffusionGemma:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.which", lambda *_: None)  # MLX compiles nothing
        return dgemma.load(folder, backend=backend, dtype=dtype)


def put(name: str, value: float, *where: int) -> Change:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][where or (0,) * tensors[name].ndim] = value

    return change


DAMAGE = {
    "a word nobody uses": put("model.decoder.embed_tokens.weight", np.nan, VOCAB - 1, 3),
    "an infinite word": put("model.decoder.embed_tokens.weight", np.inf, VOCAB - 1, 3),
    "attention": put(f"{LAYER}.self_attn.k_proj.weight", np.nan),
    "the router": put(f"{LAYER}.router.proj.weight", np.nan),
    "an infinite dense weight": put(f"{LAYER}.mlp.down_proj.weight", np.inf),
    "a whole expert stack": lambda tensors: tensors[f"{LAYER}.experts.down_proj"].fill(np.nan),
    "self-conditioning": put("model.decoder.self_conditioning.up_proj.weight", np.nan),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_matrix_is_an_error_by_the_second_pass(backend: str, damage: str, tmp_path: Path) -> None:
    model = load(rewrite(tiny_checkpoint(tmp_path), DAMAGE[damage]), backend)
    with says("a pass in float32 came to NaN or infinity", "the weights are damaged"):
        model.generate(PROMPT, 16, steps=3, confidence=0.0)


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_word_is_an_error_in_a_single_pass_too(backend: str, value: float, tmp_path: Path) -> None:
    """The soft cap makes its logits finite, and no second pass reads the mean of such words."""
    change = put("model.decoder.embed_tokens.weight", value, 0, 0)
    model = load(rewrite(tiny_checkpoint(tmp_path), change), backend)
    with says("a pass in float32 came to NaN or infinity", "the weights are damaged"):
        model.generate(PROMPT, 16, steps=1)
    with says("a pass in float32 came to NaN or infinity", "the weights are damaged"):
        model.generate(PROMPT, 16, stability=0, confidence=100.0)
    with says("a pass in float32 came to NaN or infinity", "the weights are damaged"):
        model.logits(PROMPT, CANVAS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_damaged_in_the_prompts_cache_alone_is_an_error(backend: str, tmp_path: Path) -> None:
    """A word that stands in the prompt and, its logits being fine, nowhere else."""
    model = load(tiny_checkpoint(tmp_path), backend)
    passes: Any = model.engine.passes
    original = passes.read

    def spoilt(rows: Any) -> None:
        original(rows)
        for slot, _ in rows:
            if backend == "onnx":
                cache = passes._slots[slot].cache
                name = list(cache)[-1]
                cache[name] = cache[name].numpy() * np.float32(np.nan)
                continue
            kept = passes.save(slot)
            *layers, last = kept.data
            passes._load(slot, replace(kept, data=(*layers, last._replace(values=last.values * float("nan")))))

    passes.read = spoilt
    with says("a pass in float32 came to NaN"):
        model.generate(PROMPT, 16, steps=3)
    with says("a pass in float32 came to NaN"):
        model.logits(PROMPT, CANVAS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_that_overflows_says_what_to_try(backend: str, tmp_path: Path) -> None:
    def large(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{LAYER}.mlp.up_proj.weight"] *= 1e6  # ONNX Runtime computes some of it in float32

    folder = rewrite(tiny_checkpoint(tmp_path), large)
    assert len(load(folder, backend).generate(PROMPT, 16, steps=2, eos=()).token_ids) == 16
    narrow = load(folder, backend, "float16")
    with says("a pass in float16", "try dtype bfloat16 or float32"):
        narrow.generate(PROMPT, 16, steps=2)
    with says("a pass in float16", "try dtype bfloat16 or float32"):
        narrow.logits(PROMPT, CANVAS)


@pytest.mark.parametrize(
    "name", ["model.decoder.norm.weight", f"{LAYER}.layer_scalar", f"{LAYER}.self_attn.q_norm.weight"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_norm_or_scalar_that_is_no_number_is_refused_by_name(name: str, value: float, tmp_path: Path) -> None:
    with says(name, "NaN or infinity", "damaged"):
        load(rewrite(tiny_checkpoint(tmp_path), put(name, value)), "numpy")


def test_a_norm_beyond_float16_is_refused_there_alone(tmp_path: Path) -> None:
    folder = rewrite(tiny_checkpoint(tmp_path), put("model.decoder.norm.weight", 7e4))
    with says("model.decoder.norm.weight", "70000", "65,504", "bfloat16 or float32"):
        load(folder, "torch", "float16")
    load(folder, "torch", "bfloat16")


@pytest.mark.parametrize("backend", BACKENDS)
def test_previous_logits_are_numbers(backend: str, tmp_path: Path) -> None:
    model = load(tiny_checkpoint(tmp_path), backend)
    before = model.logits(PROMPT, CANVAS)
    for value in (np.nan, np.inf):
        bad = before.copy()
        bad[3, 7] = value
        with says("previous_logits", "position 3"):
            model.logits(PROMPT, CANVAS, bad)
    with says("previous_logits", "position 0"):
        model.logits(PROMPT, CANVAS, np.full_like(before, -np.inf))
    with says("previous_logits", "position 0"):
        model.logits(PROMPT, CANVAS, np.full(before.shape, 1e300))  # infinite in float32
    masked, low = before.copy(), before.copy()
    masked[:, IDS["<pad>"]], low[:, IDS["<pad>"]] = -np.inf, -1e30
    np.testing.assert_array_equal(model.logits(PROMPT, CANVAS, masked), model.logits(PROMPT, CANVAS, low))
