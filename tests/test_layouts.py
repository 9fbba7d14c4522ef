"""Every published layout is read for what it means, carried without a second rounding, and refused when damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

import dgemma
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.checkpoints.loading import dense
from dgemma.checkpoints.quant import Format, QTensor
from dgemma.checkpoints.quantized import Quantization
from dgemma.checkpoints.safetensors import SafetensorsFile
from dgemma.tools.inspect import inspect_folder
from law import assert_close_f32
from published import IMAGE, LAYOUTS, floats, published, read_config, suited
from said import says
from tiny import rewrite, shard, tiny_weights
from under_test import build, make_ops, passes_of


def logits(config: Any, get: Callable[[str], Any], backend: str) -> np.ndarray:
    ops = make_ops(backend, "float32")
    passes = passes_of(ops, build(ops, config, get))
    draw = np.random.default_rng(0)
    prompt, canvas = draw.integers(16, config.vocab_size, (2, 13), np.int32)
    slot = passes.open(32, 13)
    passes.read([(slot, prompt)])
    return passes.logits(slot, canvas, draw.standard_normal((13, config.vocab_size)).astype(np.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_converts_to_what_it_means(tmp_path: Path, layout: str) -> None:
    folder, meant = published(tmp_path, layout)
    report = dgemma.convert(folder, tmp_path / "out", verify=True, **suited(tmp_path, layout))
    checkpoint = Checkpoint.open(tmp_path / "out")
    checkpoint.check()
    for name, want in meant.items():
        stored = checkpoint.tensor(name)
        got = dense(stored, "float32").astype(np.float32)
        if layout == "fp8" and want.ndim > 1:  # E4M3 times a scale has more bits than bf16
            want = want.astype(ml_dtypes.bfloat16).astype(np.float32)
        if not isinstance(stored, QTensor) or layout in ("modelopt", "nvfp4", "mlx"):
            quantized_afresh = (
                layout == "modelopt" and ".experts." not in name and want.ndim > 1 and "router" not in name
            )
            if quantized_afresh:
                assert np.linalg.norm(got - want) < 0.006 * np.linalg.norm(want), name
            else:
                np.testing.assert_array_equal(got, want, err_msg=name)
    assert report.layout == {"mlx": "mlx", "modelopt": "modelopt"}.get(layout, "compressed-tensors")
    assert (report.counts.get("requantized", 0), report.counts.get("carried", 0) > 0) == (0, layout != "fp8")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_its_logits_are_the_dequantized_models(tmp_path: Path, layout: str) -> None:
    folder, meant = published(tmp_path, layout)
    if layout == "modelopt":  # carry the experts, leave the rest in bf16
        (tmp_path / "experts.toml").write_text('"*.experts.*" = "nvfp4"\n')
        options: dict[str, Any] = {"rules": tmp_path / "experts.toml"}
    else:
        options = suited(tmp_path, layout)
    dgemma.convert(folder, tmp_path / "out", **options)
    if layout == "fp8":
        meant = {name: value.astype(ml_dtypes.bfloat16).astype(np.float32) for name, value in meant.items()}
    checkpoint = Checkpoint.open(tmp_path / "out")
    want = logits(checkpoint.config, lambda name: meant[name], "numpy")
    for backend in ("numpy", "inference", "mlx"):
        assert_close_f32(logits(checkpoint.config, checkpoint.tensor, backend), want, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspect_counts_every_byte_of_a_layout(tmp_path: Path, layout: str) -> None:
    folder, _ = published(tmp_path, layout)
    file = SafetensorsFile.open(folder / "model.safetensors")
    useless = ("input_scale", "input_global_scale")
    left_out = [one for one in file.entries if one.endswith(useless) or "language_model.layers.0.mlp" in one]
    left_out += [IMAGE] + ["lm_head.weight"] * (layout == "modelopt")
    found = inspect_folder(folder)
    assert found.text_bytes == sum(one.nbytes for name, one in file.entries.items() if name not in left_out)
    experts = next(part for part in found.parts if part.name == "experts")
    assert experts.formats == ({"fp8": "fp8", "mlx": "affine4-g64"}.get(layout, "nvfp4"),)


def test_mlx_communitys_folders_load_as_they_are(tmp_path: Path) -> None:
    folder, meant = published(tmp_path, "mlx")
    checkpoint = Checkpoint.open(folder)
    checkpoint.check()
    for name, want in meant.items():
        np.testing.assert_array_equal(dense(checkpoint.tensor(name), "float32").astype(np.float32), want)
    experts = checkpoint.tensor("model.decoder.layers.0.experts.gate_up_proj")
    assert isinstance(experts, QTensor) and experts.format == Format(group_size=64)
    assert not experts.words.flags.owndata, "copied"


def test_mlx_communitys_words_are_carried_to_the_bit(tmp_path: Path) -> None:
    folder, _ = published(tmp_path, "mlx")
    report = dgemma.convert(folder, tmp_path / "out", "4bit-mlx", mlx=True)
    before = SafetensorsFile.open(folder / "model.safetensors")
    after = SafetensorsFile.open(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert before.entries.keys() == after.entries.keys()
    for name in before.entries:
        assert before.tensor(name).tobytes() == after.tensor(name).tobytes(), name
    assert report.counts.keys() == {"carried", "stored"}
    old, new = (json.loads((path / "config.json").read_text())["quantization"] for path in (folder, tmp_path / "out"))
    said = [Quantization.from_config({"quantization": one}, "x") for one in (old, new)]
    modules = {name.removesuffix(".scales") for name in before.entries if name.endswith(".scales")}
    assert all(said[0].format(one) == said[1].format(one) for one in modules)


def test_a_quantized_image_tower_is_carried(tmp_path: Path) -> None:
    """mlx-vlm's converter quantizes the projection of image features with the default entry."""
    folder, _ = published(tmp_path, "mlx")
    module = "model.encoder.embed_vision.embedding_projection"
    parts = mx.quantize(mx.random.normal((64, 64), key=mx.random.key(0)).astype(mx.bfloat16), 64, 4, stream=mx.cpu)
    arrays = [np.array(part.view(mx.uint16) if i else part) for i, part in enumerate(parts)]
    new = {
        f"{module}.{kind}": array if i == 0 else array.view(ml_dtypes.bfloat16)
        for i, (kind, array) in enumerate(zip(("weight", "scales", "biases"), arrays, strict=True))
    }
    rewrite(folder, lambda tensors: tensors.update(new))
    (folder / "model.safetensors.index.json").unlink()
    dgemma.convert(folder, tmp_path / "out", "8bit", requantize=True, verify=True)
    file = Checkpoint.open(tmp_path / "out").files[0]
    assert all(file.tensor(name).tobytes() == array.tobytes() for name, array in new.items())
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert entries["bits"] == 8 and entries[module] == {"group_size": 64, "bits": 4, "mode": "affine"}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_mlx_folders_of_other_widths_load_for_what_they_mean(tmp_path: Path, dtype: str) -> None:
    """MLX stores scales in the model's own width. float16 is kept; of float32 a QTensor has none, so it is dense."""
    folder, _ = published(tmp_path, "mlx")
    draw = np.random.default_rng(1)

    def widen(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            if name.endswith((".scales", ".biases")):
                noise = 1 + 1e-3 * draw.standard_normal(tensors[name].shape)
                tensors[name] = (tensors[name].astype(np.float32) * noise).astype(dtype)

    rewrite(folder, widen)
    file = SafetensorsFile.open(folder / "model.safetensors")
    module = "model.decoder.layers.0.router.proj"
    scales, biases = (file.tensor(f"{module}.{part}").astype(np.float32) for part in ("scales", "biases"))
    codes = file.tensor(f"{module}.weight").view(np.uint8).astype(np.float32)
    want = codes * np.repeat(scales, 64, -1) + np.repeat(biases, 64, -1)
    checkpoint = Checkpoint.open(folder)
    checkpoint.check()
    stored = checkpoint.tensor(f"{module}.weight")
    assert isinstance(stored, QTensor) == (dtype == "float16")
    assert_close_f32(dense(stored, "float32"), want)
    if dtype == "float32":
        with says("already", "--requantize"):
            dgemma.convert(folder, tmp_path / "out", "4bit-mlx")
        return
    report = dgemma.convert(folder, tmp_path / "out", "4bit-mlx", verify=True)
    assert report.counts.keys() == {"carried", "stored"}
    after = SafetensorsFile.open(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert all(file.tensor(name).tobytes() == after.tensor(name).tobytes() for name in file.entries)
    want = logits(checkpoint.config, checkpoint.tensor, "numpy")
    for backend in ("inference", "mlx"):
        assert_close_f32(logits(checkpoint.config, checkpoint.tensor, backend), want, backend)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_float_sources_of_every_width_sharded_with_tied_copies(tmp_path: Path, dtype: str) -> None:
    folder = floats(tmp_path, dtype=dtype)
    plain = tiny_weights(read_config(folder))
    stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)

    def tie(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
        tensors["model.encoder.language_model.norm.weight"] = tensors["model.decoder.norm.weight"]

    rewrite(folder, tie)
    shard(folder)
    report = dgemma.convert(folder, tmp_path / "out", "8bit", verify=True)
    assert report.dropped == 2
    checkpoint = Checkpoint.open(tmp_path / "out")
    checkpoint.check()
    for name, value in plain.items():
        got = checkpoint.tensor(name)
        if isinstance(got, QTensor):
            assert np.linalg.norm(dense(got, "float32") - value) < 0.006 * np.linalg.norm(value), name
        else:
            np.testing.assert_array_equal(got, value.astype(stored), err_msg=name)


def test_bf16_narrows_the_text_model_and_leaves_the_image_tower(tmp_path: Path) -> None:
    folder = floats(tmp_path, dtype="float32")
    rewrite(folder, lambda tensors: tensors.update({IMAGE: np.full((3, 2), 0.1, np.float32)}))
    report = dgemma.convert(folder, tmp_path / "out", "bf16", verify=True)
    file = SafetensorsFile.open(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert {entry.dtype for name, entry in file.entries.items() if name != IMAGE} == {"BF16"}
    assert file.tensor(IMAGE).tobytes() == np.full((3, 2), 0.1, np.float32).tobytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization" not in config
    assert report.quantized_share == 0 and 0 < report.worst[1] < 0.004


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("modelopt", {"recipe": "4bit"}),
        ("modelopt", {"recipe": "bf16"}),
        ("modelopt", {"recipe": "nvfp4", "mlx": True}),
        ("nvfp4", {"recipe": "nvfp4"}),
        ("fp8", {"recipe": "8bit"}),
        ("fp8", {"recipe": "bf16"}),
        ("mlx", {"recipe": "4bit"}),
    ],
)
def test_no_weight_is_rounded_twice_unasked(tmp_path: Path, layout: str, options: dict[str, Any]) -> None:
    folder, meant = published(tmp_path, layout)
    with says("quantized already", "--requantize"):
        dgemma.convert(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    report = dgemma.convert(folder, tmp_path / "out", requantize=True, **options)
    assert report.counts.get("requantized", 0) + report.counts.get("dequantized", 0) > 0
    checkpoint = Checkpoint.open(tmp_path / "out")
    for name, want in meant.items():
        got = dense(checkpoint.tensor(name), "float32").astype(np.float32)
        assert np.linalg.norm(got - want) <= 0.11 * np.linalg.norm(want), name


def test_symmetric_codes_keep_their_bits_with_and_without_biases(tmp_path: Path) -> None:
    folder = floats(tmp_path)
    dgemma.convert(folder, tmp_path / "a", "4bit")
    dgemma.convert(tmp_path / "a", tmp_path / "b", "4bit", mlx=True)
    report = dgemma.convert(tmp_path / "b", tmp_path / "c", "4bit")
    assert report.counts.keys() == {"carried", "stored"}
    files = [tmp_path / one / "model-00001-of-00001.safetensors" for one in "ac"]
    assert files[0].read_bytes() == files[1].read_bytes()
    dgemma.convert(folder, tmp_path / "d", "4bit", mlx=True)
    assert (tmp_path / "d" / files[0].name).read_bytes() == (tmp_path / "b" / files[0].name).read_bytes()
