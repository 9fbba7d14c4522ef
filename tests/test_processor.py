"""Products run in what the processor multiplies, over weights as the file has them: which width that is, that the
answers are those of the law, and that nothing is converted whole. No test here depends on this machine's processor."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import dgemma
from dgemma import backends, runtime
from dgemma.backends.numpy import NumpyOps
from dgemma.backends.torch import blocks, processor
from dgemma.backends.torch.inference import InferenceOps
from dgemma.checkpoints import weights
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.convert import convert
from dgemma.core import memory
from dgemma.core.config import ModelConfig
from dgemma.tools.bench import config_of
from law import assert_close_f32, assert_low_precision
from published import floats
from test_doctor import DATA, WORKS, a_machine, report, run
from test_torch import Allocations
from test_torch_quant import answers, source
from tiny import tiny_checkpoint

__all__ = ["a_machine"]  # a fixture

NOTHING = dict(onednn=False, onednn_half=False, bf16=False, amx=False, amx_half=False)
AVX2 = NOTHING | dict(vectors="AVX2")
SKYLAKE = NOTHING | dict(vectors="AVX512", onednn=True)
ZEN4 = SKYLAKE | dict(bf16=True)
SAPPHIRE = ZEN4 | dict(amx=True)
GRANITE = SAPPHIRE | dict(amx_half=True, onednn_half=True)
ARM = NOTHING | dict(vectors="DEFAULT", machine="aarch64")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A processor of given abilities, as torch tells them."""

    def set_up(
        *, vectors: str, onednn: bool, onednn_half: bool, bf16: bool, amx: bool, amx_half: bool,
        machine: str = "x86_64", built: bool = True,
    ) -> None:  # fmt: skip
        said: list[tuple[Any, str, Any]] = [
            (platform, "machine", machine), (torch.backends.mkldnn, "is_available", built),
            (torch.backends.cpu, "get_cpu_capability", vectors),
            (torch.ops.mkldnn, "_is_mkldnn_bf16_supported", onednn),
            (torch.ops.mkldnn, "_is_mkldnn_fp16_supported", onednn_half),
            (torch.cpu, "_is_avx512_bf16_supported", bf16), (torch.cpu, "_is_amx_tile_supported", amx),
            (torch.cpu, "_is_amx_fp16_supported", amx_half),
        ]  # fmt: skip
        for limit in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(limit, raising=False)  # the suite runs under limits too
        for where, name, answer in said:
            monkeypatch.setattr(where, name, lambda answer=answer: answer)

    return set_up


@pytest.mark.parametrize(
    "abilities, environment, native",
    [
        (AVX2, {}, ()),
        (SKYLAKE, {}, ()),  # oneDNN calls bfloat16 supported, and emulates it
        (ZEN4, {}, ("bfloat16",)),
        (SAPPHIRE, {}, ("bfloat16",)),
        (GRANITE, {}, ("bfloat16", "float16")),
        (GRANITE | dict(built=False), {}, ()),
        # What limits oneDNN limits us, whatever the processor has; and so does what limits torch.
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, ()),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "avx512_core"}, ()),
        (ZEN4, {"DNNL_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, ()),
        (GRANITE | dict(onednn_half=False), {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, ("bfloat16",)),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, ("bfloat16",)),
        (ZEN4 | dict(vectors="AVX2"), {"ATEN_CPU_CAPABILITY": "avx2"}, ()),
        (ARM, {}, ()),
        (ARM | dict(onednn=True), {}, ("bfloat16",)),
    ],
)
def test_what_a_processor_multiplies(
    pretend: Callable[..., None], abilities: dict[str, Any], environment: dict[str, str], native: tuple[str, ...]
) -> None:
    pretend(**abilities)
    assert processor.native(environment) == native
    for dtype in processor.LOW:
        assert processor.multiplies(dtype) == "float32" or dtype in processor.native()
    assert processor.multiplies("float32") == "float32" and processor.multiplies("float64") == "float64"


def test_an_emulated_width_is_not_what_products_run_in(pretend: Callable[..., None]) -> None:
    for abilities, width in ((AVX2, torch.float32), (ZEN4, torch.bfloat16)):
        pretend(**abilities)
        assert InferenceOps("bfloat16")._product == width and InferenceOps("float32")._product == torch.float32
        assert InferenceOps("bfloat16", products="float32")._product == torch.float32


# ---- Which width auto takes ---------------------------------------------------------------------------------------

BIG = ModelConfig.from_hf(json.loads((DATA / "config_26b.json").read_text()))


def test_auto_follows_the_processor() -> None:
    middle, small = config_of("110m"), config_of("nano-like")
    cases: list[tuple[ModelConfig, str, str, tuple[str, ...] | None, str]] = [
        (BIG, "bfloat16", "torch", (), "float32"), (BIG, "bfloat16", "torch", ("bfloat16",), "bfloat16"),
        (middle, "bfloat16", "torch", (), "float32"), (middle, "bfloat16", "torch", ("bfloat16",), "bfloat16"),
        (small, "bfloat16", "torch", ("bfloat16",), "float32"),
        (BIG, "float16", "torch", ("bfloat16",), "float32"),  # never another precision than the stored one or a wider
        (BIG, "float16", "torch", ("bfloat16", "float16"), "float16"),
        (BIG, "float32", "torch", ("bfloat16",), "float32"),
        (BIG, "bfloat16", "torch", None, "bfloat16"), (middle, "bfloat16", "torch", None, "float32"),
        (BIG, "bfloat16", "mlx", None, "bfloat16"), (BIG, "bfloat16", "onnx", None, "float32"),
    ]  # fmt: skip
    for config, stored, backend, native, want in cases:
        got = runtime.auto_dtype(config, stored, backend, lambda native=native: native)  # type: ignore[arg-type]
        assert got == want, (stored, backend, native)


def test_only_torch_on_the_cpu_says_what_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "native", lambda: ("bfloat16",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.native("torch") == backends.native("torch", "cpu") == ("bfloat16",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.native("torch", "cpu") == ("bfloat16",)
    assert backends.native("torch") is backends.native("torch", "cuda:1") is backends.native("mlx") is None


@pytest.mark.parametrize("native, dtype", [((), "float32"), (("bfloat16",), "bfloat16")])
def test_doctor_inspect_and_load_agree(
    a_machine: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: tuple[str, ...], dtype: str
) -> None:
    a_machine(free=80 << 30, numpy=WORKS, torch=WORKS | {"native": list(native)})
    monkeypatch.setattr(processor, "native", lambda: native)
    monkeypatch.setattr(runtime, "NATIVE_LIMIT", 1)
    folder = tiny_checkpoint(tmp_path, dtype="bfloat16")
    found, code = report("-m", folder, "--backend", "torch")
    assert code == 0 and found["model"]["dtype"] == dtype
    assert dgemma.load(folder, backend="torch", device="cpu").dtype == dtype
    assert json.loads(run("inspect", folder, "--json").stdout)["dtype"] == dtype
    said = run("doctor", "-m", folder, "--backend", "torch").stdout
    assert ("emulates bfloat16" in said) is (dtype == "float32") and f"torch on cpu, {dtype} " in said
    asked = report("-m", folder, "--backend", "torch", "--dtype", "bfloat16")[0]["model"]["dtype"]
    assert asked == "bfloat16" == dgemma.load(folder, backend="torch", device="cpu", dtype="bfloat16").dtype


# ---- Weights as they are stored -------------------------------------------------------------------------------------


@pytest.fixture
def all_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix is large enough to stay narrow, and is widened in several blocks."""
    monkeypatch.setattr(memory, "WIDENED_ONCE", 0)
    monkeypatch.setattr(blocks, "WIDENED", 64 * 100)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_large_matrices_stay_in_the_map(tmp_path: Path, all_narrow: None, stored: str) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, dtype=stored))
    held = made = 0
    for name, shape in weights.shapes(checkpoint.config).items():
        tensor = checkpoint.tensor(name)
        with Allocations() as new:
            packed = InferenceOps("float32").pack(tensor)
        mapped = packed.data_ptr() == np.asarray(tensor).ctypes.data
        assert mapped is (len(shape) > 1) and (mapped or packed.dtype == torch.float32), name
        held, made = held + packed.nbytes, made + sum(new.sizes)
    assert made < held / 10
    narrow = InferenceOps("bfloat16").pack(np.ones((3, 4), np.float32))
    assert narrow.dtype == torch.bfloat16  # a wider one is rounded once, as asked


def test_small_matrices_are_widened_once() -> None:
    stored = np.ones((8, 16), ml_dtypes.bfloat16)
    assert InferenceOps("float32").pack(stored).dtype == torch.float32


def test_doctor_counts_what_stays_narrow(
    a_machine: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole 26B in float32 takes its file's size on torch's CPU, and twice that elsewhere; small parts are wide."""
    card = {"name": "Card", "device": "cuda:0", "total": 200 << 30, "free": 200 << 30, "capability": "9.0"}
    a_machine(free=200 << 30, numpy=WORKS, torch=WORKS | {"gpus": [card], "native": []})

    def held(*args: str) -> int:
        return report("-m", DATA / "config_26b.json", "--dtype", "float32", *args)[0]["model"]["weights_bytes"]

    assert held("--backend", "torch", "--device", "cpu") == pytest.approx(50.5e9, rel=5e-3)
    assert held("--backend", "torch") == held("--backend", "numpy") == pytest.approx(101e9, rel=5e-3)
    monkeypatch.setattr(memory, "WIDENED_ONCE", 1000)
    folder = tiny_checkpoint(tmp_path, dtype="bfloat16")
    for name in ("plain", "4bit"):
        if name == "4bit":
            folder = convert(floats(tmp_path), tmp_path / "out", "4bit", workers=1).path
        model = dgemma.load(folder, backend="torch", device="cpu", dtype="float32").engine.passes.model
        from dgemma.tools.bench import weight_bytes

        counted = report("-m", folder, "--backend", "torch", "--device", "cpu", "--dtype", "float32")[0]["model"]
        assert counted["weights_bytes"] == weight_bytes(model) < 4 * counted["parameters"], name


# ---- Answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_float32_over_narrow_weights_gives_the_oracles_answers(
    tmp_path: Path, all_narrow: None, stored: str
) -> None:  # fmt: skip
    checkpoint = Checkpoint.open(source(tmp_path, dtype=stored))
    want, got = (answers(ops, checkpoint) for ops in (NumpyOps("float64"), InferenceOps()))
    for what in want:
        if what in ("token", "argmax"):
            np.testing.assert_array_equal(got[what], want[what], what)
        else:
            assert_close_f32(got[what], want[what], what)


@pytest.mark.parametrize("recipe", ["bf16", "4bit", "nvfp4"])
def test_bfloat16_with_float32_products_is_within_the_law(tmp_path: Path, recipe: str) -> None:
    """Asked for on a processor that emulates it: activations are bfloat16, and sums no worse than the oracle's."""
    folder = source(tmp_path, top_k_experts=4)
    if recipe != "bf16":
        folder = convert(folder, tmp_path / "out", recipe, workers=1).path
    checkpoint = Checkpoint.open(folder)
    runs = (InferenceOps("bfloat16", products="float32"), NumpyOps("bfloat16"), NumpyOps("float64"))
    got, rounded, exact = (answers(ops, checkpoint) for ops in runs)
    for what in ("states", "logits", "mean embedding"):
        assert_low_precision(got[what], rounded[what], exact[what], what)


def test_nano_writes_the_same_text_over_narrow_weights(all_narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    board = ".3.1\n.2..\n....\n...4"
    narrow = dgemma.load("nano", backend="torch", device="cpu").generate(board)
    monkeypatch.setattr(memory, "WIDENED_ONCE", 1 << 40)
    wide = dgemma.load("nano", backend="torch", device="cpu").generate(board)
    assert narrow.token_ids == wide.token_ids and narrow.stats.steps == wide.stats.steps


def test_no_weight_is_widened_whole(tmp_path: Path, all_narrow: None) -> None:
    """Of a table of 8 MB a product, a lookup and the head make blocks."""
    ops = InferenceOps()
    table = ops.pack(np.ones((16_384, 128), ml_dtypes.bfloat16))
    x = torch.ones(1, 4, 128)
    with Allocations() as made:
        ops.linear(x, table)
        ops.embed(table, torch.zeros(1, 4, dtype=torch.int32), 2.0)
        ops.mean_embedding(torch.ones(1, 4, 16_384), table)
        ops.vocab_head(x, table, 30.0, torch.ones(1, 1), torch.rand(1, 4))
    assert max(made.sizes) < table.nbytes / 4
