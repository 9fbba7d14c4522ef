"""Checkpoint folders as published are read without a copy; whatever is wrong with one is named in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import hf
from dgemma.backends.torch.primitives import TorchOps
from dgemma.checkpoints import safetensors, weights
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.core.model import denoise, encode, new_cache
from law import assert_close_f32
from said import says
from tiny import INDEX, edit_json, rewrite, shard, tiny_checkpoint, tiny_weights
from under_test import build, make_ops

ROUTER = "model.decoder.layers.0.router.proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path)


# ---- What transformers writes ---------------------------------------------------------------------------------


@torch.no_grad()
def logits(config: Any, get: Callable[[str], np.ndarray]) -> np.ndarray:
    ops = make_ops("torch", "float32")
    model = build(ops, config, get)
    generator = np.random.default_rng(0)
    prompt, canvas = generator.integers(0, config.vocab_size, (2, 1, 13), np.int32)
    cache = encode(ops, model, new_cache(ops, config, slots=1, capacity=32, scratch=32), ops.asarray(prompt))
    soft = ops.asarray(generator.standard_normal((1, 13, config.hidden_size)), "float32")
    return ops.to_numpy(
        ops.logits(denoise(ops, model, cache, ops.asarray(canvas), soft), model.embed_tokens, config.softcap)
    )


@pytest.mark.parametrize("shape", hf.SHAPES)
@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
def test_a_folder_saved_by_transformers_is_the_model_in_memory(tmp_path: Path, shape: str, shard_size: str) -> None:
    model = hf.make(shape)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check()
    assert len(checkpoint.files) > 2 or shard_size == "1GB"
    assert checkpoint.config == hf.config(model) and checkpoint.stored_dtype == "float32"
    in_memory = hf.tensors(model)
    assert set(checkpoint.names) == set(weights.shapes(checkpoint.config))
    assert checkpoint.nbytes == sum(in_memory[name].nbytes for name in checkpoint.names)
    got, want = (logits(checkpoint.config, get) for get in (checkpoint.tensor, in_memory.__getitem__))
    assert_close_f32(got, want)


def test_tied_copies_may_be_present_and_are_not_loaded(tmp_path: Path) -> None:
    model = hf.make("top1")
    model.save_pretrained(tmp_path)
    everything = hf.tensors(model)  # state_dict names the copies too
    assert "lm_head.weight" in everything
    safetensors.write(tmp_path / "model.safetensors", everything)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check()
    assert set(checkpoint.names) == set(weights.shapes(checkpoint.config))
    with says("lm_head.weight", "missing"):
        checkpoint.tensor("lm_head.weight")


def test_the_older_spelling_of_the_config_is_the_same_checkpoint(tmp_path: Path) -> None:
    model = hf.make("top4")
    model.save_pretrained(tmp_path)
    new = Checkpoint.open(tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    assert data["text_config"].pop("per_layer_config") == {"2": {"head_dim": 32, "num_key_value_heads": 1}}
    data["text_config"] |= {"global_head_dim": 32, "num_global_key_value_heads": 1}
    path.write_text(json.dumps(data))
    old = Checkpoint.open(tmp_path)
    old.check()
    assert old.config == new.config


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_width_checkpoints(tmp_path: Path, dtype: str) -> None:
    model = hf.make("top4").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check()
    assert checkpoint.stored_dtype == dtype
    ops = TorchOps(dtype)  # type: ignore[arg-type]
    state = model.state_dict()
    for name in checkpoint.names:
        stored = checkpoint.tensor(name)
        assert stored.dtype.name == dtype and torch.equal(ops.asarray(stored), state[name])


def test_the_dominating_width_is_the_stored_one(folder: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.decoder.embed_tokens.weight"] = tensors["model.decoder.embed_tokens.weight"].astype(np.float16)
        for name in tensors:
            if "experts" in name or "mlp" in name:
                tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    checkpoint = Checkpoint.open(rewrite(folder, change))
    checkpoint.check()
    assert checkpoint.stored_dtype == "bfloat16"


# ---- The folder -----------------------------------------------------------------------------------------------


def test_a_tiny_checkpoint_opens_single_and_sharded(folder: Path) -> None:
    want = tiny_weights(Checkpoint.open(folder).config)
    for path in (folder, shard(folder)):
        checkpoint = Checkpoint.open(str(path))
        checkpoint.check()
        assert all(np.array_equal(checkpoint.tensor(name), value) for name, value in want.items())
        assert checkpoint.generation.sampler.steps == 6 and checkpoint.path == path


def test_generation_config_may_be_absent(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assert Checkpoint.open(folder).generation.budget(0) == 256


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with says("nowhere", "no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with says("file", "not a folder"):
        Checkpoint.open(tmp_path / "file")
    with says("config.json", "no such file"):
        Checkpoint.open(tmp_path)


def test_another_model_is_named(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 4}))
    with says("config.json", "model_type", "llama"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("method", ["modelopt", "compressed-tensors", "bitsandbytes", 4])
def test_what_other_tools_quantized_is_refused_by_name(folder: Path, method: Any) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with says("config.json", "quantized"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_files_are_never_opened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with says(name, "pickle", "safetensors"):
        Checkpoint.open(folder)


def test_no_weights_and_no_index(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with says("1 .safetensors file", INDEX):
        Checkpoint.open(folder)
    (folder / "model-00001-of-00001.safetensors").unlink()
    with says("model.safetensors", INDEX):
        Checkpoint.open(folder)


def test_an_index_beside_a_single_file_is_ambiguous(folder: Path) -> None:
    sharded = shard(folder)
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded / "model.safetensors")
    with says("both", "model.safetensors", INDEX):
        Checkpoint.open(sharded)


# ---- Tensors --------------------------------------------------------------------------------------------------


def test_missing_tensors_are_named_and_counted(folder: Path) -> None:
    checkpoint = Checkpoint.open(rewrite(folder, lambda t: t.pop(ROUTER)))
    with says("tiny", "1 tensor missing", ROUTER):
        checkpoint.check()
    drop = [name for name in checkpoint.names if "layers.1" in name]
    checkpoint = Checkpoint.open(rewrite(folder, lambda t: [t.pop(name) for name in drop]))
    with says(f"{len(drop) + 1} tensors missing", "..."):
        checkpoint.check()


def test_unknown_tensors_are_named(folder: Path) -> None:
    extra = "model.decoder.layers.7.router.scale"
    odd = "x\n\u2028" + "y" * 500
    checkpoint = Checkpoint.open(rewrite(folder, lambda t: t.update({extra: t[ROUTER], odd: t[ROUTER]})))
    with says("2 tensors unknown", extra, "model.safetensors"):
        checkpoint.check()


def test_a_v_proj_on_a_full_layer_is_unknown(folder: Path) -> None:
    extra = "model.decoder.layers.2.self_attn.v_proj.weight"
    with says("1 tensor unknown", extra):
        Checkpoint.open(rewrite(folder, lambda t: t.update({extra: t[ROUTER]}))).check()


def test_misshapen_tensors_are_named_with_both_shapes(folder: Path) -> None:
    with says("1 tensor misshapen", ROUTER, "[32, 4]", "[4, 32]"):
        Checkpoint.open(rewrite(folder, lambda t: t.update({ROUTER: t[ROUTER].T.copy()}))).check()


def test_wrong_widths_are_named(folder: Path) -> None:
    with says("1 tensor not float32", ROUTER, "I32"):
        Checkpoint.open(rewrite(folder, lambda t: t.update({ROUTER: t[ROUTER].astype(np.int32)}))).check()


def test_several_faults_stay_one_line(folder: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for i, name in enumerate(list(tensors)):
            if i % 3 == 0:
                tensors[f"model.decoder.{name}"] = tensors.pop(name)
            elif i % 3 == 1:
                tensors[name] = np.zeros((1,) * 30, np.float32)

    with says("missing", "also", "unknown", "misshapen"):
        Checkpoint.open(rewrite(folder, change)).check()


def test_image_tensors_are_ignored(folder: Path) -> None:
    name = "model.encoder.vision_tower.patch_embedder.input_proj.weight"
    checkpoint = Checkpoint.open(rewrite(folder, lambda t: t.update({name: np.zeros((3, 3), np.int8)})))
    checkpoint.check()
    assert name not in checkpoint.names


# ---- Memory ---------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
import torch
from dgemma.checkpoints import weights
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.backends.torch.inference import InferenceOps

torch.set_num_threads(1)

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Anonymous:")).split()[1])

before = anonymous()
checkpoint = Checkpoint.open(sys.argv[1])
checkpoint.check()
peak, total = 0, 0.0

def get(name):
    global peak
    peak = max(peak, anonymous() - before)
    return ops.pack(checkpoint.tensor(name))

ops = InferenceOps("bfloat16")
model = weights.build(checkpoint.config, get)
for layer in model.layers:  # touch every page, as a forward pass would
    for weight in (layer.experts.gate_up_proj, layer.experts.down_proj):
        total += float(weight.flatten()[::2048].sum())
print(checkpoint.nbytes, max(peak, anonymous() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells mapped from copied memory")
def test_loading_does_not_hold_a_second_copy(tmp_path: Path) -> None:
    sizes = dict(hidden_size=512, moe_intermediate_size=512, num_experts=40)
    folder = tiny_checkpoint(tmp_path)  # for its other files
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config=text | sizes)
    wanted = weights.shapes(Checkpoint.open(folder).config)
    ones = {name: np.full(shape, 0x3F80, np.uint16).view(ml_dtypes.bfloat16) for name, shape in wanted.items()}
    safetensors.write(folder / "model.safetensors", ones)
    result = subprocess.run([sys.executable, "-c", MEASURE, folder], capture_output=True, text=True, check=True)
    stored, grown = map(int, result.stdout.split())
    assert stored > 180e6 and grown < 0.1 * stored, f"{grown:,} bytes held beside the {stored:,} mapped"
