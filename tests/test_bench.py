"""`dgemma bench`: what it makes is what it says, and what it reports adds up. No speed is asserted."""

from __future__ import annotations

import io
import json
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console

from dgemma import backends
from dgemma.backends import cuda
from dgemma.backends.cuda.card import CardOps
from dgemma.backends.cuda.graph import rerun
from dgemma.backends.cuda.passes import CardPasses
from dgemma.backends.torch.blocks import whole
from dgemma.backends.torch.packed import QuantizedTensor
from dgemma.checkpoints import weights
from dgemma.checkpoints.files import read_json
from dgemma.checkpoints.quant import Format, QTensor, dequantize
from dgemma.cli import bench as command
from dgemma.cli import machine, main, output
from dgemma.convert import recipes
from dgemma.core.config import ModelConfig
from dgemma.core.engine import Engine
from dgemma.core.errors import DgemmaError
from dgemma.core.graph_passes import GraphPasses
from dgemma.core.parts import Model
from dgemma.tools import bench, bench_size
from dgemma.tools import bench_card as card
from dgemma.tools.inspect import inspect_config

CPU = torch.device("cpu")
KINDS = {
    "4-bit": Format(bits=4, symmetric=True), "8-bit": Format(bits=8, symmetric=True), "affine": Format(group_size=64),
    "nvfp4": Format(mode="nvfp4", group_size=16), "mxfp4": Format(mode="mxfp4"), "mxfp8": Format(mode="mxfp8", bits=8),
    "bf16": None,
}  # fmt: skip
SHORT = ["--random", "nano-like", "--steps", "2", "--context", "20", "--canvases", "2", "--backend", "torch",
         "--device", "cpu"]  # fmt: skip


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments], prog_name="dgemma")


def made(recipe: str = "bf16", backend: str = "torch", dtype: Any = "float32") -> GraphPasses:
    """Passes over a random nano-like model."""
    config = bench.config_of("nano-like")
    weight = bench.weights_of(config, recipe)
    return backends.passes_of(backend, config, weight, device="cpu", dtype=dtype)


# ---- What is made -----------------------------------------------------------------------------------------------


def test_the_26b_is_the_released_model() -> None:
    where = Path(__file__).parent / "data" / "config_26b.json"
    released = ModelConfig.from_hf(read_json(where))
    ours = bench.config_of("26b")
    assert weights.shapes(ours) == weights.shapes(released) and ours.layers == released.layers
    assert (ours.canvas_length, ours.experts_per_token, ours.max_positions) == (
        released.canvas_length, released.experts_per_token, released.max_positions,
    )  # fmt: skip


@pytest.mark.parametrize("shape, millions", [("26b", 25_000), ("110m", 110), ("nano-like", 2)])
def test_shapes_are_of_the_size_that_they_are_called(shape: str, millions: int) -> None:
    count = sum(math.prod(one) for one in weights.shapes(bench.config_of(shape)).values())
    assert 0.5 * millions < count / 1e6 < 1.5 * millions


@pytest.mark.parametrize("maker", ["host", "device"])
@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_have_the_spread_of_real_ones(kind: str, maker: str) -> None:
    """And no mean, which would add up over layers until all tokens took the same experts."""
    make = bench.random_weight if maker == "host" else card.maker(CPU)
    made = make((40, 512), KINDS[kind], 3)
    if isinstance(made, QTensor):
        value = dequantize(made)
    elif isinstance(made, QuantizedTensor):
        value = whole(made, torch.float32).numpy()
    else:
        value = (made.float().numpy() if isinstance(made, torch.Tensor) else made).astype(np.float32)
    assert value.shape == (40, 512) and np.isfinite(value).all()
    assert 0.5 * bench.SPREAD < value.std() < 2 * bench.SPREAD
    assert abs(value.mean()) < 0.03 * bench.SPREAD
    ones = make((7,), KINDS[kind], 3)
    assert np.asarray(ones.float() if isinstance(ones, torch.Tensor) else ones).tolist() == [1.0] * 7


def test_seeds_are_followed_and_parts_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight drawn in several parts is as random at their seams as elsewhere."""
    monkeypatch.setattr(card, "PART", 64)
    first, again, other = (card.maker(CPU)((6, 64), KINDS["4-bit"], seed).words for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({tuple(row.tolist()) for row in first}) == 6


@pytest.mark.parametrize("recipe", ["bf16", "8bit", "4bit", "4bit-mlx"])
def test_a_model_holds_what_its_recipe_takes(recipe: str) -> None:
    config = bench.config_of("nano-like")
    want = inspect_config(config, recipes.find(recipe)).held("torch", "bfloat16")
    assert bench.weight_bytes(made(recipe, dtype="bfloat16").model) == want


def test_so_does_one_that_is_made_on_its_device() -> None:
    config = bench.config_of("nano-like")
    model = bench.random_model(CardOps("bfloat16", "cpu"), config, "4bit", card.maker(CPU))
    assert bench.weight_bytes(model) == inspect_config(config, recipes.find("4bit")).held("torch", "bfloat16")


# ---- What is reported -------------------------------------------------------------------------------------------


def test_the_row_adds_up() -> None:
    result = run(*SHORT, "--json", "--recipe", "8bit")
    assert result.exit_code == 0, result.output
    row: dict[str, Any] = json.loads(result.stdout)
    assert row["tokens_per_second"] == pytest.approx(48 / (row["canvas_ms"] / 1e3), rel=0.01)
    assert row["forward_ms"] == pytest.approx(row["canvas_ms"] / 3, rel=0.01)
    assert row["gb_per_second"] == pytest.approx(row["forward_gb"] / (row["denoise_ms"] / 1e3), abs=0.6)
    assert row["share_of_copy"] == pytest.approx(row["gb_per_second"] / row["copy_gb_per_second"], abs=0.1)
    assert (row["recipe"], row["steps"], row["context"], row["batch"], row["captured"]) == ("8bit", 2, 20, 1, False)
    assert row["arriving_tokens_per_second"] is None
    for key in ("engine_tokens_per_second", "commit_ms", "prefill_ms", "first_draft_ms", "weights_gb"):
        assert row[key] > 0, key
    for key in ("device", "torch", "triton", "commit", "dtype"):
        assert row[key], key


def test_off_a_terminal_stdout_is_one_json_line() -> None:
    result = run(*SHORT, "--batch", "2", "--profile")
    assert result.exit_code == 0 and result.stdout.count("\n") == 1, result.output
    row = json.loads(result.stdout)
    assert row["arriving_tokens_per_second"] > 0
    assert row["batch"] == 2 and row["profile"][0]["ms"] >= row["profile"][-1]["ms"] > 0


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The console that is stdout, and a terminal, for commands run from here on."""
    screen = io.StringIO()
    shown = Console(file=screen, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(output, "consoles", lambda: (shown, Console(file=io.StringIO())))
    return screen


def test_on_a_terminal_it_is_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_a_terminal(monkeypatch)
    result = run(*SHORT, "--profile")
    assert result.exit_code == 0, result.output
    assert result.stdout == "" and "{" not in screen.getvalue()
    for part in ("tokens per second", "denoising pass", "launches"):
        assert part in screen.getvalue()
    assert json.loads(run(*SHORT, "--json").stdout)["shape"] == "nano-like"


# ---- Without a shape --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("canvases", "batch"), [(1, 1), (3, 1), (2, 3)])
def test_passes_are_counted(canvases: int, batch: int) -> None:
    """The count that an estimate and progress rest on is the number of passes that run."""
    plan = bench.Plan(shape="nano-like", steps=2, context=96, canvases=canvases, batch=batch)
    passes, seen = made(), []
    bench.measure(passes, plan, lambda: seen.append(None))
    assert bench_size.passes(plan, 48) * 0.6 < len(seen) <= 1.4 * bench_size.passes(plan, 48) + 10
    assert 0 < bench_size.time_a_pass(passes, plan) < 60


def test_a_plan_is_cut_to_what_a_pass_allows() -> None:
    plan = bench.Plan(shape="110m")
    whole, least = (bench_size.passes(replace(plan, canvases=n), 256) for n in (4, 1))
    assert bench_size.within(plan, 256, 60 / whole) == plan
    assert bench_size.within(plan, 256, 60 / least) == replace(plan, canvases=1)
    assert bench_size.within(plan, 256, 60 / (least - 1)) is None


@pytest.mark.parametrize("seconds, shape", [(0.001, "110m"), (0.3, "110m"), (9.0, "nano-like")])
def test_without_a_shape_it_takes_what_a_minute_allows(
    monkeypatch: pytest.MonkeyPatch, seconds: float, shape: str
) -> None:
    monkeypatch.setitem(bench.SIZES, "110m", bench.SIZES["nano-like"])
    monkeypatch.setitem(bench.CANVAS, "110m", bench.CANVAS["nano-like"])
    monkeypatch.setattr(bench_size, "time_a_pass", lambda *_: seconds)
    result = run("--steps", "2", "--context", "480", "--backend", "torch", "--device", "cpu")
    assert result.exit_code == 0, result.output
    row, said = json.loads(result.stdout), result.stderr
    assert row["shape"] == shape and f"{shape}: " in said and f"passes of about {seconds:g} s" in said
    assert row["canvases"] == {0.001: 4, 0.3: 4, 9.0: 1}[seconds]
    fixed = run("--steps", "2", "--canvases", "2", "--context", "480", "--backend", "torch", "--device", "cpu")
    assert json.loads(fixed.stdout)["canvases"] == 2


def test_on_a_backend_without_torch() -> None:
    plan = bench.Plan(shape="nano-like", steps=1, context=9, canvases=1)
    assert bench.measure(made("4bit", "numpy"), plan).tokens_per_second > 0


def test_the_same_plan_drafts_the_same_tokens() -> None:
    passes, plan = made(), bench.Plan(shape="nano-like", steps=2, context=9, canvases=2, batch=2)
    first, again = (bench.drafts(passes, plan) for _ in range(2))
    assert len(first) == 4 and len({draft.tobytes() for draft in first}) == 4
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_what_is_started_ahead_drafts_the_same(monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    passes, plan = made(), bench.Plan(shape="nano-like", steps=3, context=9, canvases=2, batch=2)
    want = bench.drafts(passes, plan)
    monkeypatch.setattr(passes, "lookahead", ahead)
    np.testing.assert_array_equal(bench.drafts(passes, plan), want)


def test_arriving_requests_share_passes() -> None:
    """As many passes for three requests as for one, and figures of the one that came first."""
    passes, plan = made(), bench.Plan(shape="nano-like", steps=2, context=9, canvases=2, batch=3)
    rows, whole = [], passes.step
    passes.step = lambda slots, *given: (rows.append(len(slots)), whole(slots, *given))[1]  # type: ignore[method-assign]
    seconds, stats = bench.arriving(Engine(passes, None, prefix_bytes=0), plan, 3)
    assert rows == [3] * 8 and seconds > 0 and stats.emitted_tokens == 96


class Capturable(CardOps):
    """Without a card nothing is in the way of a capture."""

    def can_capture(self, weights: Model) -> bool:
        return True


def captured(*_: Any, **__: Any) -> CardPasses:
    """A card's passes, on the CPU."""
    ops = Capturable("float32", "cpu")
    model = bench.random_model(ops, bench.config_of("nano-like"), "bf16")
    return CardPasses(ops, model, capture=rerun)


def test_captured_drafts_are_compared_with_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, plan = captured(), bench.Plan(shape="nano-like", steps=2, context=9)
    assert passes.lookahead == 1 and cuda.plain(passes).lookahead == 0
    assert command._captured_equals_plain(passes, plan)
    right, calls = bench.drafts, iter((0, 1))
    monkeypatch.setattr(bench, "drafts", lambda *given: [draft + next(calls) for draft in right(*given)[-1:]])
    assert not command._captured_equals_plain(passes, plan)


def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bench runs on passes that are captured, on the CPU."""
    monkeypatch.setattr(backends, "passes_of", captured)


def test_passes_are_captured_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_card(monkeypatch)
    rows = [json.loads(run(*SHORT, "--json", *options).stdout) for options in (["--check"], ["--plain"])]
    assert [row["captured"] for row in rows] == [True, False] and rows[0]["captured_equals_plain"]


def test_what_was_measured_is_said_whatever_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    on_a_card(monkeypatch)
    monkeypatch.setattr(command, "_captured_equals_plain", fail)
    result = run(*SHORT, "--json", "--check")
    assert result.exit_code == 1 and json.loads(result.stdout)["tokens_per_second"] > 0
    assert "ran out of memory while comparing" in result.stderr and result.stderr.count("\n") == 1


def test_a_profile_counts_a_graphs_kernels_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = torch.autograd.DeviceType
    events = [
        SimpleNamespace(key=key, device_type=kind, self_device_time_total=us, count=4)
        for key, kind, us in (
            ("cudaGraphLaunch", kinds.CPU, 9e3),
            ("_score", kinds.CUDA, 6e3),
            ("_mean", kinds.CUDA, 3e3),
        )
    ]
    recorder = SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: nullcontext(recorder))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    rows = card.profile(lambda: None, torch.device("cuda:0"), passes=2)
    assert rows == [{"kernel": name, "ms": ms, "launches": 2.0} for name, ms in (("_score", 3.0), ("_mean", 1.5))]


def test_a_nearly_full_card_copies_less(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(card, "free_memory", lambda device: (40_000, 80_000))
    monkeypatch.setattr(torch, "randint", lambda low, high, size, **_: sizes.append(size[0]) or torch.zeros(size))
    monkeypatch.setattr(card, "timed", lambda run, device: 1.0)
    assert card.copy_bandwidth(torch.device("cuda:0")) == 2 * 10_000 and sizes == [10_000]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--recipe", "7bit"], "recipe"),
        (["--context", "99999999"], "exceed the model's"),
        (["--device", "cuda"], "not usable"),
        (["--check"], "capture none"),
        (["--plain"], "capture none"),
        (["--backend", "onnx"], "out of a checkpoint"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], message: str) -> None:
    result = run(*SHORT, *arguments)
    assert result.exit_code != 0 and message in result.stderr
    assert result.stderr.startswith("dgemma: error: ") and result.stderr.count("\n") == 1, result.stderr


def test_weights_that_no_memory_holds_are_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "system", lambda: {"free_memory_bytes": 8 * 10**9})
    result = run("--random", "26b", "--recipe", "4bit", "--backend", "torch", "--device", "cpu")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert re.search(r"26b in 4bit takes 15\.\d\d GB of weights, and 8\.00 GB of memory are free", result.stderr)


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(DgemmaError, match="exceed"):
        bench.measure(made(), bench.Plan(shape="nano-like", context=10**9))
