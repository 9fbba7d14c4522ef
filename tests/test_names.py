"""Who may be in a checkpoint besides the weights, and under which names; and that tied copies are copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import dgemma
from dgemma.backends.numpy.ops import NumpyOps
from dgemma.checkpoints import names, weights
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.checkpoints.ties import Held, same
from dgemma.cli.fit import describe
from dgemma.convert import convert
from dgemma.core.config import ModelConfig
from dgemma.core.model import denoise, encode, new_cache
from dgemma.tools.inspect import inspect_folder
from law import assert_close_f32
from published import published
from said import says
from tiny import INDEX, edit_json, rewrite, shard, tiny_checkpoint
from under_test import build

Weights = dict[str, np.ndarray]
PROMPT, CANVAS = list(range(20, 33)), list(range(40, 56))
EMBEDDING, HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"
GATE = "model.decoder.layers.0.mlp.gate_proj.weight"
EXPERTS = "model.decoder.layers.1.experts.down_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path)


def encoder(name: str) -> str:
    return name.replace("model.decoder", "model.encoder.language_model")


def stored(folder: Path) -> Weights:
    checkpoint = Checkpoint.open(folder)
    checkpoint.check()
    return {name: np.array(checkpoint.tensor(name)) for name in checkpoint.names}


def check_answers(folder: Path, want: Weights, *backends: str) -> None:
    """Expect a folder that means these weights, to the bit, and answers as they do on every backend named."""
    got = stored(folder)
    assert got.keys() == want.keys() and all(np.array_equal(got[name], value) for name, value in want.items())
    for backend in backends or ("torch",):
        model = dgemma.load(folder, backend=backend, dtype="float32")
        assert_close_f32(model.logits(PROMPT, CANVAS), logits(model.config, want))


def logits(config: ModelConfig, want: Weights) -> np.ndarray:
    ops = NumpyOps("float64")
    model = build(ops, config, want.__getitem__)
    cache = encode(
        ops, model, new_cache(ops, config, slots=1, capacity=32, scratch=32), ops.asarray(np.array([PROMPT], np.int32))
    )
    soft = ops.asarray(np.zeros((1, len(CANVAS), config.hidden_size)), "float64")
    states = denoise(ops, model, cache, ops.asarray(np.array([CANVAS], np.int32)), soft)
    return np.asarray(ops.logits(states, model.embed_tokens, config.softcap), np.float32)[0]


def mlx_spelling(tensors: Weights) -> None:
    for name in list(tensors):
        if ".experts." in name:
            tensors[f"{name}.weight"] = tensors.pop(name)


# ---- Names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_unquantized_folders_in_mlx_s_spelling_work_on_every_command(
    folder: Path, tmp_path: Path, sharded: bool
) -> None:
    pytest.importorskip("onnxruntime")
    plain = tiny_checkpoint(tmp_path, name="plain")
    rewrite(folder, mlx_spelling)
    if sharded:
        shard(folder)
    want = stored(plain)
    check_answers(folder, want, "torch", "onnx", "numpy", "mlx")
    assert inspect_folder(folder).layout == "float" and describe(str(folder)).stored == "float32"
    for source in (folder, plain):
        convert(source, tmp_path / f"{source.name}-out", "bf16", workers=1)
    check_answers(tmp_path / "tiny-out", stored(tmp_path / "plain-out"))
    dgemma.export(folder, tmp_path / "onnx", standalone=True)
    check_answers(tmp_path / "onnx", want, "onnx")
    assert dgemma.compare(folder, plain, [[20, 21]], max_new_tokens=4)


def test_text_weights_under_the_encoder_s_names_alone(folder: Path, tmp_path: Path) -> None:
    def rename(tensors: Weights) -> None:
        for name in list(tensors):
            if name.startswith("model.decoder.") and ".self_conditioning." not in name and "layer_scalar" not in name:
                tensors[encoder(name)] = tensors.pop(name)

    want = stored(folder)
    check_answers(rewrite(folder, rename), want)
    convert(folder, tmp_path / "out", "bf16", workers=1)
    assert EMBEDDING in Checkpoint.open(tmp_path / "out").names
    # Only the head is left of the embedding.
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors.pop(encoder(EMBEDDING))}))
    check_answers(folder, want)


def test_constants_and_scalars_without_a_dimension(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")

    def change(tensors: Weights) -> None:
        for name in list(tensors):
            if name.endswith("layer_scalar"):
                tensors[name] = tensors[name].reshape(())
        tensors |= {
            "model.decoder.rotary_emb.inv_freq": np.ones(4, np.float32),
            "model.decoder.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
            "model.encoder.language_model.rotary_emb.full_attention_original_inv_freq": np.ones(4, np.float32),
            "model.decoder.embed_tokens.embed_scale": np.float32(3).reshape(()),
            "model.encoder.language_model.embed_tokens.embed_scale": np.ones(1, np.float32),
        }

    want = stored(folder)
    check_answers(rewrite(folder, change), want, "torch", "onnx", "numpy", "mlx")
    convert(folder, tmp_path / "out", "bf16", workers=1)
    assert Checkpoint.open(tmp_path / "out").tensor("model.decoder.layers.0.layer_scalar").shape == (1,)


def test_an_index_may_list_what_is_not_needed(folder: Path) -> None:
    shard(folder)
    table = json.loads((folder / INDEX).read_text())["weight_map"]
    first = next(iter(table.values()))
    absent = {HEAD: first, encoder(GATE): first, "model.encoder.vision_tower.std_bias": "model-00009.safetensors"}
    edit_json(folder / INDEX, weight_map=table | absent)
    Checkpoint.open(folder).check()
    edit_json(folder / INDEX, weight_map=table | absent | {encoder(GATE).replace("gate", "odd"): first})
    Checkpoint.open(folder).check()  # which is of no weight, so of no copy either, and is not there
    scalar = "model.encoder.language_model.layers.0.layer_scalar"
    edit_json(folder / INDEX, weight_map=table | {f"{scalar}s": first})
    Checkpoint.open(folder).check()
    edit_json(folder / INDEX, weight_map=table | {"model.decoder.layers.9.layer_scalar": first})
    with says(INDEX, "not in the files", "layers.9"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "name",
    ["model.decoder.layers.0.self_attn.k_proj.bias", "model.encoder.language_model.layers.9.mlp.gate_proj.weight",
     "model.encoder.language_model.self_conditioning.norm.weight", "lm_head.bias", f"{EXPERTS}.weight", "inv_freqs",
     "model.decoder.layers.0.router.scale.weight", "model.language_model.norm.weight", ".weight"],
)  # fmt: skip
def test_what_is_neither_weight_nor_copy_is_unknown(folder: Path, tmp_path: Path, name: str) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
    with says("unknown", name):
        Checkpoint.open(folder).check()
    with says("unknown", name):
        convert(folder, tmp_path / "out", workers=1)


def test_one_name_is_one_thing() -> None:
    needed = weights.shapes(Checkpoint.open(Path(dgemma.__file__).parent / "models" / "nano").config)
    roles = names.assign([*needed, HEAD, encoder(GATE), f"{encoder(EXPERTS)}.weight"], needed)
    assert roles.weights == {name: name for name in needed} and not roles.unknown
    assert roles.copies == {EMBEDDING: (HEAD,), GATE: (encoder(GATE),), EXPERTS: (f"{encoder(EXPERTS)}.weight",)}


# ---- Copies ---------------------------------------------------------------------------------------------------


def add(copy: str, change: Any = None) -> Any:
    """A change of tensors: a copy, with other numbers if there is a change."""

    def make(tensors: Weights) -> None:
        twin = EMBEDDING if copy == HEAD else copy.replace("model.encoder.language_model", "model.decoder")
        tensors[copy] = tensors[twin].copy()
        tensors[copy] = tensors[copy] if change is None else change(tensors[copy])

    return make


def last_value(tensor: np.ndarray) -> np.ndarray:
    tensor.reshape(-1)[-1] += 1
    return tensor


COPIES = [HEAD, encoder(EMBEDDING), encoder(GATE), encoder(EXPERTS), encoder("model.decoder.norm.weight"),
          encoder("model.decoder.layers.2.router.per_expert_scale")]  # fmt: skip


@pytest.mark.parametrize("copy", COPIES)
def test_copies_that_agree_change_nothing_and_others_are_refused(folder: Path, tmp_path: Path, copy: str) -> None:
    want = stored(folder)
    check_answers(rewrite(folder, add(copy)), want)
    convert(folder, tmp_path / "out", "bf16", workers=1)
    rewrite(folder, add(copy, last_value))
    with says(copy, "differs", "ties"):
        dgemma.load(folder)
    with says(copy, "differs", "ties"):
        convert(folder, tmp_path / "out2", "bf16", workers=1)
    with says(copy, "differs", "ties"):
        dgemma.export(folder, tmp_path / "onnx")


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x.T.copy(), lambda x: x.astype(np.int8)])
def test_a_copy_of_another_shape_or_kind_is_no_copy(folder: Path, change: Any) -> None:
    rewrite(folder, add(HEAD, change))
    for look in (lambda: Checkpoint.open(folder).check(), lambda: inspect_folder(folder)):
        with says(HEAD, "differs"):
            look()


def test_the_last_of_many_rows_is_found_when_weights_are_loaded(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, vocab_size=3000)  # so many that a sample of rows leaves most out
    want = stored(folder)
    rewrite(folder, add(HEAD, last_value))
    Checkpoint.open(folder).check()
    for backend in ("torch", "onnx", "mlx", "numpy"):
        with says(HEAD, "differs"):
            dgemma.load(folder, backend=backend)
    done = []
    rewrite(folder, add(HEAD))
    check_answers(folder, want)
    dgemma.load(folder, progress=lambda *both: done.append(both))
    assert done[-1][0] == done[-1][1] and done[-1][1] > Checkpoint.open(folder).nbytes


@pytest.mark.parametrize("width", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_copies_in_another_width_are_compared_by_value(tmp_path: Path, width: Any) -> None:
    folder = tiny_checkpoint(tmp_path, dtype="bfloat16")
    rewrite(folder, add(HEAD, lambda x: np.clip(x.astype(np.float32), -1, 1).astype(width)))

    def narrow(tensors: Weights) -> None:
        tensors[EMBEDDING] = tensors[HEAD].astype(np.float32).astype(ml_dtypes.bfloat16)

    rewrite(folder, narrow)
    if width is np.float16:  # bf16 has no value that float16 has not, but for those too small for it
        rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].astype(np.float32).astype(width)}))
    dgemma.load(folder)
    rewrite(folder, lambda tensors: tensors.update({HEAD: last_value(tensors[HEAD].astype(np.float32))}))
    with says(HEAD, "differs"):
        dgemma.load(folder)


def test_zeros_of_both_signs_are_the_same_and_equal_nans_too() -> None:
    zeros, nans = np.zeros((3, 4), np.float32), np.full((3, 4), np.nan, np.float32)
    assert same(Held(zeros), Held(-zeros)) and same(Held(nans), Held(nans.copy())) and not same(Held(zeros), Held(nans))


@pytest.mark.parametrize("layout", ["mlx", "fp8"])
def test_quantized_copies_are_compared(tmp_path: Path, layout: str) -> None:
    folder, _ = published(tmp_path, layout)
    part = "weight" if layout == "mlx" else "weight_scale"
    module = GATE.removesuffix(".weight")

    def copy(tensors: Weights) -> None:
        for name in list(tensors):
            if name.startswith(f"{module}."):
                tensors[encoder(name)] = tensors[name].copy()

    def change(tensors: Weights) -> None:
        tensors[encoder(f"{module}.{part}")].reshape(-1)[-1] += 1

    if layout == "mlx":
        quantization = json.loads((folder / "config.json").read_text())["quantization"]
        quantization[encoder(module)] = quantization[module]
        edit_json(folder / "config.json", quantization=quantization)
        (folder / INDEX).unlink()
    rewrite(folder, copy)
    convert(folder, tmp_path / "out", "bf16", requantize=True, workers=1)
    rewrite(folder, change)
    with says(encoder(GATE), "differs"):
        convert(folder, tmp_path / "out2", "bf16", requantize=True, workers=1)
    if layout == "mlx":
        with says(encoder(GATE), "differs"):
            dgemma.load(folder)


def test_float16_scales_in_onnx_runtime(tmp_path: Path) -> None:
    """mlx-vlm's `convert --quantize --dtype float16`; an optimization of the runtime's fails on such a graph."""
    pytest.importorskip("onnxruntime")
    folder, _ = published(tmp_path, "mlx")

    def narrow(tensors: Weights) -> None:
        for name, value in tensors.items():
            if value.dtype == ml_dtypes.bfloat16:
                tensors[name] = value.astype(np.float32).astype(np.float16)

    rewrite(folder, narrow)
    got, want = (dgemma.load(folder, backend=one, dtype="float32").logits(PROMPT, CANVAS) for one in ("onnx", "numpy"))
    assert_close_f32(got, want)
