"""compressed-tensors' integers and fp8 by blocks: what they mean, what is carried, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import dgemma
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.checkpoints.loading import dense
from dgemma.checkpoints.quant import Format, QTensor
from dgemma.convert.converter import Report
from dgemma.core.config import ModelConfig
from dgemma.tools.inspect import inspect_folder
from integer_layouts import declare, fp8_blocks, integers
from law import assert_close_f32
from published import SHARD
from said import says
from test_layouts import logits
from tiny import rewrite

CARRIED: dict[str, dict[str, Any]] = {
    "W4A16 in groups of 32": {},
    "in groups of 64, float16 scales": {"group": 64, "width": np.float16},
    "a scale for each row": {"group": 0},
    "a flat scale for each row, W8A8": {"bits": 8, "group": 0, "flat": True},
    "W8A16": {"bits": 8, "group": 64},
    "2 bits": {"bits": 2},
    "experts stacked": {"stacked": True},
    "experts of 96, with 3 groups": {"moe_intermediate_size": 96, "intermediate_size": 96},
}
ROUNDED: dict[str, dict[str, Any]] = {
    "zero points": {"zeros": True},
    "zero points of 8 bits for rows": {"bits": 8, "group": 0, "zeros": True},
    "zero points of stacked experts": {"zeros": True, "stacked": True},
    "zero points, rows that do not fill a word": {
        "zeros": True,
        "group": 4,
        "num_key_value_heads": 1,
        "head_dim": 18,
    },
    "float32 scales": {"width": np.float32},
    "groups of 16, which MLX has not": {"group": 16},
}
BLOCKS: dict[str, dict[str, Any]] = {
    "blocks of 128, one for most": {},
    "blocks that end short": {"block": (48, 40), "moe_intermediate_size": 36},
    "experts stacked, static activations": {"block": (32, 32), "stacked": True, "static": True},
    "bf16 scales": {"block": (16, 64), "width": ml_dtypes.bfloat16},
}


def cases(table: dict[str, dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("options", table.values(), ids=table)


def check_share(report: Report, meant: dict[str, np.ndarray], of: Callable[[str], bool]) -> None:
    """The quantized share is that of the matrices which the source has quantized."""
    total = sum(value.size for value in meant.values())
    share = sum(value.size for name, value in meant.items() if of(name)) / total
    assert report.quantized_share == pytest.approx(share) == pytest.approx(report.wanted_share)


def quantizable(name: str) -> bool:
    return name.endswith(("_proj", "_proj.weight"))


@cases(CARRIED)
def test_symmetric_integers_are_kept_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    folder, meant = integers(tmp_path, **options)
    report = dgemma.convert(folder, tmp_path / "out", verify=True)
    assert report.recipe == "keep" and report.counts.keys() == {"carried", "stored"} and not report.fallbacks
    check_share(report, meant, quantizable)
    checkpoint = Checkpoint.open(tmp_path / "out")
    for name, want in meant.items():
        stored = checkpoint.tensor(name)
        assert isinstance(stored, QTensor) == quantizable(name), name
        np.testing.assert_array_equal(dense(stored, "float32").astype(np.float32), want, err_msg=name)
    if options in ({}, CARRIED["in groups of 64, float16 scales"], {"stacked": True}):
        want = logits(checkpoint.config, lambda name: meant[name], "numpy")
        for backend in ("numpy", "inference", "mlx"):
            assert_close_f32(logits(checkpoint.config, checkpoint.tensor, backend), want, backend)


def test_a_recipe_that_has_the_same_codes_carries_them(tmp_path: Path) -> None:
    folder, meant = integers(tmp_path)
    (tmp_path / "rules.toml").write_text('"*.experts.*" = "symmetric4-g32"\n"*_proj" = "symmetric4-g32"\n')
    report = dgemma.convert(folder, tmp_path / "out", rules=tmp_path / "rules.toml")
    assert report.counts.keys() == {"carried", "stored"}
    name = "model.decoder.layers.0.experts.gate_up_proj"
    stored = Checkpoint.open(tmp_path / "out").tensor(name)
    assert isinstance(stored, QTensor) and stored.format == Format(bits=4, group_size=32, symmetric=True)
    np.testing.assert_array_equal(dense(stored, "float32"), meant[name])
    with says("quantized already", "--recipe keep", "--requantize"):
        dgemma.convert(folder, tmp_path / "other", "8bit")


@cases(ROUNDED)
def test_what_no_format_holds_is_rounded_again_when_asked(tmp_path: Path, options: dict[str, Any]) -> None:
    folder, meant = integers(tmp_path, **options)
    compare_rounded(folder, meant, tmp_path)


@cases(BLOCKS)
def test_fp8_in_blocks_means_its_codes_times_its_scales(tmp_path: Path, options: dict[str, Any]) -> None:
    folder, meant = fp8_blocks(tmp_path, **options)
    found = inspect_folder(folder)
    assert found.layout == "fp8" and next(one for one in found.parts if one.name == "experts").formats == ("fp8",)
    compare_rounded(folder, meant, tmp_path)


def compare_rounded(folder: Path, meant: dict[str, np.ndarray], tmp_path: Path) -> None:
    with says("quantized already", "--requantize"):
        dgemma.convert(folder, tmp_path / "out")
    report = dgemma.convert(folder, tmp_path / "out", "bf16", requantize=True, verify=True)
    assert report.counts["dequantized"] == sum(map(quantizable, meant))
    checkpoint = Checkpoint.open(tmp_path / "out")
    for name, want in meant.items():
        want = want.astype(ml_dtypes.bfloat16) if quantizable(name) else want
        np.testing.assert_array_equal(np.asarray(checkpoint.tensor(name)), want, err_msg=name)
    narrow = {name: value.astype(ml_dtypes.bfloat16).astype(np.float32) for name, value in meant.items()}
    want = logits(checkpoint.config, lambda name: narrow[name], "numpy")
    for backend in ("numpy", "inference"):
        assert_close_f32(logits(checkpoint.config, checkpoint.tensor, backend), want, backend)
    report = dgemma.convert(folder, tmp_path / "again", requantize=True)
    assert report.counts["requantized"] + len(report.fallbacks) == sum(map(quantizable, meant))
    if not report.fallbacks:
        check_share(report, meant, quantizable)


MODULE = "model.decoder.layers.1.mlp.up_proj"
EXPERT = "model.decoder.layers.1.experts.2.up_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({f"{MODULE}.weight_g_idx": np.zeros(64, np.int32)}), ("weight_g_idx", "mlp.up_proj")),
        (lambda t: t.update({f"{EXPERT}.weight_g_idx": np.zeros(64, np.int32)}), ("weight_g_idx", "experts.2")),
        (lambda t: t.pop(f"{MODULE}.weight_scale"), ("no weight_scale", "mlp.up_proj")),
        (lambda t: t.pop(f"{MODULE}.weight_packed"), ("no weight", "mlp.up_proj")),
        (lambda t: t.pop(f"{EXPERT}.weight_packed"), ("no weight", "experts.2.up_proj")),
        (lambda t: t.update({f"{MODULE}.weight_scale": np.ones((128, 3), np.float16)}), ("weight_scale", "divides 64")),
        (lambda t: t.update({f"{MODULE}.weight_scale": np.ones((128, 0), np.float16)}), ("weight_scale", "divides 64")),
        (lambda t: t.update({f"{MODULE}.weight_scale": np.ones((127, 2), np.float16)}), ("weight_scale", "[128]")),
        (lambda t: t.update({f"{MODULE}.weight_scale": np.ones((128, 2), np.int8)}), ("weight_scale is I8",)),
        (lambda t: t.update({f"{MODULE}.weight_packed": np.ones((128, 6), np.int32)}), ("2, 4 or 8 bits", "64")),
        (lambda t: t.update({f"{MODULE}.weight_packed": np.ones((96, 8), np.int32)}), ("weight_scale",)),
        (lambda t: t.update({f"{MODULE}.weight_packed": np.ones((128, 8), np.int64)}), ("codes are I64",)),
        (
            lambda t: t.update({f"{MODULE}.weight_zero_point": np.ones((128, 2), np.int32)}),
            ("weight_zero_point", "[16, 2]"),
        ),
        (lambda t: t.update({f"{MODULE}.weight_mystery": np.ones(3, np.float32)}), ("unknown", "weight_mystery")),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_the_work(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], Any], words: tuple[str, ...]
) -> None:
    folder, _ = integers(tmp_path)
    rewrite(folder, change)
    with says(*words):
        dgemma.convert(folder, tmp_path / "out", requantize=True)
    assert not (tmp_path / "out.partial").exists()


def group(**weights: Any) -> dict[str, Any]:
    return {"targets": ["Linear"], "weights": {"type": "int", "num_bits": 4, "strategy": "group"} | weights}


def test_zero_points_that_are_declared_have_to_be_there(tmp_path: Path) -> None:
    """Without them the codes would be taken for symmetric ones: a number for every weight, and the wrong one."""
    folder, _ = integers(tmp_path)
    method = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    declare(folder, method | {"config_groups": {"group_0": group(symmetric=False)}})
    with says("has no weight_zero_point", "asymmetric"):
        dgemma.convert(folder, tmp_path / "out")
    for sound in (
        {"group_0": group(symmetric=True)}, {"group_0": group()}, {"group_0": group(symmetric=False, num_bits=8)},
        {"group_0": group(symmetric=False), "group_1": group(symmetric=True)}, {"group_0": {"weights": None}}, None,
    ):  # fmt: skip
        declare(folder, method | {"config_groups": sound})
        assert inspect_folder(folder).layout == "compressed-tensors"


def test_weights_that_are_rotated_are_refused(tmp_path: Path) -> None:
    folder, _ = integers(tmp_path)
    method = {"quant_method": "compressed-tensors"}
    turned = {"config_groups": {"v": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}
    for wrong in (turned, "hadamard", [1], {"config_groups": [1]}):
        declare(folder, method | {"transform_config": wrong})
        with says("transform_config", "rotated", "bf16 original"):
            dgemma.convert(folder, tmp_path / "out")
    for neutral in (None, {}, {"config_groups": {}}):
        declare(folder, method | {"transform_config": neutral})
        assert inspect_folder(folder).layout == "compressed-tensors"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("zeros", [False, True])
def test_scales_that_are_no_numbers_are_found(tmp_path: Path, bad: float, zeros: bool) -> None:
    folder, _ = integers(tmp_path, zeros=zeros)

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{EXPERT}.weight_scale"][3, 1] = bad

    rewrite(folder, spoil)
    with says("layers.1.experts", "NaN or infinity"):
        dgemma.convert(folder, tmp_path / "out", requantize=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{MODULE}.weight_scale_inv"), ("no weight_scale",)),
        (lambda t: t.update({f"{MODULE}.weight_scale_inv": np.ones((3, 1), np.float32)}), ("blocks of 64 x 32",)),
        (lambda t: t.update({f"{MODULE}.weight_scale_inv": np.ones((2, 2), np.int32)}), ("I32", "blocks of 64 x 32")),
        (lambda t: t.update({f"{MODULE}.weight_scale_inv": np.ones((2, 0), np.float32)}), ("blocks of 64 x 32",)),
        (lambda t: t.update({f"{MODULE}.weight_scale": np.ones((2, 2), np.float32)}), ("weight_scale,",)),
        (
            lambda t: t.update({f"{MODULE}.weight": t[f"{MODULE}.weight"].astype(ml_dtypes.float8_e5m2)}),
            ("F8_E5M2", "mlp.up_proj"),
        ),
    ],
)
def test_fp8_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], Any], words: tuple[str, ...]
) -> None:
    folder, _ = fp8_blocks(tmp_path, block=(64, 32))
    rewrite(folder, change)
    with says(*words):
        dgemma.convert(folder, tmp_path / "out", requantize=True)


def test_blocks_are_declared_by_two_sizes(tmp_path: Path) -> None:
    folder, _ = fp8_blocks(tmp_path)
    for wrong in ([128], [0, 128], "128", [128, 1.5], {"rows": 1}):
        declare(folder, {"quant_method": "fp8", "weight_block_size": wrong})
        with says("block of float8 scales", "two sizes"):
            dgemma.convert(folder, tmp_path / "out", requantize=True)


def test_gate_and_up_have_a_scale_each_where_they_share_a_block(tmp_path: Path) -> None:
    """transformers gives a stack of gate and up two rows of scales, however few rows they have."""
    folder, meant = fp8_blocks(tmp_path, block=(64, 64), stacked=True)
    name = "model.decoder.layers.0.experts.gate_up_proj"
    declare(folder, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    other = {f"{one}_scale_inv": np.ones((4, 1, 1), np.float32) for one in meant if one.endswith("experts.down_proj")}
    plain = {one: one.removesuffix(".weight") for one in meant if quantizable(one) and ".experts." not in one}
    other |= {f"{one}.weight_scale_inv": np.ones((), np.float32) for one in plain.values()}
    rewrite(folder, lambda tensors: tensors.update(other))
    dgemma.convert(folder, tmp_path / "out", "bf16", requantize=True)
    got = np.asarray(Checkpoint.open(tmp_path / "out").tensor(name))
    np.testing.assert_array_equal(got, meant[name].astype(ml_dtypes.bfloat16))


def test_an_interrupted_conversion_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = integers(tmp_path)
    dgemma.convert(folder, tmp_path / "whole")
    from dgemma.convert import crew

    original, count = crew.Here.encode, [0]

    def fail(self: Any, *args: Any) -> Any:
        count[0] += 1
        if count[0] == 20:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(crew.Here, "encode", fail)
        with pytest.raises(KeyboardInterrupt):
            dgemma.convert(folder, tmp_path / "out", workers=1)
    dgemma.convert(folder, tmp_path / "out", workers=1)
    assert (tmp_path / "out" / SHARD).read_bytes() == (tmp_path / "whole" / SHARD).read_bytes()


def test_unquantized_mlx_folders_are_read(tmp_path: Path) -> None:
    """mlx-lm's own spelling of stacked experts, without any quantization."""
    from published import floats

    folder = floats(tmp_path)
    before = {name: Checkpoint.open(folder).tensor(name) for name in Checkpoint.open(folder).names}

    def respell(tensors: dict[str, np.ndarray]) -> None:
        for name in [one for one in tensors if one.endswith((".experts.gate_up_proj", ".experts.down_proj"))]:
            tensors[f"{name}.weight"] = tensors.pop(name)

    rewrite(folder, respell)
    assert isinstance(inspect_folder(folder).config, ModelConfig)
    dgemma.convert(folder, tmp_path / "out", "bf16")
    after = Checkpoint.open(tmp_path / "out")
    assert all(np.array_equal(np.asarray(value), np.asarray(after.tensor(name))) for name, value in before.items())
