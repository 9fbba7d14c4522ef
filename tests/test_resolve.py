"""A model's name becomes a folder: packaged, on disk, or from the hub, whose every failure says what to do."""

from __future__ import annotations

import errno
import importlib.resources
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

import dgemma
from dgemma.checkpoints.checkpoint import resolve
from said import says
from tiny import tiny_checkpoint

REPO = "google/diffusiongemma-26B-A4B-it"


def test_a_path_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "google" / "gemma").mkdir(parents=True)
    assert resolve("google/gemma") == Path("google/gemma")  # a folder comes before the hub
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/google") == tmp_path / "google"


def test_nano_comes_with_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.resources, "files", lambda name: tmp_path / name)
    with says("nano", "models", "install"):
        resolve("nano")
    (tmp_path / "dgemma" / "models" / "nano").mkdir(parents=True)
    assert resolve("nano") == tmp_path / "dgemma" / "models" / "nano"


@pytest.mark.parametrize(
    "name",
    ["", "nanoo", "./google/gemma", "/no/such/folder", "a/b/c", "google/", "/gemma", "google/a b", "google/../etc",
     "nano\n", "~nobody_here/x", "x\0y/z", "x" * 5000, "é/x", "-a/b", Path("google/gemma")],
)  # fmt: skip
def test_a_name_that_is_nothing_lists_what_would_be(name: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with says("no model", "'nano'", "folder", REPO):
        resolve(name)


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve(REPO, revision="v2", progress=list) == tmp_path
    assert asked.pop("allow_patterns") == ["*.safetensors", "*.json", "*.jinja"]
    assert asked == {"repo": REPO, "revision": "v2", "tqdm_class": list, "ignore_patterns": ["*/*"]}
    resolve(REPO)
    assert asked["revision"] is None


def http(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    """An error of the hub's, made without its HTTP client, whose package differs by version."""
    error = kind.__new__(kind)
    error.args = ("first line\nsecond line",)
    error.response = type("Response", (), {"status_code": status})()  # type: ignore[assignment]
    return error


class ConnectError(Exception):
    """Stands for an HTTP client's own exception."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http(errors.GatedRepoError, 403), ["gated", "hf auth login"]),
        (http(errors.RepositoryNotFoundError, 404), ["no such model", "hf auth login"]),
        (http(errors.RevisionNotFoundError, 404), ["no such revision", "v2"]),
        (http(errors.HfHubHTTPError, 401), ["401", "hf auth login"]),
        (http(errors.HfHubHTTPError, 503), ["503", "later"]),
        (errors.LocalEntryNotFoundError("long\nstory"), ["cannot be reached", "folder"]),
        (errors.OfflineModeIsEnabled("offline\nmode"), ["HF_HUB_OFFLINE"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["disk is full", "HF_HOME"]),
        (PermissionError(errno.EACCES, "Permission denied"), ["download failed", "Permission denied"]),
        (ConnectError("no route\n" + "x" * 999), ["download failed", "ConnectError", "no route"]),
        (errors.HFValidationError("bad id"), ["download failed", "bad id"]),
        (ConnectError(), ["download failed", "ConnectError"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_failed_downloads_say_what_to_do(error: Exception, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with says(REPO, *words):
        resolve(REPO, revision="v2")


def test_an_interrupt_stays_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(KeyboardInterrupt):
        resolve(REPO)


def test_the_real_library_offline(tmp_path: Path) -> None:
    """HF_HUB_OFFLINE is read when huggingface_hub is imported, so this asks a process of its own."""
    code = (
        "import sys\nfrom dgemma.checkpoints.checkpoint import resolve\nfrom dgemma.core.errors import DgemmaError\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        f"try: resolve({REPO!r})\nexcept DgemmaError as error: print(error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1 and REPO in result.stdout and "not downloaded yet" in result.stdout


@pytest.mark.parametrize("name", [3, 2.5, None, b"nano", ["nano"], True, object()])
def test_what_is_no_name_is_refused(tmp_path: Path, name: Any) -> None:
    for act in (
        dgemma.load, lambda one: dgemma.convert(one, tmp_path / "out"),
        lambda one: dgemma.export(one, tmp_path / "out"), lambda one: dgemma.compare(one, one, ["a"]),
    ):  # fmt: skip
        with says("the model is", "expected a name"):
            act(name)


@pytest.mark.parametrize("name", ["\ud800", "a\udcff/b", "x\0y", "\n", "a" * 5000, "~nobody-of-that-name/x", "", " "])
def test_names_that_no_file_system_has(tmp_path: Path, name: str) -> None:
    for act in (dgemma.load, lambda one: dgemma.convert(one, tmp_path / "out"),
                lambda one: dgemma.export(one, tmp_path / "out")):  # fmt: skip
        with says("no model"):
            act(name)


@pytest.mark.parametrize("rules", [3, b"x.toml", ["x.toml"]])
def test_rules_are_a_path(tmp_path: Path, rules: Any) -> None:
    with says("rules", "expected a path"):
        dgemma.convert("nano", tmp_path / "out", rules=rules)


@pytest.mark.parametrize("revision", [3, "", b"main"])
def test_revisions_are_names(revision: Any) -> None:
    with says("revision", "branch"):
        dgemma.load("owner/model", revision=revision)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tiny_checkpoint(tmp_path)) + b"-\xff"))
    (tmp_path / "tiny").rename(folder)
    for backend in ("torch", "numpy", "mlx"):
        assert dgemma.load(folder, backend=backend).generate([20, 21], max_new_tokens=2).token_ids
    dgemma.convert(folder, tmp_path / "out", "bf16", workers=1)
    (folder / "config.json").write_text("{")
    with says("config.json", "JSON"):
        dgemma.load(folder)
