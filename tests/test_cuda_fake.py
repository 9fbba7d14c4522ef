"""The host's side of CUDA, on a card that is not there (`fake_card.py`): what only a card would refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from dgemma import DgemmaError
from dgemma.backends.cuda import passes as passes_module
from dgemma.backends.cuda.graph import CapturedFunction, CudaCapture
from dgemma.backends.cuda.ops import CudaOps
from dgemma.backends.cuda.passes import CardPasses
from dgemma.backends.torch.experts import _grouped_fits
from dgemma.backends.torch.packed import QuantizedTensor
from dgemma.checkpoints.quant import Format
from dgemma.core.canvas import Chosen, Classes
from dgemma.core.config import ModelConfig, SamplerConfig
from dgemma.core.engine import Engine
from dgemma.core.events import Done, Draft
from dgemma.core.parts import Masses
from dgemma.core.row import Request
from dgemma.tools import bench
from fake_card import Card, Refused, fake_card
from test_cuda_ops import random_model

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


def engine(
    recipe: str = "4bit", *, device: str = "cuda", captured: bool = True, joined: bool = False, beside: bool = False
) -> Engine:
    ops = FakeOps("bfloat16", device, beside=beside)
    model = random_model(ops, shallow(), recipe, weight(str(ops.device)))
    capture = CudaCapture(ops.device) if captured else None
    return Engine(CardPasses(ops, model, capture=capture, joined=joined), None, prefix_bytes=0)


def request(prompt: int = PROMPT, **changed: Any) -> Request:
    sampler = SamplerConfig(steps=STEPS, schedule_steps=STEPS, confidence=0.0)
    given = dict(prompt=(7,) * prompt, max_new_tokens=CANVASES * 256, seed=0, eos_token_ids=(), sampler=sampler)
    return Request(**{**given, **changed})


def generate(engine: Engine, *requests: Request) -> list[list[Any]]:
    """In this thread, where the card is; each request's events."""
    handles = [engine.add(one) for one in requests or (request(),)]
    home = engine.passes.home
    with home(), engine.passes.guarded("generating"):
        while engine._round():
            pass
    return [list(iter(handle.next, None)) for handle in handles]


@pytest.mark.parametrize("recipe", ["4bit", "8bit", "bf16", "nvfp4", "4bit-mlx"])
def test_a_generation_waits_for_nothing_and_captures_what_a_card_captures(card: Card, recipe: str) -> None:
    one = engine(recipe)
    assert one.passes.lookahead == 1
    (events,) = generate(one)
    assert sum(isinstance(event, Draft) for event in events) == STEPS * CANVASES
    assert card.captures == 3, "the pass, and reading 1,024 and 256 tokens"
    card.steady, card.waits, captured = True, 0, card.captures
    card.launches.clear()
    (events,) = generate(one, request(PROMPT - 7))
    stats = next(event.stats for event in events if isinstance(event, Done))
    assert (card.captures, card.waits) == (captured, 0)
    assert not card.launches, "every pass is a replay"
    assert card.replays > stats.steps


def test_rows_that_join_and_leave_are_replays(card: Card) -> None:
    """Of three, with settings of their own: batches of four with a row that fills up, of two and of one."""
    one = engine()
    settings = [SamplerConfig(steps=2 + i, schedule_steps=4, confidence=0.01 * i, stability=i) for i in range(3)]

    def several(first: int) -> list[Request]:
        return [request(first + i, sampler=one, seed=first + i, max_new_tokens=512) for i, one in enumerate(settings)]

    generate(one, *several(900))
    captured = card.captures
    card.steady, card.waits = True, 0
    card.launches.clear()
    assert all(isinstance(events[-1], Done) for events in generate(one, *several(700)))
    assert (card.captures, card.waits) == (captured, 0) and not card.launches


def test_the_plain_loop_waits_for_nothing_but_its_drafts(card: Card) -> None:
    one = engine(captured=False)
    generate(one)
    card.steady = True
    card.launches.clear()
    assert generate(one) and card.captures == 0 and card.launches["_attend"] > 0


@pytest.mark.parametrize("batch", [1, 4])
def test_the_benchmark_captures_what_a_card_captures(card: Card, batch: int) -> None:
    one = engine()
    passes = one.passes
    assert isinstance(passes, CardPasses)

    class Here(Engine):
        """Runs in this thread, where the card is."""

        def run(self, doing: str, work: Callable[[], Any]) -> Any:
            return work()

        def wait_for(self, row: Any) -> Any:
            while row.events.empty():
                self._round()
            return row.events.get()

    with mock.patch.object(bench, "Engine", Here):
        result = bench.measure(passes, bench.Plan(steps=2, context=1024, canvases=1, batch=batch))
    assert result.tokens_per_second > 0 and card.captures >= 3


def test_the_dense_part_beside_the_experts(card: Card) -> None:
    generate(engine(beside=True))


def test_a_second_card_is_launched_on_whatever_is_current(card: Card) -> None:
    """Another model has been loaded since, or another thread asks: current cards are a thread's own."""
    one = engine(device="cuda:1")
    assert card.current == 1
    card.set_device(0)
    generate(one)
    assert card.captures == 3 and card.current == 0
    one.passes.ops.to_numpy = lambda x: np.zeros(tuple(x.shape), np.float32)
    with one.passes.home():
        slot = one.passes.open(5, 5)
        one.passes.read([(slot, np.arange(5, dtype=np.int32))])
        logits = one.passes.logits(slot, np.arange(5, dtype=np.int32))
    assert logits.shape == (5, one.passes.config.vocab_size) and card.current == 0


def test_two_cards_take_turns(card: Card) -> None:
    engines = [engine(device=f"cuda:{i}") for i in range(2)]
    handles = [one.add(request()) for one in engines]
    left = [True, True]
    while any(left):
        for i, one in enumerate(engines):
            with one.passes.home():
                left[i] = one._round()
    assert card.captures == 6 and all(isinstance(list(iter(one.next, None))[-1], Done) for one in handles)


def test_what_does_not_fit_is_refused_or_waits(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that never could is an error with the numbers; one that could alone waits for the others to end."""
    passes = engine().passes
    with passes.home():
        monkeypatch.setattr(passes_module, "free_memory", lambda device: (2 * 10**9, 80 * 10**9))
        assert passes.fits(4096, 256)
        assert not passes.fits(4096, 256, rows=64)
        with pytest.raises(DgemmaError, match=r"does not fit: cuda:0 has 2.00 GB of 80.00 GB free .* context of"):
            passes.fits(260_000, 256)
        slot = passes.open(4096, 256)
        held = passes._held()
        monkeypatch.setattr(passes_module, "free_memory", lambda device: (2 * 10**9 - held, 80 * 10**9))
        assert passes.fits(4096, 256) and not passes.fits(4096, 256, rows=64)
        passes.close(slot)
    assert passes.peak() == 1 << 34 and passes.spare() <= 2 * 10**9


def test_cards_without_a_grouped_product_run_experts_one_by_one() -> None:
    for capability, fits in (((7, 5), False), ((8, 0), True)):
        with fake_card(capability):
            x, gate_up, down = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in
                                ((4, 16), (2, 16, 16), (2, 16, 8)))  # fmt: skip
            assert _grouped_fits(x, gate_up, down) == fits


# ---- Held tokens, and passes in a language ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """A language of one string, whatever a pass says; `open` of its positions have their class looked into."""

    classes: Classes
    open: int = 0
    mixed: bool = False
    feedback: float = 0.0
    log_accept: float = -1.0

    def begin(self, **_: Any) -> Fixed:
        return self

    def choose(self, masses: Masses, *, held: np.ndarray, **_: Any) -> Chosen:
        length, count = masses.mass.shape
        assert count == self.classes.count and masses.best.shape == (length, count)
        token, zeros = np.full(length, 7, np.int32), np.zeros(length, np.float32)
        label = token * 0
        factors = np.ones((length, count + 1), np.float32) if self.mixed else None
        argmax = token.copy()
        token[: self.open] = -1
        return Chosen(token=token, label=label, rest=zeros, argmax=argmax, entropy=zeros, factors=factors)

    def commit(self, argmax: np.ndarray) -> None:
        pass


def fixed(count: int = 150, **how: Any) -> Fixed:
    of = (np.arange(262144) % (count + 1) - 1).astype(np.int32)
    return Fixed(classes=Classes(of=of, count=count, key=str(count)), **how)


def test_passes_in_a_language_are_captured_up_to_their_choice(card: Card) -> None:
    """Alone, and beside rows with and without held tokens: the choice is the host's, one launch and copies follow."""
    one = engine()
    rows = [request(constraint=fixed()), request(1300, held=(7, -1) * 200), request(1200)]
    generate(one, rows[0])
    assert card.captures == 3, "the pass, and reading 1,024 and 256 tokens"
    generate(one, *rows)
    captured = card.captures
    card.steady, card.waits = True, 0
    card.launches.clear()
    (events,) = generate(one, request(PROMPT - 7, constraint=fixed()))
    assert sum(isinstance(event, Draft) for event in events) == STEPS * CANVASES
    assert (card.captures, card.waits, dict(card.launches)) == (captured, 0, {"_advance": STEPS * CANVASES})
    generate(one, *rows)
    assert (card.captures, card.waits) == (captured, 0) and set(card.launches) == {"_advance"}


@pytest.mark.parametrize("recipe, captured", [("4bit", True), ("bf16", False)])
def test_classes_are_looked_into_on_the_card(card: Card, recipe: str, captured: bool) -> None:
    """And what is fed back, where that is a mixture: the logits of some positions at a time, none of them copied."""
    one = engine(recipe, captured=captured)
    short = dict(canvas_length=64, max_new_tokens=64)
    rows = [
        request(20, constraint=fixed(9, open=40), **short),
        request(30, constraint=fixed(9, open=3, mixed=True), canvas_length=8, max_new_tokens=16),
    ]
    for events in generate(one, *rows):
        assert isinstance(events[-1], Done)


def test_a_read_copies_what_was_asked_for(card: Card) -> None:
    passes = engine().passes
    with passes.home():
        slots = [passes.open_behind((7,) * count, 16) for count in (20, 30, 25)]
        canvases = np.full((3, 16), 7, np.int32)
        scores = passes.scores(slots, canvases, [(0, 3), (2, 5)], np.array([5, 6, 7], np.int32))
    assert scores.log_p.shape == (2, 3)


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
    run = CapturedFunction(
        lambda x: (BROKEN[broken](x), x)[1], CudaCapture(torch.device("cuda")), torch.device("cuda:0")
    )
    with pytest.raises((Refused, RuntimeError)):
        run(torch.empty(3, device="cuda"))
    assert not card.captures
