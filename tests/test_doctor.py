"""`dgemma doctor`: what it counts, what it advises, and what it says of a broken machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dgemma.cli import machine as machine_facts
from dgemma.cli import main
from dgemma.core.config import ModelConfig
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
    a_machine(free=20 << 30, numpy=WORKS, torch=WORKS)
    found, code = report("-m", DATA / "config_26b.json")
    assert code == 1 and not found["model"]["fits"] and found["problems"]
    assert [remedy["what"] for remedy in found["model"]["remedies"]] == ["dgemma convert --recipe 4bit"]
    found, code = report("-m", DATA / "config_26b.json", "--dtype", "float32")
    assert code == 1 and found["model"]["weights_bytes"] > 100e9
    a_machine(free=49 << 30, numpy=WORKS, torch=WORKS)
    found, code = report("-m", DATA / "config_26b.json", "--context", 200_000)
    shorter = found["model"]["remedies"][0]
    assert code == 1 and shorter["what"] == "a shorter context"
    again, code = report("-m", DATA / "config_26b.json", "--context", shorter["tokens"])
    assert code == 0 and again["model"]["fits"]
    assert report("-m", DATA / "config_26b.json", "--context", shorter["tokens"] + 1)[1] == 1


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
