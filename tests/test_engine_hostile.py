"""An engine that is asked badly: memory that runs out anywhere, interrupts, threads that come at once, spoilt rows."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma import DgemmaError, DiffusionGemma
from dgemma.core.config import ModelConfig
from dgemma.core.engine import Engine
from dgemma.core.graph_passes import GraphPasses
from dgemma.core.owner import Owner
from dgemma.core.parts import KV
from dgemma.core.row import Share
from fake_passes import CHUNK, FakePasses, alone, answer, finish, reads, request
from said import says
from tiny import tiny_checkpoint

FULL = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("hostile"), gain=0.4)


@pytest.fixture(scope="module")
def config(folder: Path) -> ModelConfig:
    return dgemma.load(folder, backend="numpy").config


def loaded(folder: Path, backend: str, **how: Any) -> tuple[DiffusionGemma, GraphPasses]:
    model = dgemma.load(folder, backend=backend, **how)
    assert isinstance(model.engine.passes, GraphPasses)
    return model, model.engine.passes


def failing(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, when: Callable[[int], bool]) -> None:
    """Let a method run out of memory at some of its calls, counted from 0."""
    works, calls = getattr(where, name), iter(range(1 << 30))

    def runs_out(*given: Any, **more: Any) -> Any:
        if when(next(calls)):
            raise RuntimeError(FULL) if getattr(where, "name", "") == "torch" else MemoryError
        return works(*given, **more)

    monkeypatch.setattr(where, name, runs_out)


def assert_empty(engine: Engine) -> None:
    engine.run("testing", int)
    passes = engine.passes
    assert isinstance(passes, GraphPasses)
    assert not engine.busy and not passes._lengths and not passes._asked and not passes._states


# ---- Memory that runs out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_a_pool_that_cannot_grow_keeps_what_is_in_it(
    folder: Path, backend: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row that asked for more fails; one in the middle of its canvases ends as if it were alone."""
    model, passes = loaded(folder, backend, prefix_bytes=0)
    options: dict[str, Any] = dict(steps=2, eos=())
    want = model.generate([5, 6, 7] * 9, 40, 3, **options).token_ids
    stream = model.stream([5, 6, 7] * 9, 40, 3, **options)
    other = model.stream([8, 9] * 40, 100, 4, **options)
    dropped = model.engine._waiting.pop()
    model.engine.step(), model.engine.step()
    model.engine._waiting.append(dropped)
    with monkeypatch.context() as patch:
        failing(patch, passes, "zeros", lambda call: call == at)
        model.engine.step()
    with says("out of memory while generating"):
        list(other)
    # A pool that grows after all, though by less than it was to.
    assert len(model.generate([8, 9] * 30, 20, 4, **options).token_ids) == 20
    tokens = [token for event in stream if isinstance(event, dgemma.Commit) for token in event.tokens]
    assert tuple(tokens) == want
    assert_empty(model.engine)
    assert_empty(model.engine)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("what", ["zeros", "read", "step", "save", "_load"])
def test_memory_that_runs_out_leaks_nothing_and_is_the_requests_own_error(
    folder: Path, backend: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever call it is, requests end with their tokens or one line, and no slot is left."""
    model, passes = loaded(folder, backend)
    prompts, options = [[5 + i] * 20 for i in range(4)], dict(steps=2, eos=())
    want = [model.generate(one, 30, **options).token_ids for one in prompts]  # type: ignore[arg-type]
    failed = 0
    for every in (2, 3, 5):
        model.engine.prefixes.clear() if what != "_load" else None
        with monkeypatch.context() as patch:
            failing(patch, passes, what, lambda call, every=every: call % every == 1)
            streams = [model.stream(one, 30, **options) for one in prompts]  # type: ignore[arg-type]
            for stream, tokens in zip(streams, want, strict=True):
                try:
                    made = [token for event in stream if isinstance(event, dgemma.Commit) for token in event.tokens]
                    assert tuple(made) == tokens
                except DgemmaError as error:
                    failed += 1
                    assert str(error).startswith("out of memory while generating")
        assert_empty(model.engine)
    assert failed == 0 if what == "save" else failed > 0, "a cache that is not kept is no loss"
    assert [model.generate(one, 30, **options).token_ids for one in prompts] == want  # type: ignore[arg-type]


def test_a_step_by_hand_that_fails_ends_its_rows(config: ModelConfig) -> None:
    class Broken(FakePasses):
        def step(self, *given: Any) -> Any:
            raise ValueError("a bug")

    engine = Engine(Broken(config), None)
    handle = engine.add(request(5))
    with pytest.raises(ValueError, match="a bug"):
        finish(engine)
    assert not engine.step() and not engine.busy
    with pytest.raises(ValueError, match="a bug"):
        answer(handle)


# ---- Spoilt rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_what_was_read_and_never_looked_at_spoils_nobody(folder: Path, backend: str) -> None:
    """A prompt's cache comes to NaN, and its row is cancelled before a pass says so: the slot's next row is sound."""
    model, passes = loaded(folder, backend, prefix_bytes=0)
    engine, wanted = model.engine, [request(4, 20, seed=seed, sampler={"steps": 2}) for seed in range(2)]
    want = [answer(engine.add(one)) for one in wanted]

    def read() -> None:
        engine._admit()
        engine._read_prompts()
        kept = passes.save(1)
        nan = tuple(KV(*(x * float("nan") for x in layer)) for layer in kept.data)
        passes._load(1, replace(kept, data=nan))

    staying, failing = engine.add(wanted[0]), engine.add(request(30, 20, seed=5))
    engine.run("testing", read)
    failing.cancel()
    engine.run("testing", engine._sweep)
    after = engine.add(wanted[1])
    engine.run("testing", engine._admit)
    assert engine._rows[-1].slot == 1, "beside a row that goes on, so that the pool is not given back"
    assert [answer(staying), answer(after)] == want
    assert_empty(engine)


# ---- Who shares a prompt ----------------------------------------------------------------------------------------


def test_samples_share_what_a_kept_prefix_leaves_to_read(config: ModelConfig) -> None:
    """A beginning is kept and the whole, being longer than the budget, is not: its rest is read once for all."""
    prompt, passes = request(3 * CHUNK).prompt, FakePasses(config, chunk=CHUNK)
    engine, share = Engine(passes, None, prefix_bytes=8 * 40), Share()
    answer(engine.add(request(prompt[:CHUNK], 5)))
    passes.log.clear()
    handles = [engine.add(request(prompt, 5, seed=i), share) for i in range(4)]
    finish(engine)
    assert [sum(one.values()) for one in reads(passes)] == [CHUNK] * 2
    assert [answer(one) for one in handles] == [alone(config, request(prompt, 5, seed=i)) for i in range(4)]


def test_nobody_waits_for_a_cache_that_is_too_large_to_be_kept(config: ModelConfig) -> None:
    passes = FakePasses(config, chunk=CHUNK)
    engine = Engine(passes, None, prefix_bytes=1)
    prompt = request(9 * CHUNK).prompt
    handles = [engine.add(request(prompt, seed=i)) for i in range(3)]
    for _ in range(6):
        engine.step()
    assert len(passes.held) == 3
    finish(engine)
    assert [answer(one) for one in handles] == [alone(config, request(prompt, seed=i)) for i in range(3)]


def test_canvases_that_shrink_are_read_with_the_next_by_their_own_length(config: ModelConfig) -> None:
    """Joined passes: two rows' next canvases are equally long, and those that they have finished are not."""
    engine = Engine(FakePasses(config, joined=True), None)
    asked = [request(5, 40, canvas_length=length, fit=True) for length in (32, 16)]
    handles = [engine.add(one) for one in asked]
    finish(engine)
    assert [answer(one) for one in handles] == [alone(config, one) for one in asked]


def test_a_leader_that_leaves_hands_the_prompt_on(config: ModelConfig) -> None:
    passes, share = FakePasses(config, chunk=CHUNK), Share()
    engine = Engine(passes, None, prefix_bytes=0)
    prompt = request(4 * CHUNK).prompt
    handles = [engine.add(request(prompt, 5, seed=i), share) for i in range(4)]
    for one in handles[:2]:
        engine.step()
        one.cancel()
    finish(engine)
    assert [answer(one) for one in handles[2:]] == [alone(config, request(prompt, 5, seed=i)) for i in (2, 3)]
    assert not passes.held


# ---- Threads and interrupts -------------------------------------------------------------------------------------


def test_threads_that_come_first_together_start_one_thread() -> None:
    for _ in range(200):
        owner, ready, found = Owner(nullcontext, anywhere=True), threading.Barrier(4), []

        def ask(owner: Any = owner, ready: Any = ready, found: Any = found) -> None:
            ready.wait()
            found.append(owner.run(threading.get_native_id))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(60)
        assert len(found) == 4 and len(set(found)) == 1


def test_an_interrupt_as_the_first_round_is_asked_for_leaves_nobody_waiting(config: ModelConfig) -> None:
    engine = Engine(FakePasses(config), None)
    post = engine._owner.post

    def interrupted(work: Any) -> bool:
        engine._owner.post = post  # type: ignore[method-assign]
        raise KeyboardInterrupt

    engine._owner.post = interrupted  # type: ignore[method-assign]
    handle = engine.add(request(5))
    with pytest.raises(KeyboardInterrupt):
        next(handle.events())
    got: list[Any] = []
    reader = threading.Thread(target=lambda: got.append(answer(handle)), daemon=True)
    reader.start()
    reader.join(60)
    assert got == [alone(config, request(5))]


def test_work_that_raises_in_the_engines_thread_leaves_it_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    owner = Owner(nullcontext, anywhere=True)

    def raising() -> None:
        raise ValueError("a bug")

    owner.post(raising)
    assert owner.run(int) == 0 and len(told) == 1


def test_events_are_read_within_work_of_the_engines_thread(config: ModelConfig) -> None:
    engine = Engine(FakePasses(config), None)
    got: list[Any] = []
    reader = threading.Thread(
        target=lambda: got.append(engine.run("testing", lambda: answer(engine.add(request(5))))), daemon=True
    )
    reader.start()
    reader.join(60)
    assert got == [alone(config, request(5))]
    assert answer(engine.add(request(5, seed=1))) == alone(config, request(5, seed=1))


def test_nothing_is_left_of_rows_that_come_and_go_in_many_threads(folder: Path) -> None:
    """Streams that end, are closed or dropped, steps by hand, logits between: tokens as alone, no slot, one thread."""
    model, passes = loaded(folder, "torch", rows=5, prefix_bytes=50_000)
    passes.chunk = 16
    asked = [([20 + i] * (3 + 11 * (i % 4)), 5 + 7 * i % 40, [None, 1, 7, 40, "fit"][i % 5]) for i in range(12)]
    options: dict[str, Any] = dict(steps=2, eos=())
    want = [model.generate(p, n, canvas_length=c, **options).token_ids for p, n, c in asked]
    before, got = set(threading.enumerate()), {}

    def work(first: int) -> None:
        draw = np.random.default_rng(first)
        for i in range(first, len(asked), 4):
            prompt, tokens, length = asked[i]
            going = model.stream(prompt, 60, 9, **options)
            for _ in range(draw.integers(5)):
                next(going)
            if i % 2:
                going.close()  # type: ignore[attr-defined]
            del going
            model.engine.step()
            model.logits(prompt, [30, 40])
            got[i] = model.generate(prompt, tokens, canvas_length=length, **options).token_ids

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert [got.get(i) for i in range(len(asked))] == want
    gc.collect()
    assert_empty(model.engine)
    assert set(threading.enumerate()) <= before
