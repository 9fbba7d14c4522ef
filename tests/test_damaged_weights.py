"""Damaged quantized checkpoints are refused by name, in one line, before anything that looks whole is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma
from dgemma.checkpoints import safetensors
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.checkpoints.safetensors import SafetensorsFile
from dgemma.core.errors import DgemmaError
from published import floats, published, suited
from said import check_line, says
from tiny import edit_json, rewrite

EXPERT = "model.decoder.layers.1.experts.2.up_proj"
ROUTER = "model.decoder.layers.0.router.proj"


def drop(name: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.update({name: np.ascontiguousarray(change(tensors[name]))})


@pytest.mark.parametrize(
    ("layout", "change", "words"),
    [
        ("modelopt", drop(f"{EXPERT}.weight"), ("weight_scale", "no weight")),
        ("modelopt", drop(f"{EXPERT}.weight_scale"), ("no weight_scale",)),
        ("modelopt", drop(f"{EXPERT}.weight_scale_2"), ("no weight_scale_2",)),
        ("modelopt", put(f"{EXPERT}.weight_scale", lambda x: x[:, :-1]), ("is F8_E4M3 [64, 3]", "[64, 4]")),
        ("modelopt", put(f"{EXPERT}.weight_scale_2", lambda x: np.ones(2, np.float32)), ("should be one F32",)),
        ("modelopt", put(f"{EXPERT}.weight_scale_2", lambda x: np.float32([np.nan])), (EXPERT, "positive and finite")),
        ("modelopt", put(f"{EXPERT}.weight", lambda x: x.view(np.int8)), ("expected U8",)),
        ("modelopt", put(f"{EXPERT}.weight", lambda x: x[:-1]), ("weight_scale is",)),
        ("nvfp4", drop(f"{EXPERT}.weight_packed"), ("no weight",)),
        ("nvfp4", put(f"{EXPERT}.weight_global_scale", lambda x: 0 * x), (EXPERT, "positive and finite")),
        ("fp8", drop(f"{EXPERT}.weight_scale"), ("no weight_scale",)),
        ("fp8", put(f"{EXPERT}.weight_scale", lambda x: x[:7]), ("of float8 only scales per row",)),
        ("mlx", drop(f"{ROUTER}.scales"), ("no scales",)),
        ("mlx", drop(f"{ROUTER}.biases"), ("no biases",)),
        ("mlx", drop(f"{ROUTER}.weight"), ("no weight",)),
        ("mlx", put(f"{ROUTER}.scales", lambda x: x[:-1]), ("scales is BF16 [3, 1], expected", "[4, 1]")),
        ("mlx", put(f"{ROUTER}.biases", lambda x: x.astype(np.float32)), ("biases is F32",)),
        ("mlx", put(f"{ROUTER}.weight", lambda x: x[:, :-1]), ("rows of 60 weights do not divide",)),
        ("mlx", put(f"{ROUTER}.scales", lambda x: np.full_like(x, np.inf)), (ROUTER, "NaN or infinity")),
    ],
)  # fmt: skip
def test_damaged_quantized_weights_are_named(
    tmp_path: Path, layout: str, change: Callable[[dict[str, np.ndarray]], Any], words: tuple[str, ...]
) -> None:
    folder, _ = published(tmp_path, layout)
    rewrite(folder, change)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    with says(*words):
        dgemma.convert(folder, tmp_path / "out", **suited(tmp_path, layout))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 7}, ("config.json", "bits, not 7")),
        ({"bits": 4.5}, ("bits is 4.5", "int")),
        ({"mode": "gguf"}, ("unknown quantization mode",)),
        ({"mode": ["affine"]}, ("mode is", "str")),
        ({"group_size": 48}, ("groups of",)),
        ({"zero_point": True}, ("unknown key 'zero_point'",)),
        ({ROUTER: {"bits": 4, "group_size": 64}}, (ROUTER, "scales is", "groups of 64")),
        ({ROUTER: False}, (ROUTER, "no entry")),
        ({"mode": "nvfp4", "group_size": 16}, ("has biases, which nvfp4",)),
    ],
)  # fmt: skip
def test_wrong_entries_are_named(tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]) -> None:
    folder, _ = published(tmp_path, "mlx")
    data = json.loads((folder / "config.json").read_text())["quantization"] | change
    edit_json(folder / "config.json", quantization=data, quantization_config=None)
    with says(*words):
        Checkpoint.open(folder).check()
    with says(*words):
        dgemma.convert(folder, tmp_path / "out", "4bit-mlx")


FACTOR = "model.decoder.layers.0.experts.down_proj.global_scale"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.float32([1, 2]), ("global_scale is F32 [2]",)),
        (np.float16(1), ("global_scale is F16",)),
        (np.float32(np.nan), ("positive and finite",)),
        (np.float32(-1), ("positive and finite",)),
        (np.full((4, 64, 1), np.inf, np.float32), ("positive and finite",)),
    ],
)
def test_a_wrong_global_scale_is_named(tmp_path: Path, value: Any, words: tuple[str, ...]) -> None:
    out = dgemma.convert(floats(tmp_path), tmp_path / "out", "nvfp4").path
    (out / "model.safetensors.index.json").unlink()
    (out / "model-00001-of-00001.safetensors").rename(out / "model.safetensors")
    rewrite(out, lambda tensors: tensors.update({FACTOR: np.asarray(value)}))
    with says("experts.down_proj", *words):
        checkpoint = Checkpoint.open(out)
        checkpoint.check()
        checkpoint.tensor("model.decoder.layers.0.experts.down_proj")
    with says("experts.down_proj", *words):
        dgemma.convert(out, tmp_path / "again", "nvfp4")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["affine", "nvfp4", "mxfp8", 4, 8, 16, 32, 64]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(["bits", "group_size", "mode", "symmetric", ROUTER, "x"]), inner, max_size=4
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def quantized_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("any"), "mlx")[0]


@given(entry=json_values, key=st.sampled_from(["quantization", "quantization_config"]))
@settings(max_examples=60)
def test_any_entry_at_all_ends_in_one_line(quantized_folder: Path, entry: Any, key: str) -> None:
    edit_json(quantized_folder / "config.json", **({"quantization": None, "quantization_config": None} | {key: entry}))
    try:
        checkpoint = Checkpoint.open(quantized_folder)
        checkpoint.check()
    except DgemmaError as error:
        check_line(error)


def test_a_revision_of_the_hubs_cache_is_named(tmp_path: Path) -> None:
    folder = floats(tmp_path)
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / ("0123456789" * 4)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    report = dgemma.convert(snapshot, tmp_path / "out", "8bit")
    source = json.loads((report.path / "dgemma-manifest.json").read_text())["source"]
    assert (source["name"], source["revision"]) == ("org/model", "0123456789" * 4)


def test_entries_that_nothing_asks_for_and_notes_in_entries_change_nothing(tmp_path: Path) -> None:
    folder, _ = published(tmp_path, "mlx")
    before = Checkpoint.open(folder)
    data = json.loads((folder / "config.json").read_text())["quantization"]
    router = data[ROUTER] | {"mode": None, "bits": 8.0, "quant_method": "mlx", "zero_point": False, "note": "8 bits"}
    data |= {"model.encoder.vision_tower.patch_embedder": {"bits": 99}, "lm_head": {"mode": "gguf"}, ROUTER: router}
    data |= {
        "model.audio_tower": {"a": {"b": 1}},
        "quant_method": "mlx",
        "calibration_data": None,
        "mlx_version": "0.32",
    }
    edit_json(folder / "config.json", quantization=data, quantization_config=data)
    after = Checkpoint.open(folder)
    after.check()
    assert all(after.format(name) == before.format(name) for name in before.names)
    dgemma.convert(folder, tmp_path / "out", "4bit-mlx")
    with says("norm_topk"):
        edit_json(folder / "config.json", quantization=data | {"norm_topk": 3}, quantization_config=None)
        Checkpoint.open(folder)


def test_other_quantizations_are_refused_by_name(tmp_path: Path) -> None:
    folder = floats(tmp_path)
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with says("'gptq'", "not read", "NVFP4", "FP8"):
        dgemma.convert(folder, tmp_path / "out")
    with says("'gptq'", "not read", "NVFP4", "FP8"):  # not "convert it": that would be refused as well
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("model.decoder.norm.weight"), ("1 tensor", "missing", "model.decoder.norm.weight")),
        (lambda t: t.update({"model.decoder.extra": np.ones(2, np.float32)}), ("unknown", "model.decoder.extra")),
        (put("model.decoder.norm.weight", lambda x: x[:-1]), ("misshapen", "[63]", "[64]")),
        (put("model.decoder.norm.weight", lambda x: x.astype(np.int32)), ("I32",)),
    ],
)
def test_every_tensor_is_accounted_for(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], Any], words: tuple[str, ...]
) -> None:
    folder = floats(tmp_path)
    rewrite(folder, change)
    with says(*words):
        dgemma.convert(folder, tmp_path / "out")


def test_a_missing_and_a_surplus_expert_are_named(tmp_path: Path) -> None:
    folder, _ = published(tmp_path, "modelopt")

    def move(tensors: dict[str, np.ndarray]) -> None:
        for part in ("weight", "weight_scale", "weight_scale_2"):
            tensors[f"{EXPERT}.{part}".replace(".2.", ".9.")] = tensors.pop(f"{EXPERT}.{part}")

    rewrite(folder, move)
    with says("up_proj of expert 2 of 4 is missing"):
        dgemma.convert(folder, tmp_path / "out", "nvfp4")


def test_a_tied_copy_of_a_head_is_dropped_in_every_spelling(tmp_path: Path) -> None:
    folder, _ = published(tmp_path, "modelopt")
    assert "lm_head.weight" in SafetensorsFile.open(folder / "model.safetensors").entries
    report = dgemma.convert(folder, tmp_path / "out", "nvfp4")
    manifest = json.loads((report.path / "dgemma-manifest.json").read_text())
    assert "lm_head.weight" in manifest["dropped"] and report.dropped == 1 + 3 * 4 * 3
    assert not any("lm_head" in name for name in Checkpoint.open(report.path).files[0].entries)
    assert safetensors.SafetensorsFile.open(folder / "model.safetensors").metadata == {"format": "pt"}
