"""The host's side of CUDA, on a card that is not there (`fake_card.py`): what only a card would refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dgemma.backends.cuda.graph import CudaCapture, Graphs
from dgemma.backends.cuda.ops import CudaOps
from dgemma.backends.torch.experts import _grouped_fits
from dgemma.backends.torch.packed import QuantizedTensor
from dgemma.checkpoints.quant import Format
from dgemma.core.config import GenerationConfig, ModelConfig, SamplerConfig
from dgemma.core.engine import Engine, Request
from dgemma.core.events import Done, Draft
from dgemma.runtime import DiffusionGemma
from dgemma.tools import bench
from fake_card import Card, Refused, fake_card

PROMPT, CANVASES, STEPS = 1500, 3, 2


@pytest.fixture
def card() -> Iterator[Card]:
    with fake_card() as card:
        yield card


class FakeOps(CudaOps):
    """`CudaOps`, but that there is nothing to read on the host: what has arrived there is zeros."""

    def to_numpy(self, x: torch.Tensor) -> np.ndarray:
        assert x.device.type == "cpu", "read from the card itself, and not from what was copied behind the pass"
        kind = {torch.bool: np.bool_, torch.int32: np.int32}.get(x.dtype, np.float32)
        return np.zeros(tuple(x.shape), kind)


def make_ops(device: str = "cuda", *, captured: bool = True, **options: Any) -> FakeOps:
    capture = CudaCapture(torch.device(device)) if captured else None
    return FakeOps("bfloat16", device, capture=capture, **options)


def weight(device: str) -> Callable[[tuple[int, ...], Format | None, int], torch.Tensor | QuantizedTensor]:
    def make(shape: tuple[int, ...], kind: Format | None, seed: int) -> torch.Tensor | QuantizedTensor:
        def empty(last: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((*shape[:-1], last), dtype=dtype, device=device)

        if kind is None:
            return empty(shape[-1], torch.bfloat16)
        scales = empty(shape[-1] // kind.group_size, torch.bfloat16 if kind.mode == "affine" else torch.uint8)
        biases = None if kind.mode != "affine" or kind.symmetric else scales.clone()
        words = empty(shape[-1] * kind.bits // 32, torch.int32)
        return QuantizedTensor(words=words, scales=scales, biases=biases, global_scale=None, format=kind)

    return make


def shallow() -> ModelConfig:
    """The 26B, with one layer of each six: five sliding ones and a full one."""
    config = bench.config_of("26b")
    return replace(config, layers=config.layers[:6])


def engine(ops: FakeOps, recipe: str = "4bit") -> Engine:
    return Engine(ops, bench.random_model(ops, shallow(), recipe, weight(str(ops.device))), None)


def generate(engine: Engine, prompt: int = PROMPT) -> list[Any]:
    return list(passes(engine, prompt))


def passes(engine: Engine, prompt: int = PROMPT) -> Iterator[Any]:
    config = engine.model.config
    request = Request(
        prompt=(7,) * prompt, max_new_tokens=CANVASES * config.canvas_length, seed=0, eos_token_ids=(),
        sampler=SamplerConfig(steps=STEPS, schedule_steps=STEPS, confidence=0.0),
    )  # fmt: skip
    return engine.generate(request)


@pytest.mark.parametrize("recipe", ["4bit", "8bit", "bf16", "nvfp4", "4bit-mlx"])
def test_a_generation_waits_for_nothing_and_captures_what_a_card_captures(card: Card, recipe: str) -> None:
    one = engine(make_ops(), recipe)
    assert one.ops.lookahead == 1
    events = generate(one)
    assert sum(isinstance(event, Draft) for event in events) == STEPS * CANVASES
    assert card.captures == 3, "the pass, and reading 1,024 and 256 tokens"
    card.steady, card.waits, captured = True, 0, card.captures
    card.launches.clear()
    stats = next(event.stats for event in generate(one, PROMPT - 7) if isinstance(event, Done))
    assert (card.captures, card.waits) == (captured, 0)
    assert not card.launches, "every pass is a replay"
    assert card.replays > stats.steps


def test_the_plain_loop_waits_for_nothing_but_its_drafts(card: Card) -> None:
    one = engine(make_ops(captured=False))
    generate(one)
    card.steady = True
    card.launches.clear()
    assert generate(one) and card.captures == 0 and card.launches["_attend"] > 0


@pytest.mark.parametrize("batch", [1, 4])
def test_the_benchmark_captures_what_a_card_captures(card: Card, batch: int) -> None:
    ops = make_ops()
    model = bench.random_model(ops, shallow(), "4bit", weight("cuda"))
    result = bench.measure(ops, model, bench.Plan(steps=2, context=1024, canvases=1, batch=batch))
    assert result.tokens_per_second > 0 and card.captures >= 3


def test_the_dense_part_beside_the_experts(card: Card) -> None:
    generate(engine(make_ops(beside=True)))


def test_a_second_card_is_launched_on_whatever_is_current(card: Card) -> None:
    """Another model has been loaded since, or another thread asks: current cards are a thread's own."""
    one = engine(make_ops("cuda:1"))
    assert card.current == 1
    card.set_device(0)
    generate(one)
    assert card.captures == 3 and card.current == 0
    one.ops.to_numpy = lambda x: np.zeros(tuple(x.shape), np.float32)
    model = DiffusionGemma(one, GenerationConfig(), Path())
    assert model.logits(range(5), range(5)).shape == (5, one.model.config.vocab_size)


def test_two_cards_take_turns(card: Card) -> None:
    requests = [iter(passes(engine(make_ops(f"cuda:{i}")))) for i in range(2)]
    for events in zip(*requests, strict=True):
        assert type(events[0]) is type(events[1])
    assert card.captures == 6


def test_cards_without_a_grouped_product_run_experts_one_by_one() -> None:
    for capability, fits in (((7, 5), False), ((8, 0), True)):
        with fake_card(capability):
            x, gate_up, down = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in
                                ((4, 16), (2, 16, 16), (2, 16, 8)))  # fmt: skip
            assert _grouped_fits(x, gate_up, down) == fits


# ---- Capturing --------------------------------------------------------------------------------------------------


def captured(capture: CudaCapture) -> Callable[[], None]:
    return capture(lambda: None)


def test_a_pool_is_new_once_nobody_holds_the_old_one(card: Card) -> None:
    """torch takes no pool again that every graph has left and that something, such as a workspace, still lies in."""
    capture = CudaCapture(torch.device("cuda:1"))
    graphs = [captured(capture) for _ in range(2)]
    assert len(card.held) == 1
    del graphs[0]
    graphs.append(captured(capture))
    assert len(card.held) == 1, "one of the two is still there"
    graphs.clear()
    captured(capture)
    assert len(card.held) == 2 and card.current == 0


@pytest.mark.parametrize("ends", [True, False])
def test_a_failed_capture_says_what_failed_and_leaves_nothing_behind(card: Card, ends: bool) -> None:
    def fail() -> None:
        raise ZeroDivisionError("the cause")

    capture = CudaCapture(torch.device("cuda"))
    kept, stream = captured(capture), card.stream
    card.fails_to_end = not ends
    with pytest.raises(ZeroDivisionError, match="the cause"):
        capture(fail)
    card.fails_to_end = False
    assert card.stream is stream
    captured(capture)
    assert len(card.held) == 2, "the pool that may still be recorded to is left alone"
    kept()


# ---- What is refused here is what the tests above would find ----------------------------------------------------


BROKEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "a number made on the host": lambda x: x * torch.tensor([2.0], device=x.device),
    "a value read": lambda x: x * float(x.sum()),
    "a mask": lambda x: x[x > 0],
    "a tensor on the host": lambda x: x + torch.ones(3),
    "a copy to the host": lambda x: x.cpu(),
    "a random number": lambda x: x + torch.randn(3, device=x.device),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_cannot_be_captured_is_refused(card: Card, broken: str) -> None:
    run = Graphs(lambda x: (BROKEN[broken](x), x)[1], CudaCapture(torch.device("cuda")), torch.device("cuda:0"))
    with pytest.raises((Refused, RuntimeError)):
        run(torch.empty(3, device="cuda"))
    assert not card.captures
