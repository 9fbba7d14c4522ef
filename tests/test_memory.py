"""The peak of this process, and of nobody else."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from dgemma.core.memory import peak_memory

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
