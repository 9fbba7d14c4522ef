"""What the fast torch backend promises beyond right answers: nothing copied, and nothing read that is not used. Its
answers are held to the law in test_ops, test_head and test_parity."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dgemma.backends.numpy import NumpyOps
from dgemma.backends.torch import experts as expert_ops
from dgemma.backends.torch import head as head_ops
from dgemma.backends.torch.inference import InferenceOps
from dgemma.backends.torch.primitives import TorchOps
from dgemma.checkpoints import weights
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.core import reference
from dgemma.core.parts import KV, Experts, Router, Span
from law import assert_close_f32, assert_low_precision
from tiny import tiny_checkpoint
from under_test import values


class Allocations(TorchDispatchMode):
    """Records the bytes of every tensor that an op returns in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs))
        known = {x.untyped_storage().data_ptr() for x in given if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.sizes.append(x.untyped_storage().nbytes())
        return out


# ---- Weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_of_the_right_width_stays_in_the_map(tmp_path: Path, dtype: Any) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, dtype=dtype))
    for name in weights.shapes(checkpoint.config):
        stored = checkpoint.tensor(name)
        packed = InferenceOps(dtype).pack(stored)
        assert packed.data_ptr() == np.asarray(stored).ctypes.data and tuple(packed.shape) == stored.shape, name


def test_a_weight_of_another_width_is_converted_once() -> None:
    stored = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    with Allocations() as made:
        packed = InferenceOps("bfloat16").pack(stored)
    assert packed.dtype == torch.bfloat16 and made.sizes == [5 * 7 * 2]


def test_a_read_only_map_is_taken_without_a_warning() -> None:
    stored = np.arange(6, dtype=np.float32)
    stored.flags.writeable = False
    assert InferenceOps().pack(stored).tolist() == stored.tolist()


# ---- Cache and attention ----------------------------------------------------------------------------------------


def span(*held: int, slots: list[int] | None = None, window: int | None = None, causal: bool = False) -> Span:
    where = None if slots is None else torch.tensor(slots, dtype=torch.int32)
    return Span(held=torch.tensor(held, dtype=torch.int32), slots=where, window=window, causal=causal)


def cache(slots: int, kv_heads: int, entries: int, width: int) -> KV:
    return KV(*(torch.zeros(slots, kv_heads, entries, width) for _ in range(2)))


@pytest.mark.parametrize("window", [None, 2000])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("slots", [None, [4, 1], [2, 3]])
def test_attention_copies_no_context(slots: list[int] | None, heads: int, window: int | None) -> None:
    """What a pass allocates is the same behind 16 and behind 2000 entries, in whatever slots."""
    ops = InferenceOps()

    def allocated(entries: int) -> int:
        context = cache(2 if slots is None else 5, 2, entries + 16, 8)
        q, k = torch.randn(2, heads, 16, 8), torch.randn(2, 2, 16, 8)
        with Allocations() as made:
            ops.attention(q, k, k, context, span(entries, entries, slots=slots, window=window))
        return sum(made.sizes)

    assert allocated(1999) == allocated(16)


@pytest.mark.parametrize("slots", [None, [2]])
def test_cache_writes_in_place_and_keeps_the_newest_entries_in_front(slots: list[int] | None) -> None:
    ops, window, chunk, held = InferenceOps(), 6, 4, 0
    slot = slots[0] if slots else 0
    context = cache(slot + 1, 1, window - 1 + chunk, 2)
    places = [x.data_ptr() for x in context]
    for start in range(0, 12, chunk):
        k = torch.arange(start, start + chunk).float()[None, None, :, None].expand(1, 1, chunk, 2)
        context = ops.cache_write(context, k, -k, span(held, slots=slots, window=window, causal=True), chunk)
        held = min(held + chunk, window - 1)
        want = list(range(start + chunk))[-held:]
        assert context.keys[slot, 0, :held, 0].tolist() == want
        assert (-context.values[slot, 0, :held, 1]).tolist() == want
    assert [x.data_ptr() for x in context] == places


def test_a_span_longer_than_the_window_is_cut_to_it() -> None:
    """The cache may hold more than the window shows; then only the view is shorter."""
    q, k = np.random.default_rng(0).standard_normal((2, 1, 2, 3, 8))
    past = np.random.default_rng(1).standard_normal((2, 1, 2, 9, 8))
    fast, exact = InferenceOps(), NumpyOps("float64")
    context = cache(1, 2, 12, 8)
    for empty, entries in zip(context, past, strict=True):
        empty[:, :, :9] = torch.from_numpy(entries)
    got = fast.attention(*(fast.asarray(x, "float32") for x in (q, k, k)), context, span(9, window=5))
    where = Span(held=np.array([9]), slots=None, window=5, causal=False)
    assert_close_f32(fast.to_numpy(got), exact.attention(q, k, k, KV(*past), where))


# ---- Experts ----------------------------------------------------------------------------------------------------


def test_only_the_experts_that_are_hit_are_read() -> None:
    up, down = torch.randn(5, 8, 6), torch.randn(5, 6, 4)
    up[[0, 3]], down[[0, 3]] = torch.nan, torch.nan
    index = torch.tensor([[1, 2], [4, 1], [2, 4]])
    out = expert_ops.expert_mlp(torch.randn(3, 6), index, torch.rand(3, 2), up, down)
    assert out.isfinite().all()


@pytest.mark.parametrize("padding", [0.0, 1e9], ids=["one by one", "together"])
def test_experts_in_low_precision(padding: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of running them, with rows spread unevenly."""
    monkeypatch.setattr(expert_ops, "_PADDING", padding)
    h, up, down = values(1, 1, 19, 6), values(2, 5, 8, 6), values(3, 5, 6, 4)
    proj = values(4, 5, 6)

    def run(ops: Any, route_by: np.ndarray) -> np.ndarray:
        packed = [
            ops.pack(x) for x in (proj, np.ones(6, np.float32), np.array([1, 2, 3, 0.5, 1], np.float32), up, down)
        ]
        router = Router(
            experts=5, experts_per_token=2, eps=1e-6, proj=packed[0], scale=packed[1], per_expert_scale=packed[2]
        )
        experts = Experts(gate_up_proj=packed[3], down_proj=packed[4])
        return ops.to_numpy(ops.moe(*(ops.asarray(x, ops.dtype) for x in (h, route_by)), router, experts))

    r = values(5, 1, 19, 6)
    got, rounded, exact = (run(ops, r) for ops in (InferenceOps("bfloat16"), NumpyOps("bfloat16"), NumpyOps("float64")))
    assert_low_precision(got, rounded, exact)


@pytest.mark.skipif(sys.platform != "linux", reason="where libgomp is, is asked of /proc")
def test_the_engines_thread_has_torchs_number_of_threads() -> None:
    """Which OpenMP keeps for each thread: a new one begins with every core."""
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"


THREADS = """
import ctypes
from pathlib import Path
import torch
import dgemma
torch.set_num_threads(3)
engine = dgemma.load("nano", backend="torch", device="cpu").engine
loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
openmp = ctypes.CDLL(next(path for path in loaded if "libgomp" in path))
print(engine.run("testing", openmp.omp_get_max_threads))
"""
"""In a process of its own: a model that another test has left keeps the thread of all."""


GENERATION = """
import sys
import dgemma
model = dgemma.load("nano", backend="torch", device="cpu")
model.generate(".3.1\\n.2..\\n....\\n...4", max_new_tokens=16, steps=1)
print(sorted({"torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor"} & set(sys.modules)))
"""


def test_a_generation_does_not_import_the_compiler() -> None:
    """It takes seconds, longer than the answer, and nothing here compiles."""
    done = subprocess.run([sys.executable, "-c", GENERATION], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- Head -------------------------------------------------------------------------------------------------------

VOCABS = {
    "one tile": head_ops.TILE, "one short tile": 700, "tiles and a rest": 2 * head_ops.TILE + 301,
    "the last block has one token": head_ops.TILE + 1,
}  # fmt: skip


def _question(vocab: int) -> tuple[np.ndarray, ...]:
    draw = np.random.default_rng(vocab)
    x, table = draw.standard_normal((2, 33, 24)), draw.standard_normal((vocab, 24)) * 0.3
    return x, table, np.array([[0.4], [0.8]]), draw.integers(0, 1 << 24, (2, 33)) * 2.0**-24


def _head(ops: Any, x: np.ndarray, table: np.ndarray, heat: np.ndarray, u: np.ndarray) -> list[np.ndarray]:
    out = ops.vocab_head(
        ops.asarray(x, ops.dtype), ops.asarray(table, ops.dtype), 30.0, ops.asarray(heat, ops.wide),
        ops.asarray(u.astype(np.float32)),
    )  # fmt: skip
    return [ops.to_numpy(one) for one in out]


@pytest.mark.parametrize("case", VOCABS)
def test_head_draws_what_the_default_body_draws(case: str) -> None:
    """Tokens are equal in float32, across the edges of tiles and blocks."""
    got, want = (_head(ops, *_question(VOCABS[case])) for ops in (InferenceOps(), TorchOps()))
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    assert_close_f32(got[2], want[2], "entropy")
    assert_close_f32(got[3], want[3], "soft embedding")


def test_head_in_bfloat16() -> None:
    question = _question(VOCABS["tiles and a rest"])
    got, rounded, exact = (
        _head(ops, *question) for ops in (InferenceOps("bfloat16"), NumpyOps("bfloat16"), NumpyOps("float64"))
    )
    for i in (2, 3):
        assert_low_precision(got[i], rounded[i], exact[i])


def test_head_takes_the_first_of_equal_scores() -> None:
    table = np.zeros((2 * head_ops.TILE, 8))
    table[[700, 900, head_ops.TILE + 5]] = 1.0
    argmax = _head(InferenceOps(), np.ones((1, 2, 8)), table, np.ones((1, 1)), np.zeros((1, 2)))[1]
    assert argmax.tolist() == [[700, 700]]


def test_head_keeps_one_buffer_and_gives_none_of_it_away() -> None:
    ops, vocab = InferenceOps(), 4 * head_ops.TILE
    x, table, heat, u = _question(vocab)
    first = _head(ops, x, table, heat, u)
    kept = [one.copy() for one in first]
    with Allocations() as made:
        second = _head(ops, -x, table, heat, u)
    assert max(made.sizes) < 4 * x.shape[0] * x.shape[1] * vocab / 2
    assert not np.array_equal(first[3], second[3])
    for one, copy in zip(first, kept, strict=True):
        np.testing.assert_array_equal(one, copy)
    for one, again in zip(_head(ops, x[:1, :5], table, heat[:1], u[:1, :5]), kept, strict=True):
        assert_close_f32(one, again[:1, :5])


def test_head_of_a_large_batch_takes_no_more_memory() -> None:
    """Rows in pieces: each one's results are those that it has in a batch of few."""
    ops, vocab, batch = InferenceOps(), 700, 5
    draw = np.random.default_rng(0)
    x, table = draw.standard_normal((batch, 256, 8)), draw.standard_normal((vocab, 8)) * 0.3
    temperature, u = np.linspace(0.4, 0.9, batch)[:, None], draw.random((batch, 256))
    with Allocations() as made:
        whole = _head(ops, x, table, temperature, u)
    assert max(made.sizes) <= 4 * head_ops.ROWS * 1024, "a vocabulary of 700 is two blocks of 512"
    for row in range(batch):
        one = slice(row, row + 1)
        alone = _head(InferenceOps(), x[one], table, temperature[one], u[one])
        for got, want in zip(whole[:2], alone[:2], strict=True):
            np.testing.assert_array_equal(got[one], want)
        for got, want in zip(whole[2:], alone[2:], strict=True):
            assert_close_f32(got[one], want)


def test_reference_draw_is_what_the_head_follows() -> None:
    """The head repeats `reference.draw`'s constants; this fails if they part."""
    assert head_ops.TILE % reference.DRAW_BLOCK == 0
