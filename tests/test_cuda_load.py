"""Weights on their way to a card, and models that do not fit: refused with the numbers, before or in the middle."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from dgemma import DgemmaError
from dgemma.backends.cuda import card as card_module
from dgemma.backends.cuda import load as load_module
from dgemma.backends.cuda.card import CardOps
from dgemma.backends.cuda.graph import rerun
from dgemma.backends.cuda.load import Room, Stager, refusal, releasing, room
from dgemma.backends.torch.blocks import whole
from dgemma.backends.torch.packed import QuantizedTensor
from dgemma.checkpoints import weights
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.checkpoints.quant import Format, dequantize, quantize
from dgemma.core.engine import Engine
from dgemma.core.model import new_cache
from dgemma.tools.bench import config_of
from dgemma.tools.inspect import cache_size
from tiny import tiny_checkpoint

CPU = torch.device("cpu")
GB = 10**9

# ---- Copying ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 4096, 4097, 5 << 20])
def test_every_byte_arrives(count: int, threads: int) -> None:
    """Less than a chunk, more chunks than lanes, and parts for several threads."""
    stager = Stager(CPU, chunk=4096 if count < 1 << 20 else 3 << 20, lanes=2, threads=threads)
    source = np.random.default_rng(count).integers(0, 255, count, np.uint8)
    sent = [stager.send(source, torch.uint8), stager.send(source[::-1], torch.uint8)]
    stager.close()
    np.testing.assert_array_equal(sent[0].numpy(), source)
    np.testing.assert_array_equal(sent[1].numpy(), source[::-1])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_staged_weight_is_the_packed_one(dtype: Any) -> None:
    stored = np.random.default_rng(0).standard_normal((3, 5)).astype(getattr(ml_dtypes, dtype, None) or dtype)
    ops = CardOps("bfloat16", "cpu")
    assert torch.equal(ops.staged(stored), ops.pack(stored))


@pytest.mark.parametrize("mode", ["affine", "symmetric", "nvfp4", "mxfp8"])
def test_a_staged_quantized_weight_keeps_its_bytes(mode: str) -> None:
    kinds = {
        "affine": Format(group_size=32), "symmetric": Format(symmetric=True),
        "nvfp4": Format(mode="nvfp4", group_size=16), "mxfp8": Format(mode="mxfp8", bits=8),
    }  # fmt: skip
    w = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    q = quantize(w, kinds[mode], global_scale=0.01 if mode == "nvfp4" else None)
    staged = CardOps("bfloat16", "cpu").staged(q)
    assert isinstance(staged, QuantizedTensor) and staged.format == q.format
    np.testing.assert_array_equal(whole(staged, torch.float32).numpy(), dequantize(q))


class Late(torch.Tensor):
    """A target whose copies are made when somebody waits for the stream that they were given to."""

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        assert non_blocking and Late.stream is not None
        Late.stream.pending.append(lambda: torch.Tensor.copy_(self, source))
        return self

    def record_stream(self, stream: LateStream) -> None:
        pass

    stream: LateStream | None = None


class LateStream:
    """A stream that does nothing until it has to; waiting for another stream is not the host's waiting."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.pending: list[Any] = []

    def wait_stream(self, other: LateStream) -> None:
        self.pending.append(other.run)

    def run(self) -> None:
        while self.pending:
            self.pending.pop(0)()

    def __enter__(self) -> None:
        Late.stream = self

    def __exit__(self, *_: object) -> None:
        Late.stream = None


class LateEvent:
    def __init__(self) -> None:
        self._todo: list[Any] = []

    def record(self, stream: LateStream) -> None:
        self._todo = [stream]

    def synchronize(self) -> None:
        for stream in self._todo:
            stream.run()


def test_a_buffer_is_filled_again_only_when_it_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that run as late as they may: when the host waits for them, or not before the end."""
    main = LateStream()

    def empty(*shape: Any, dtype: torch.dtype, device: Any = None, pin_memory: bool = False) -> torch.Tensor:
        assert pin_memory or device is not None
        made = torch.zeros(*shape, dtype=dtype)
        return made if pin_memory else made.as_subclass(Late)

    cuda = SimpleNamespace(
        Stream=LateStream, Event=LateEvent, stream=lambda stream: stream, current_stream=lambda device: main
    )  # fmt: skip
    names = SimpleNamespace(cuda=cuda, empty=empty, uint8=torch.uint8)
    monkeypatch.setattr(load_module, "torch", names)
    stager = Stager(torch.device("cuda:0"), chunk=64, lanes=3, threads=1)
    sources = [np.random.default_rng(i).integers(0, 255, 64 * i + 17, np.uint8) for i in range(9)]
    sent = [stager.send(source, torch.uint8) for source in sources]
    assert any((x.numpy() != source).any() for x, source in zip(sent, sources, strict=True)), "nothing was late"
    stager.close()
    for x, source in zip(sent, sources, strict=True):
        np.testing.assert_array_equal(x.numpy(), source)


def test_the_ring_is_given_back_after_loading() -> None:
    ops = CardOps("float32", "cpu")
    with ops.guarded("loading"):
        ops.staged(np.ones(3, np.float32))
        assert ops._stager is not None
    assert ops._stager is None


@pytest.mark.gpu
@pytest.mark.parametrize("count", [3, (70 << 20) + 5])
def test_every_byte_arrives_on_the_card(count: int) -> None:
    """Of memory that begins anywhere, in fewer and in more pieces than the ring has."""
    stored = np.random.default_rng(count).integers(0, 255, count + 1, np.uint8)[1:]
    ops = CardOps("bfloat16", "cuda")
    with ops.guarded("loading"):
        sent = [ops._send(stored), ops._send(stored[: count // 2])]
        for x, source in zip(sent, (stored, stored[: count // 2]), strict=True):
            np.testing.assert_array_equal(x.cpu().numpy(), source)


# ---- Room -------------------------------------------------------------------------------------------------------


def test_the_cache_is_counted_as_the_model_reserves_it() -> None:
    config = config_of("26b")
    want = cache_size(config, "bfloat16")
    found = room(config, 15 * GB, width=2, free=0, total=0, chunk=512)
    assert (found.cache_per_token, found.fixed_cache) == (want.per_token, want.fixed)
    twice = room(config, 15 * GB, width=2, free=0, total=0, chunk=512, batch=2)
    assert twice.fixed_cache == 2 * want.fixed and twice.weights == found.weights


@pytest.mark.parametrize("context", [1, 1024, 1025, 5000])
def test_the_cache_is_counted_as_captured_passes_round_it(context: int) -> None:
    """Behind at least a window's tokens; a shorter context takes less."""
    config = config_of("nano-like")
    ops = CardOps("bfloat16", "cpu", capture=rerun)
    held = new_cache(ops, config, batch=1, capacity=max(context, 63), chunk=1024)
    found = room(config, 0, width=2, free=0, total=0, chunk=1024, buckets=True)
    assert found.cache(context) == sum(x.nbytes for layer in held.layers for x in layer)


@pytest.mark.parametrize("free", [18, 18.3, 19, 21, 30])
def test_the_context_that_is_said_to_fit_does(free: float) -> None:
    found = room(config_of("26b"), 15_420_000_000, width=2, free=int(free * GB), total=80 * GB, buckets=True)
    most = found.largest_context
    assert most > 0 and refusal(found, most, "cuda:0") is None
    assert most == found.most_tokens or refusal(found, most + 1, "cuda:0") is not None


def test_the_4bit_model_needs_less_than_18_gb() -> None:
    """What the recipe is for: with 4,096 tokens of context."""
    found = room(config_of("26b"), 15_420_000_000, width=2, free=24 * GB, total=24 * GB)
    assert 15.4 * GB < found.needed(4096) < 18 * GB
    assert refusal(found, 4096, "cuda:0") is None


def _room(**changes: Any) -> Room:
    sizes = dict(
        weights=15 * GB, fixed_cache=GB, cache_per_token=10**6, working=2 * GB, free=20 * GB, total=24 * GB,
        most_tokens=10**6,
    )  # fmt: skip
    return Room(**(sizes | changes))


def test_a_context_that_does_not_fit_is_refused_with_what_would() -> None:
    assert _room().largest_context == 2000 and refusal(_room(), 2000, "cuda:0") is None
    why = refusal(_room(), 2001, "cuda:1")
    assert why is not None and "\n" not in why
    for part in ("cuda:1 has 20.00 GB of 24.00 GB free", "15.00 GB of weights", "2,001 tokens", "a context of 2,000"):
        assert part in why
    assert _room(most_tokens=500).largest_context == 500


def test_weights_that_do_not_fit_are_refused_with_what_would() -> None:
    why = refusal(_room(free=10 * GB), 1, "cuda:0")
    assert why is not None and "weights of at most 7.00 GB would fit" in why and "--recipe 4bit" in why


def test_a_model_is_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = CardOps("bfloat16", "cuda:0")
    monkeypatch.setattr(card_module, "free_memory", lambda device: (8 * GB, 12 * GB))
    with pytest.raises(DgemmaError, match=re.escape("does not fit: cuda:0 has 8.00 GB of 12.00 GB free")):
        ops.admit(config_of("26b"), lambda: 15 * GB)
    ops.admit(config_of("nano-like"), lambda: 10**7)


def test_the_cpu_counts_nothing() -> None:
    CardOps("bfloat16", "cpu").admit(config_of("26b"), lambda: pytest.fail("not asked for"))


# ---- Out of memory ----------------------------------------------------------------------------------------------


def test_running_out_gives_everything_back_and_says_so_in_a_line() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has none.")

    with (
        pytest.raises(DgemmaError, match=r"^cpu ran .* while reading: 2.00 GiB .*; take less$") as caught,
        releasing(CPU, "reading", "take less"),
    ):
        work()
    assert held[0]() is None, "the failed frames still hold what they had allocated"
    assert "\n" not in str(caught.value)


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), releasing(CPU, "reading", "take less"):
        raise ZeroDivisionError


@pytest.mark.parametrize("fails_at", ["pack", "new_cache"])
def test_loading_and_generating_are_guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path))
    ops = CardOps("float32", "cpu")
    if fails_at == "pack":
        import dgemma
        from dgemma import backends

        monkeypatch.setattr(CardOps, "pack", fail)
        monkeypatch.setattr(backends, "make", lambda *_, **__: ops)
        with pytest.raises(DgemmaError, match="ran out of memory while loading the weights"):
            dgemma.load(tmp_path / "tiny")
        return
    engine = Engine(ops, weights.build(ops, checkpoint.config, checkpoint.tensor), None)
    monkeypatch.setattr(CardOps, "new_cache", fail)
    from dgemma.core.config import SamplerConfig
    from dgemma.core.engine import Request

    request = Request(prompt=(5,), max_new_tokens=3, seed=0, eos_token_ids=(), sampler=SamplerConfig(steps=1))
    with pytest.raises(DgemmaError, match=r"ran out of memory while generating.*a shorter context"):
        list(engine.generate(request))
