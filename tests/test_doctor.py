"""`dgemma doctor`: what it counts, what it advises, and what it says of a broken machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import dgemma
from dgemma import runtime
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.checkpoints.quant import QTensor
from dgemma.cli import machine as machine_facts
from dgemma.cli import main
from dgemma.core.config import ModelConfig
from published import floats, published
from tiny import tiny_checkpoint

DATA = Path(__file__).parent / "data"


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], prog_name="dgemma")


@pytest.fixture
def a_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with given frameworks and free memory, so that no framework has to be imported."""
    real = machine_facts.system()

    def describe(*, free: int, **frameworks: dict[str, Any]) -> None:
        monkeypatch.setattr(machine_facts, "frameworks", lambda: frameworks)
        monkeypatch.setattr(machine_facts, "system", lambda: real | {"free_memory_bytes": free})

    return describe


WORKS = {"version": "9.9", "gpus": []}


def report(*args: str | Path) -> tuple[dict[str, Any], int]:
    result = run("doctor", "--json", *args)
    return json.loads(result.stdout), result.exit_code


def test_doctor_asks_the_real_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # torch answers at once: importing it once more would be most of this file's time.
    stand_in = """print('a warning'); print('{"version": "2.99", "gpus": []}')"""
    monkeypatch.setattr(machine_facts, "PROBES", machine_facts.PROBES | {"torch": stand_in, "mlx": stand_in})
    result = run("doctor", "-m", tiny_checkpoint(tmp_path))
    assert result.exit_code == 0, result.output
    assert re.search(r"numpy +works, \d", result.stdout) and re.search(r"torch +works, 2.99", result.stdout)
    assert "FITS" in result.stdout and "PROBLEM" not in result.stdout
    assert "float32 (" in result.stdout


@pytest.mark.parametrize("name", ["torch", "mlx", "numpy"])
def test_probes_answer(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(machine_facts.PROBES[name], {})
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert re.match(r"\d+\.\d+", answer["version"])
    assert all({"name", "device", "total", "free"} <= card.keys() for card in answer["gpus"])


def test_doctor_counts_the_published_model(a_machine: Callable[..., None]) -> None:
    a_machine(free=80 << 30, numpy=WORKS, torch=WORKS)
    found, code = report("-m", DATA / "config_26b.json")
    model = found["model"]
    # The published checkpoint is 51.6 GB, 1.11 of it the image tower.
    assert code == 0 and model["dtype"] == "bfloat16"
    assert model["weights_bytes"] == pytest.approx(51.6e9 - 1.11e9, rel=2e-3)
    # Five full layers, two heads of 512, keys and values of two bytes.
    assert model["cache_bytes_per_1000_tokens"] == 1000 * 5 * 2 * 512 * 2 * 2
    assert model["cache_bytes_fixed"] >= 25 * 1023 * 8 * 256 * 2 * 2
    assert (
        model["largest_context"]
        == ModelConfig.from_hf(json.loads((DATA / "config_26b.json").read_text())).max_positions
    )


def test_doctor_says_what_would_fit(a_machine: Callable[..., None]) -> None:
    a_machine(free=20 << 30, numpy=WORKS, torch=WORKS, mlx=WORKS)
    found, code = report("-m", DATA / "config_26b.json", "--backend", "torch")
    assert code == 1 and not found["model"]["fits"] and found["problems"]
    assert [remedy["what"] for remedy in found["model"]["remedies"]] == ["dgemma convert --recipe 4bit"]
    found, code = report("-m", DATA / "config_26b.json", "--dtype", "float32", "--backend", "mlx")
    assert code == 1 and found["model"]["weights_bytes"] > 100e9
    a_machine(free=49 << 30, numpy=WORKS, torch=WORKS)
    found, code = report("-m", DATA / "config_26b.json", "--context", 200_000)
    shorter = found["model"]["remedies"][0]
    assert code == 1 and shorter["what"] == "a shorter context"
    again, code = report("-m", DATA / "config_26b.json", "--context", shorter["tokens"])
    assert code == 0 and again["model"]["fits"]
    assert report("-m", DATA / "config_26b.json", "--context", shorter["tokens"] + 1)[1] == 1


def test_doctor_and_inspect_say_what_each_backend_holds(a_machine: Callable[..., None], tmp_path: Path) -> None:
    """Packed on torch and mlx, with the biases that MLX derives; unpacked on numpy; floats in the dtype asked for."""
    a_machine(free=80 << 30, numpy=WORKS, torch=WORKS, mlx=WORKS)
    out = dgemma.convert(floats(tmp_path), tmp_path / "out", "4bit").path
    checkpoint = Checkpoint.open(out)
    stored = [checkpoint.tensor(name) for name in checkpoint.names]
    packed = sum(one.nbytes for one in stored if isinstance(one, QTensor))
    scales = sum(one.scales.nbytes for one in stored if isinstance(one, QTensor))
    plain = checkpoint.nbytes - packed  # of two bytes
    inspected = json.loads(run("inspect", out, "--json").stdout)
    for backend, held in (("torch", packed + 2 * plain), ("mlx", packed + scales + 2 * plain), ("numpy", None)):
        found, _ = report("-m", out, "--backend", backend)
        model = found["model"]
        assert model["dtype"] == "float32" == inspected["dtype"] and model["quantized"]
        assert model["packed"] is (held is not None)
        assert model["weights_bytes"] == (4 * model["parameters"] if held is None else held)
        assert inspected["weights_bytes"][backend] == model["weights_bytes"]
        assert inspected["needed_bytes"][backend] == model["needed_bytes"] == (
            model["weights_bytes"] + model["working_bytes"] + model["cache_bytes_fixed"]
            + model["cache_bytes_per_1000_tokens"] * model["context"] // 1000
        )  # fmt: skip
        narrow, _ = report("-m", out, "--backend", backend, "--dtype", "bfloat16")
        saved = model["weights_bytes"] - narrow["model"]["weights_bytes"]
        assert saved == (plain if held else model["weights_bytes"] // 2)
        text = run("doctor", "-m", out, "--backend", backend).stdout
        assert (
            "stay packed" if held else "are unpacked"
        ) in text and f"{inspected['bits_per_weight']:.2f} bits" in text
    assert "numpy" in run("inspect", out).stdout and "weights unpacked" in run("inspect", out).stdout


def test_doctor_and_load_choose_the_same_dtype(
    a_machine: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_machine(free=80 << 30, numpy=WORKS, torch=WORKS)
    folder = tiny_checkpoint(tmp_path, dtype="bfloat16")
    for limit, dtype in ((runtime.FLOAT32_LIMIT, "float32"), (1, "bfloat16")):
        monkeypatch.setattr(runtime, "FLOAT32_LIMIT", limit)
        assert report("-m", folder)[0]["model"]["dtype"] == dtype == dgemma.load(folder, backend="numpy").dtype


def test_inspect_says_what_has_to_be_converted(tmp_path: Path) -> None:
    folder, _ = published(tmp_path, "modelopt")
    assert "`dgemma convert` makes a folder that does" in run("inspect", folder).stdout


def test_doctor_prefers_a_gpu(a_machine: Callable[..., None]) -> None:
    card = {"name": "Card", "device": "cuda:0", "total": 80 << 30, "free": 79 << 30, "capability": "9.0"}
    a_machine(free=1 << 30, numpy=WORKS, torch=WORKS | {"gpus": [card]})
    found, code = report("-m", DATA / "config_26b.json", "--backend", "torch")
    assert code == 0 and found["chosen"]["device"] == "cuda:0" and found["model"]["free_bytes"] == card["free"]
    assert report("-m", DATA / "config_26b.json", "--backend", "torch", "--device", "cpu")[1] == 1
    found, code = report("-m", DATA / "config_26b.json", "--backend", "torch", "--device", "cuda:7")
    assert code == 1 and "cuda:7" in found["problems"][0]


@pytest.mark.parametrize("break_it", ["no folder", "truncated", "no framework"])
def test_doctor_names_problems(a_machine: Callable[..., None], tmp_path: Path, break_it: str) -> None:
    a_machine(free=1 << 34, numpy=WORKS, torch=WORKS)
    folder = tiny_checkpoint(tmp_path)
    if break_it == "no folder":
        folder = tmp_path / "nothing"
    elif break_it == "truncated":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    else:
        broken = {"error": "ImportError: no libthing", "gpus": []}
        a_machine(free=1 << 34, numpy=broken, torch=broken, mlx=broken)
    found, code = report("-m", folder)
    assert code == 1 and found["problems"] and all("\n" not in problem for problem in found["problems"])
    text = run("doctor", "-m", folder)
    assert text.exit_code == 1 and "PROBLEM" in text.stdout


def test_a_framework_that_crashes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_facts, "PROBES", {"numpy": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"})
    assert machine_facts.frameworks() == {"numpy": {"error": "ended by signal 11", "gpus": []}}
