"""Settings of the whole suite, and the backends that the ladder is climbed with."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile

# MLX on a GPU with tensor cores multiplies float32 in TF32 by default, which no parity test survives. It reads this
# once, when it is first imported.
os.environ["MLX_ENABLE_TF32"] = "0"
# Matrices here are too small for two threads, which only wait for each other: on a busy machine, 50 times as long. The
# programs that tests start are held to the same, since a test runs on every core.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

import chromium
from dgemma.core.ops import Ops
from under_test import BACKENDS, LOW_PRECISION_BACKENDS, make_ops

torch.set_num_threads(1)
# What is compiled of constraints is kept between runs of the program, and must not be between those of its tests. What
# tests themselves keep stays where it is, for the workers of this run too, which begin with its environment.
os.environ["DGEMMA_TESTS_CACHE"] = str(chromium.CACHE)
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="dgemma-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# What torch's compiler keeps from other runs may have been made of other sources, or for another processor's limits.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="dgemma-tests-")
atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
# A shell's background jobs ignore interrupts, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The parent is hypothesis's own default, which derandomises where it sees CI. Arrays are drawn from a seed, so that an
# example is cheap to generate and shrinks by its shape.
settings.register_profile(
    "dgemma", deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("dgemma")


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    """Every backend, in float32."""
    return make_ops(request.param, "float32")


@pytest.fixture(params=LOW_PRECISION_BACKENDS)
def ops_bf16(request: pytest.FixtureRequest) -> Ops:
    """Every backend that runs bfloat16 on this machine's CPU."""
    return make_ops(request.param, "bfloat16")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel's test runs: the CPU, in Triton's interpreter, or with `-m gpu` the first card."""
    return request.param


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Chromium's executable."""
    return chromium.find(tmp_path_factory.mktemp("npm"))
