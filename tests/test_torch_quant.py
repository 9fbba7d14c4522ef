"""Quantized weights on torch: the file's own bytes, the oracle's numbers, and never a dequantized model in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import dgemma
from dgemma.backends.numpy import NumpyOps
from dgemma.backends.torch import blocks
from dgemma.backends.torch.experts import expert_mlp
from dgemma.backends.torch.inference import InferenceOps
from dgemma.backends.torch.packed import QuantizedTensor, Workspace, dequantize
from dgemma.checkpoints import quant, weights
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.checkpoints.quant import Format, QTensor, quantize
from dgemma.convert import convert, recipes
from dgemma.core.model import denoise, encode, new_cache
from dgemma.core.ops import Ops
from law import assert_close_f32, assert_low_precision
from published import floats
from test_torch import Allocations
from tiny import edit_json, rewrite
from under_test import build

FORMATS = [
    *(Format(bits=bits, group_size=size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)),
    *(Format(bits=bits, symmetric=True) for bits in (2, 3, 4, 5, 6, 8)),
    Format(mode="mxfp4"), Format(mode="mxfp8", bits=8), Format(mode="nvfp4", group_size=16),
]  # fmt: skip
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def name(kind: Format) -> str:
    return f"{kind.mode}{kind.bits}g{kind.group_size}{'s' * kind.symmetric}"


def random_tensor(kind: Format, *shape: int, largest: int = 0x7F) -> QTensor:
    """Any bits for codes and scales, bf16 exponents up to `largest`; of float scales every byte there is."""
    draw = np.random.default_rng(shape)
    words = draw.integers(0, 2**32, (*shape[:-1], kind.words_per_row(shape[-1])), np.uint32)
    grouped = (*shape[:-1], kind.groups_per_row(shape[-1]))
    if kind.mode != "affine":
        return QTensor(words=words, scales=draw.integers(0, 256, grouped, np.uint8), format=kind)
    scales, biases = (draw.integers(0, 2**16, grouped, np.uint16) & (0x80FF | largest << 8) for _ in range(2))
    return QTensor(words=words, scales=scales, biases=biases if kind.stores_biases else None, format=kind)


def bits_of(x: Any) -> np.ndarray:
    """As integers, all NaN alike."""
    x = x.view(torch.int16).numpy() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else np.asarray(x)
    wide = quant.from_bf16(x.view(np.uint16)) if x.dtype in (np.int16, np.uint16) else x.astype(np.float32)
    return np.where(np.isnan(wide), -1, wide.view(np.int32))


# ---- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("kind", FORMATS, ids=name)
def test_values_are_the_definitions_to_the_bit(kind: Format) -> None:
    for shape in ((5, 128), (2, 3, 384), (3, 1, 2, 256)):
        q = random_tensor(kind, *shape)
        factors: list[Any] = [None]
        if kind.mode == "nvfp4":
            factors += [np.float32(0.37), np.random.default_rng(0).uniform(0.1, 9, (*shape[:-1], 1)).astype(np.float32)]
        for factor in factors:
            q = QTensor(words=q.words, scales=q.scales, biases=q.biases, global_scale=factor, format=kind)
            packed = QuantizedTensor.from_host(q)
            assert packed.shape == q.shape and packed.nbytes == q.nbytes
            for dtype, width in DTYPES.items():
                got, want = dequantize(packed, width), quant.dequantize(q, dtype)
                np.testing.assert_array_equal(bits_of(got), bits_of(want))
            last = shape[0] - 1
            for part, index in ((packed[last], last), (packed[1:], np.s_[1:]), (packed[torch.tensor([1, 0])], [1, 0])):
                np.testing.assert_array_equal(
                    bits_of(dequantize(part, torch.float32)), bits_of(quant.dequantize(q)[index])
                )
            np.testing.assert_array_equal(
                bits_of(dequantize(packed.rows(), torch.float32)), bits_of(quant.dequantize(q.rows()))
            )


@pytest.mark.parametrize("kind", FORMATS, ids=name)
def test_blocks_hold_the_same_values(kind: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that divide nothing evenly, in a buffer that held something else."""
    monkeypatch.setattr(blocks, "BLOCK", 128 * 7)
    monkeypatch.setattr(blocks, "PIECE", 128 * 3)
    q = random_tensor(kind, 23, 128, largest=0x3F)
    packed, workspace = QuantizedTensor.from_host(q), Workspace()
    for dtype, width in DTYPES.items():
        want = torch.from_numpy(quant.dequantize(q, "float32")).to(width)
        for part in (packed, packed[:20], packed):
            found = [(rows, block.clone()) for rows, block in blocks.blocks(part, width, workspace)]
            assert len(found) == 4 if len(part.words) == 23 else 3
            assert [rows.start for rows, _ in found[1:]] == [rows.stop for rows, _ in found[:-1]]
            got = torch.cat([block for _, block in found])
            torch.testing.assert_close(got, want[: len(got)], rtol=0, atol=0, equal_nan=True, msg=dtype)
        torch.testing.assert_close(blocks.whole(packed, width), want, rtol=0, atol=0, equal_nan=True)


def test_words_are_the_map(tmp_path: Path) -> None:
    convert(floats(tmp_path), tmp_path / "out", "4bit", workers=1)
    checkpoint, packed = Checkpoint.open(tmp_path / "out"), 0
    with Allocations() as made:
        for one in weights.shapes(checkpoint.config):
            stored, got = checkpoint.tensor(one), InferenceOps("bfloat16").pack(checkpoint.tensor(one))
            if isinstance(stored, QTensor):
                assert isinstance(got, QuantizedTensor) and got.words.data_ptr() == stored.words.ctypes.data
                assert got.scales.data_ptr() == stored.scales.ctypes.data
                packed += 1
    assert packed == 30 and not made.sizes


def test_a_quantized_folder_counts_as_the_width_of_its_scales(tmp_path: Path) -> None:
    """`dtype="auto"` for large models: norms left in float32 do not make a bfloat16 model a float32 one."""
    folder = floats(tmp_path, dtype="float32")
    for recipe in ("4bit", "mxfp8"):
        convert(folder, tmp_path / recipe, recipe, workers=1)
        assert Checkpoint.open(tmp_path / recipe).stored_dtype == "bfloat16"
    assert Checkpoint.open(folder).stored_dtype == "float32"


# ---- Whole models ---------------------------------------------------------------------------------------------------

Answers = dict[str, np.ndarray]


def narrow(table: np.ndarray) -> np.ndarray:
    """A table under which distributions are neither flat nor certain: entropies are then no small differences."""
    return (table.astype(np.float32) * 0.3).astype(ml_dtypes.bfloat16)


def source(tmp_path: Path, **overrides: Any) -> Path:
    table = "model.decoder.embed_tokens.weight"
    return rewrite(floats(tmp_path, **overrides), lambda tensors: tensors.update({table: narrow(tensors[table])}))


def answers(ops: Ops, checkpoint: Checkpoint) -> Answers:
    """Encode in two chunks, denoise with a soft embedding, and everything that reads the vocabulary."""
    model, draw = build(ops, checkpoint.config, checkpoint.tensor), np.random.default_rng(0)
    width, vocab = checkpoint.config.hidden_size, checkpoint.config.vocab_size
    cache = new_cache(ops, checkpoint.config, slots=1, capacity=64, scratch=16)
    for chunk in np.split(draw.integers(16, vocab, (1, 26)).astype(np.int32), [16], 1):
        cache = encode(ops, model, cache, ops.asarray(chunk))
    soft = ops.asarray(draw.normal(0, 0.3, (1, 16, width)).astype(ml_dtypes.bfloat16).astype(np.float32), ops.dtype)
    x = denoise(ops, model, cache, ops.asarray(draw.integers(16, vocab, (1, 16)).astype(np.int32)), soft)
    logits = ops.logits(x, model.embed_tokens, checkpoint.config.softcap)
    heat, u = ops.asarray(np.array([[0.7]]), ops.wide), ops.asarray(draw.random((1, 16)).astype(np.float32))
    token, argmax, entropy, mean = ops.vocab_head(x, model.embed_tokens, checkpoint.config.softcap, heat, u)
    shares = ops.asarray(draw.dirichlet(np.ones(vocab), (1, 16)).astype(np.float32), ops.wide)
    found = {
        "states": x, "logits": logits, "token": token, "argmax": argmax, "entropy": entropy, "soft": mean,
        "mean embedding": ops.mean_embedding(shares, model.embed_tokens),
    }  # fmt: skip
    return {key: ops.to_numpy(value) for key, value in found.items()}


@pytest.mark.parametrize("mlx", [False, True], ids=["", "mlx"])
@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_every_recipe_gives_the_oracles_answers(
    tmp_path: Path, recipe: str, mlx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 64 * 100)
    convert(source(tmp_path), tmp_path / "out", recipe, mlx=mlx, workers=1)
    checkpoint = Checkpoint.open(tmp_path / "out")
    want, got = (answers(ops, checkpoint) for ops in (NumpyOps("float64"), InferenceOps()))
    for what in want:
        if what in ("token", "argmax"):
            np.testing.assert_array_equal(got[what], want[what], what)
        else:
            assert_close_f32(got[what], want[what], what)


@pytest.mark.parametrize("recipe", ["8bit", "4bit", "4bit-mlx", "nvfp4", "mxfp8"])
def test_low_precision(tmp_path: Path, recipe: str) -> None:
    # All experts are chosen: with a choice, rounding makes another one now and then, and errors are of another kind.
    convert(source(tmp_path, top_k_experts=4), tmp_path / "out", recipe, workers=1)
    checkpoint = Checkpoint.open(tmp_path / "out")
    runs = (InferenceOps("bfloat16"), NumpyOps("bfloat16"), NumpyOps("float64"))
    got, rounded, exact = (answers(ops, checkpoint) for ops in runs)
    for what in ("states", "logits", "mean embedding"):
        assert_low_precision(got[what], rounded[what], exact[what], what)


@pytest.mark.parametrize("recipe", ["4bit", "8bit"])
def test_nano_writes_the_same_text(tmp_path: Path, recipe: str) -> None:
    convert("nano", tmp_path / "out", recipe, workers=1)
    got, want = (
        dgemma.load(tmp_path / "out", backend=one).generate(".3.1\n.2..\n....\n...4") for one in ("torch", "numpy")
    )
    assert got.token_ids == want.token_ids and got.stats.steps == want.stats.steps


# ---- Ops ------------------------------------------------------------------------------------------------------------


def on_torch(kind: Format, *shape: int) -> tuple[QuantizedTensor, torch.Tensor]:
    """A packed weight, and its values."""
    q = quantize(np.random.default_rng(shape).standard_normal(shape).astype(np.float32), kind)
    return QuantizedTensor.from_host(q), torch.from_numpy(quant.dequantize(q))


@pytest.mark.parametrize("block", [64 * 20, 64 * 64 * 2, 1 << 20], ids=["rows", "pairs", "all"])
def test_only_the_experts_that_are_hit_are_dequantized(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some alone, some with their neighbours, some in parts; one weight packed, the other not."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    (packed_up, up), (packed_down, down) = on_torch(Format(), 9, 64, 64), on_torch(Format(bits=8), 9, 64, 32)
    x, index, heat = torch.randn(3, 64), torch.tensor([[1, 2], [4, 6], [2, 7]]), torch.rand(3, 2)
    for one in (packed_up, packed_down):
        one.scales[[0, 3, 5, 8]] = torch.nan
    want = expert_mlp(x, index, heat, up, down)
    for both in ((packed_up, packed_down), (packed_up, down), (up, packed_down)):
        assert_close_f32(expert_mlp(x, index, heat, *both), want)


# ---- Memory ---------------------------------------------------------------------------------------------------------


def test_buffers_are_blocks_and_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over a packed weight allocates what one over a dense weight does, and a fraction of a block's scales."""
    monkeypatch.setattr(blocks, "BLOCK", 1 << 14)
    monkeypatch.setattr(blocks, "PIECE", 1 << 13)
    packed, dense = on_torch(Format(symmetric=True), 1 << 11, 128)
    ops, x = InferenceOps(), torch.randn(3, 128)
    ops.linear(x, packed)
    with Allocations() as made:
        got = ops.linear(x, packed)
    assert max(made.sizes) <= got.nbytes and sum(made.sizes) < dense.nbytes / 4
    assert_close_f32(got, torch.nn.functional.linear(x, dense))


def test_a_running_model_takes_little_more_than_its_file(tmp_path: Path) -> None:
    """What a model of 76 M parameters holds, above a small one: 0.3 GB if it were dequantized."""
    shape: dict[str, Any] = dict(num_experts=8, top_k_experts=8, hidden_size=128, moe_intermediate_size=128)
    small, large = (floats(tmp_path, name=f"{size}-source", **shape) for size in ("small", "large"))
    text = json.loads((large / "config.json").read_text())["text_config"]
    edit_json(large / "config.json", text_config=text | {"num_experts": 512})
    draw = np.random.default_rng(0)

    def widen(tensors: dict[str, np.ndarray]) -> None:
        for key, one in tensors.items():
            if "expert" in key:
                tensors[key] = np.concatenate([one] * 64)
            elif "router.proj" in key:  # no two experts alike, so that all are hit
                tensors[key] = draw.standard_normal((512, 128)).astype(one.dtype)

    for size, folder in (("small", small), ("large", rewrite(large, widen))):
        convert(folder, tmp_path / size, "8bit", workers=1)
    code = f"""
import dgemma, psutil, torch
torch.set_num_threads(1)
held = []
for size in ("small", "large"):
    model = dgemma.load({str(tmp_path)!r} + "/" + size, backend="torch", dtype="float32")
    logits = model.logits(list(range(16, 200)) * 2, list(range(200, 270)) * 2)
    held.append(psutil.Process().memory_info().rss)  # not the peak, which a process inherits from its parent
print(held[1] - held[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, file = int(done.stdout), sum(one.stat().st_size for one in (tmp_path / "large").glob("*.safetensors"))
    assert file > 70e6 and 0.5 * file < grown < 1.3 * file, f"{grown / 1e6:.0f} MB over a file of {file / 1e6:.0f} MB"
