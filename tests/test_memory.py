"""The peak of this process, and of nobody else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dgemma
from dgemma.checkpoints import sizes
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.core import memory
from dgemma.core.memory import peak_memory
from dgemma.tools.inspect import inspect_folder
from tiny import tiny_checkpoint

READ = "from dgemma.core.memory import peak_memory; print(peak_memory())"


def test_a_child_does_not_report_the_peak_of_its_parent() -> None:
    held = np.ones(1 << 26)  # 512 MB
    mine = peak_memory()
    assert mine > held.nbytes
    child = int(subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=True).stdout)
    assert 1 << 20 < child < mine - held.nbytes // 2


def test_it_counts_what_has_been_freed() -> None:
    code = f"import numpy; {READ}; held = numpy.ones(1 << 25); del held; {READ}"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    before, after = (int(one) for one in said)
    assert after > before + (1 << 27)  # most of 256 MB


@pytest.mark.parametrize("recipe", [None, "4bit", "8bit"])
def test_one_account_of_weights(tmp_path: Path, recipe: str | None) -> None:
    """What a folder's headers say to a backend is what inspect prints."""
    folder = tiny_checkpoint(tmp_path, dtype="bfloat16", hidden_size=64, intermediate_size=128)
    if recipe:
        folder = dgemma.convert(folder, tmp_path / "out", recipe, workers=0).path
    found = sizes.of_checkpoint(Checkpoint.open(folder))
    assert found == inspect_folder(folder).weights and (found.packed > 0) == (recipe is not None)


def test_one_account_of_the_cache(tmp_path: Path) -> None:
    config = Checkpoint.open(tiny_checkpoint(tmp_path)).config
    longest = max(layer.window or 0 for layer in config.layers)
    grows = memory.cache_growth(config, 2, slots=3, scratch=16)
    for tokens in (longest, 10 * longest):
        assert memory.cache_bytes(config, tokens, 2, slots=3, scratch=16) == grows.fixed + grows.per_token * tokens
    assert memory.cache_bytes(config, 1, 2) < grows.fixed
    even = memory.cache_bytes(config, 1, 2, bucket=lambda rows: rows + rows % 2)
    assert even == memory.cache_bytes(config, 2, 2)
