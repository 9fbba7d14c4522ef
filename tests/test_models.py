"""`dgemma models`, and --revision wherever a model is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from click.testing import CliRunner, Result

import dgemma
from dgemma.checkpoints.checkpoint import resolve
from dgemma.cli import machine, main
from said import says
from tiny import tiny_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), prog_name="dgemma")


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of downloads with a model, one without weights, one of another kind, and a data set."""
    cache = tmp_path / "hub"
    for name in ("models--some--tiny", "models--some--config", "models--some--bert", "datasets--some--text"):
        folder = cache / name / "snapshots" / COMMIT
        folder.parent.mkdir(parents=True)
        (cache / name / "refs").mkdir()
        (cache / name / "refs" / "main").write_text(COMMIT)
        if name.endswith("bert"):
            folder.mkdir()
            (folder / "config.json").write_text('{"model_type": "bert"}')
        else:
            shutil.copytree(tiny_checkpoint(tmp_path / name, canvas_length=16), folder)
        if name.endswith("config"):
            (folder / "model.safetensors").unlink()
    scan = huggingface_hub.scan_cache_dir
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan(cache))
    monkeypatch.setattr(machine, "framework", lambda name: {"gpus": []})
    return cache


def test_models_lists_what_is_here(cached: Path) -> None:
    result = run("models", "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["model"] for row in rows] == ["nano", "some/config", "some/tiny"]
    nano, config, tiny = rows
    assert nano["fits"] and nano["revision"] is None and nano["bytes"] > 10**6
    assert (config["fits"], config["why"]) == (False, "its weights are not here")
    assert tiny["fits"] and tiny["revision"] == COMMIT and tiny["device"] == "cpu"
    said = run("models").stdout
    assert "some/tiny at 0123456789ab: " in said and "runs here" in said and "cannot run: its weights" in said


def test_models_without_a_cache_and_with_a_damaged_one(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cached / "models--some--tiny" / "snapshots" / COMMIT / "config.json").write_text('{"model_type":')
    (cached / "models--some--config" / "snapshots" / COMMIT / "config.json").write_text(
        '{"model_type": "diffusion_gemma"}'
    )
    result = run("models")
    assert result.exit_code == 0 and "some/tiny" not in result.stdout
    assert "text_config" in result.stdout
    scan = huggingface_hub.utils.scan_cache_dir
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan(cached / "none"))
    assert run("models").stdout.splitlines()[0].startswith("nano: ")
    monkeypatch.setattr(
        huggingface_hub,
        "scan_cache_dir",
        lambda: scan(cached / "models--some--tiny" / "snapshots" / COMMIT / "config.json"),
    )
    result = run("models")
    assert result.exit_code == 1 and "HF_HUB_CACHE" in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_revisions_are_for_hub_ids(tmp_path: Path) -> None:
    with says("nano", "has no revisions", "'main'"):
        resolve("nano", revision="main")
    with says("has no revisions"):
        dgemma.load(tmp_path, revision="main")
    for args in (
        ["generate", "x", "--revision", "v1"], ["chat", "--revision", "v1"], ["inspect", "nano", "--revision", "v1"],
        ["compare", "nano", "nano", "-p", "x", "--revision-b", "v1"],
        ["export", "nano", "--revision", "v1", "--out", str(tmp_path / "e")],
        ["convert", "nano", "--revision", "v1", "--out", str(tmp_path / "o")],
    ):  # fmt: skip
        result = run(*args)
        assert result.exit_code == 1 and "has no revisions" in result.stderr, (args, result.stderr)


@pytest.mark.parametrize("command", ["generate", "chat", "batch"])
def test_help_lists_options_by_group(command: str) -> None:
    heads = [line for line in run(command, "--help").stdout.splitlines() if line and not line.startswith(" ")]
    assert "Sampling (by default as the checkpoint says):" in heads and "[PROMPT]" not in heads
    assert {"Prompt:", "Model:", "Length and seed:", "Output:", "Options:"} <= set(heads)


def test_shells_complete_commands_and_options() -> None:
    """What README's line for bash asks of the command."""
    for words, last, wanted in (("dgemma ge", 1, "generate"), ("dgemma generate --temp", 2, "--temperature")):
        env = {"_DGEMMA_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(last)}
        result = CliRunner(env=env).invoke(main, [], prog_name="dgemma")
        assert wanted in result.stdout, result.output
