"""Rows that share an engine: who comes in, in which order, who leaves, and what each gets whatever the others do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dgemma
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.core.config import ModelConfig
from dgemma.core.engine import Engine
from dgemma.core.errors import DgemmaError
from dgemma.core.events import Commit, Draft, Prefill
from dgemma.core.graph_passes import GraphPasses
from dgemma.core.handle import Handle
from dgemma.core.parts import KV
from dgemma.core.row import Share
from fake_passes import CHUNK, FakePasses, alone, answer, finish, reads, request
from said import says
from tiny import tiny_checkpoint
from under_test import BACKENDS, build, make_ops, passes_of

CANVAS = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path_factory.mktemp("rows"), max_position_embeddings=4096))


@pytest.fixture(scope="module")
def config(checkpoint: Checkpoint) -> ModelConfig:
    return checkpoint.config


def on(backend: str, checkpoint: Checkpoint, **how: Any) -> Engine:
    """An engine of its own on a backend, whose prompts may hold any token."""
    ops = make_ops(backend, "float32")
    config = replace(checkpoint.config, image_token_ids=())
    return Engine(passes_of(ops, build(ops, config, checkpoint.tensor)), None, **how)


def books(engine: Engine) -> GraphPasses:
    """The engine's passes, when what is running is over."""
    engine.run("testing", int)
    assert isinstance(engine.passes, GraphPasses)
    return engine.passes


def assert_nothing_is_left(engine: Engine) -> None:
    passes = books(engine)
    assert not engine.busy and not engine._pending
    assert not passes._lengths and not passes._asked and not passes._states and not passes._batch


# ---- Any order --------------------------------------------------------------------------------------------------

ROW = st.tuples(
    st.integers(1, 90),  # tokens of the prompt
    st.integers(1, 60),  # budget
    st.integers(0, 12),  # the round before which it comes
    st.one_of(st.none(), st.integers(0, 8)),  # rounds later it is cancelled
    st.sampled_from([None, 8, 24]),  # length of its canvases
)


@given(
    rows=st.lists(ROW, min_size=1, max_size=9), most=st.integers(1, 6), room=st.integers(1, 6),
    lookahead=st.integers(0, 1), joined=st.booleans(), budget=st.sampled_from([0, 500, 1 << 20]),
)  # fmt: skip
def test_rows_in_any_order_get_what_each_gets_alone(
    config: ModelConfig, rows: list[Any], most: int, room: int, lookahead: int, joined: bool, budget: int
) -> None:
    passes = FakePasses(config, room=room, chunk=CHUNK, lookahead=lookahead, joined=joined)
    engine = Engine(passes, None, most_rows=most, prefix_bytes=budget)
    handles: dict[int, Handle] = {}
    wanted = [request(p, n, seed=i % 4, canvas_length=length) for i, (p, n, _, _, length) in enumerate(rows)]
    for now in range(30):
        for i, (_, _, arrival, leaves, _) in enumerate(rows):
            if arrival == now:
                handles[i] = engine.add(wanted[i])
            if leaves is not None and arrival + leaves == now:
                handles[i].cancel()
        engine.step()
        assert len(passes.held) <= min(most, room)
    finish(engine)
    for i, (_, _, _, leaves, _) in enumerate(rows):
        if leaves is None:
            assert answer(handles[i]) == alone(config, wanted[i])
        else:
            assert answer(handles[i])[2] is None, "nothing follows a cancellation"
    assert not passes.held and not engine.busy and not engine._pending


def test_a_request_that_never_fits_is_refused_and_one_that_does_not_fit_now_waits(config: ModelConfig) -> None:
    passes = FakePasses(config, room=2)
    engine = Engine(passes, None)
    handles = [engine.add(request(5, seed=i)) for i in range(4)]
    large = engine.add(request(5, 1 << 22, canvas_length=1 << 21, seed=9))
    passes.fits = lambda tokens, canvas, rows=1: FakePasses.fits(passes, canvas, canvas, rows)  # type: ignore
    most = 0
    while engine.step():
        most = max(most, len(passes.held))
    assert most == 2
    assert [answer(one)[0] for one in handles] == [alone(config, request(5, seed=i))[0] for i in range(4)]
    with says("larger than the machine"):
        answer(large)


def test_at_most_so_many_rows(config: ModelConfig) -> None:
    passes = FakePasses(config)
    engine = Engine(passes, None, most_rows=3)
    handles = [engine.add(request(5, seed=i)) for i in range(7)]
    assert engine.busy == 7
    finish(engine)
    assert max(len(slots) for what, slots in passes.log if what == "step") == 3
    assert all(answer(one)[2] == "length" for one in handles)


# ---- Long prompts -----------------------------------------------------------------------------------------------


def test_a_long_prompt_holds_others_up_by_a_chunk_a_round(config: ModelConfig) -> None:
    """Between two passes over a canvas no more than a chunk is read, whoever comes."""
    passes = FakePasses(config, chunk=CHUNK)
    engine = Engine(passes, None)
    writing = engine.add(request(5, 200, seed=1, sampler={"steps": 30, "schedule_steps": 30}))
    engine.step()
    long = [engine.add(request(10 * CHUNK + 3, 5, seed=i)) for i in (2, 3)]
    finish(engine)
    read, most = 0, 0
    for what, value in passes.log:
        read = 0 if what == "step" else read + (sum(value.values()) if what == "read" else 0)
        most = max(most, read)
    assert CHUNK <= most <= CHUNK + CANVAS, "a chunk, and a canvas of its own that is finished"
    assert answer(writing)[2] == "length" and all(answer(one)[2] == "length" for one in long)


def test_a_short_prompt_waits_for_one_chunk_of_a_long_one(config: ModelConfig) -> None:
    passes = FakePasses(config, chunk=CHUNK)
    engine = Engine(passes, None)
    long = engine.add(request(20 * CHUNK, 5, seed=1))
    engine.step(), engine.step()
    short = engine.add(request(CHUNK, 5, seed=2))
    engine.step(), engine.step()
    assert isinstance(next(short.events()), Prefill)
    assert reads(passes)[2:] == [{0: CHUNK}, {1: CHUNK}]
    finish(engine)
    assert answer(long) == alone(config, request(20 * CHUNK, 5, seed=1))


def test_others_do_not_change_where_a_prompt_is_cut(config: ModelConfig) -> None:
    """A row's chunks are its own: short prompts share what is left of one, and a whole one waits for the next."""
    passes = FakePasses(config, chunk=CHUNK)
    engine = Engine(passes, None)
    handles = [engine.add(request(length, 5, seed=i)) for i, length in enumerate([20, 3 * CHUNK, 5, CHUNK + 1])]
    finish(engine)
    assert all(answer(one)[2] == "length" for one in handles)
    mine: dict[int, list[int]] = {}
    for one in reads(passes):
        assert sum(one.values()) <= CHUNK
        for slot, count in one.items():
            mine.setdefault(slot, []).append(count)
    assert mine == {0: [20], 1: [CHUNK] * 3, 2: [5], 3: [CHUNK, 1]}


def test_who_waits_for_the_same_prompt_holds_nobody_up(config: ModelConfig) -> None:
    passes = FakePasses(config, chunk=CHUNK)
    engine = Engine(passes, None, prefix_bytes=1 << 20)
    first = engine.add(request(9 * CHUNK, 5, seed=1))
    engine.step()
    second, other = engine.add(request(9 * CHUNK, 5, seed=1)), engine.add(request(5, 5, seed=2))
    engine.step(), engine.step()
    assert {1: 5} in reads(passes)
    finish(engine)
    assert answer(first) == answer(second) and answer(other)[2] == "length"
    assert sum(sum(one.values()) for one in reads(passes)) == 9 * CHUNK + 5


# ---- Errors -----------------------------------------------------------------------------------------------------


def test_a_row_that_comes_to_nan_leaves_the_others_alone(config: ModelConfig) -> None:
    passes = FakePasses(config)
    engine = Engine(passes, None)
    handles = [engine.add(request(5, seed=i)) for i in range(3)]
    engine.step()
    passes.spoilt.add(1)
    finish(engine)
    with says("NaN or infinity"):
        answer(handles[1])
    for i in (0, 2):
        assert answer(handles[i]) == alone(config, request(5, seed=i))


def test_what_runs_out_of_memory_is_an_error_of_its_own_rows(config: ModelConfig) -> None:
    class Small(FakePasses):
        def read(self, rows: Any) -> None:
            if any(len(tokens) == 7 for _, tokens in rows):
                raise MemoryError
            super().read(rows)

        @contextmanager
        def guarded(self, doing: str) -> Iterator[None]:
            try:
                yield
            except MemoryError:
                raise DgemmaError(f"out of memory while {doing}") from None

    engine = Engine(Small(config), None)
    first = engine.add(request(5, seed=1))
    engine.step()
    second = engine.add(request(7, seed=2))
    finish(engine)
    assert answer(first) == alone(config, request(5, seed=1))
    with says("out of memory while generating"):
        answer(second)


def test_a_bug_ends_every_request_and_not_the_engine(config: ModelConfig) -> None:
    class Broken(FakePasses):
        broken = True

        def step(self, *given: Any) -> Any:
            if self.broken:
                raise ValueError("a bug")
            return super().step(*given)

    passes = Broken(config)
    engine = Engine(passes, None)
    handles = [engine.add(request(5, seed=i)) for i in range(2)]
    for one in handles:
        with pytest.raises(ValueError, match="a bug"):
            answer(one)
    passes.broken = False
    assert answer(engine.add(request(5, seed=1))) == alone(config, request(5, seed=1))
    assert not passes.held


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_that_held_nan_is_clean_for_the_next(checkpoint: Checkpoint, backend: str) -> None:
    """Beside a row that goes on, a row's cache is spoilt: it alone fails, and who gets its slot does not notice."""
    plain = on(backend, checkpoint, prefix_bytes=0)
    # The last prompt is the shortest: it writes over a part of what was there. On rounding see test_engine.py.
    wanted = [request(length, 60, seed=i, sampler={"steps": 2}) for i, length in enumerate((9, 9, 4))]
    want = [answer(plain.add(one)) for one in wanted]
    engine = on(backend, checkpoint, prefix_bytes=0)
    staying, failing = engine.add(wanted[0]), engine.add(wanted[1])
    engine.step()
    passes = books(engine)

    def spoil() -> None:
        kept = passes.save(1)
        passes._load(1, replace(kept, data=tuple(KV(*(x * float("nan") for x in layer)) for layer in kept.data)))

    engine.run("testing", spoil)
    engine.step(), engine.step()
    with says("NaN or infinity"):
        answer(failing)
    after = engine.add(wanted[2])
    engine.step()
    assert engine._rows[-1].slot == 1
    assert [answer(after), answer(staying)] == [want[2], want[0]]


# ---- Caches that are shared and kept ----------------------------------------------------------------------------


def test_samples_of_one_prompt_read_it_once(config: ModelConfig) -> None:
    passes, share = FakePasses(config, chunk=CHUNK), Share()
    engine = Engine(passes, None, prefix_bytes=0)
    prompt = request(3 * CHUNK + 2).prompt
    handles = [engine.add(request(prompt, CANVAS, seed=i), share) for i in range(4)]
    finish(engine)
    assert [sum(one.values()) for one in reads(passes)] == [CHUNK] * 3 + [2]
    assert [answer(one) for one in handles] == [alone(config, request(prompt, CANVAS, seed=i)) for i in range(4)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_that_begins_as_another_did_reads_only_the_rest(checkpoint: Checkpoint, backend: str) -> None:
    """Turn by turn of a chat whose answers are in the prompts, with tokens equal to those without what was kept."""
    kept, plain = (on(backend, checkpoint, prefix_bytes=size) for size in (1 << 30, 0))
    prompt = request(40, seed=3).prompt
    for turn in range(4):
        events = list(kept.add(request(prompt, 2 * CANVAS, seed=turn, sampler={"steps": 2})).events())
        want = list(plain.add(request(prompt, 2 * CANVAS, seed=turn, sampler={"steps": 2})).events())
        tokens, others = ([t for e in one if isinstance(e, Commit) for t in e.tokens] for one in (events, want))
        assert tokens == others
        stats = [one[-1].stats for one in (events, want)]  # type: ignore[union-attr]
        # The first canvas of an answer was read before the second was written; the second never is.
        assert stats[0].cached_tokens == (len(prompt) - CANVAS - 8 if turn else 0) and stats[1].cached_tokens == 0
        assert stats[0].encode_passes == 2
        prompt += (*tokens, *request(8, seed=turn).prompt)


def test_a_small_budget_gives_up_the_oldest(config: ModelConfig) -> None:
    """Three prompts where two fit: what is kept stays within the budget, and what is given up is read again."""
    prompts = [request(20, seed=i).prompt for i in range(3)]
    passes = FakePasses(config)
    engine = Engine(passes, None, prefix_bytes=2 * 8 * 20)

    def cached(which: int) -> int:
        events = list(engine.add(request(prompts[which], 5)).events())
        assert engine.prefixes.nbytes <= engine.prefixes.budget
        assert [t for e in events if isinstance(e, Commit) for t in e.tokens] == (
            alone(config, request(prompts[which], 5))[0]
        )
        return events[-1].stats.cached_tokens  # type: ignore[union-attr]

    assert [cached(i) for i in (0, 1, 0, 2, 0, 1, 2)] == [0, 0, 20, 0, 20, 0, 0]
    none = Engine(passes, None, prefix_bytes=0)
    before = passes.kept
    answer(none.add(request(20, 50)))
    assert passes.kept == before and not len(none.prefixes)


# ---- Canvases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 24, 100])
def test_a_canvas_is_as_long_as_is_asked(config: ModelConfig, length: int) -> None:
    events = list(Engine(FakePasses(config), None).add(request(5, 150, canvas_length=length)).events())
    assert {len(e.tokens) for e in events if isinstance(e, Draft)} == {length}
    sizes = [len(e.tokens) for e in events if isinstance(e, Commit)]
    assert sum(sizes) == 150 and len(sizes) == -(-150 // length)


def test_the_last_canvas_fits_what_is_left(config: ModelConfig) -> None:
    def lengths(tokens: int, **options: Any) -> list[int]:
        events = list(Engine(FakePasses(config), None).add(request(5, tokens, **options)).events())
        assert sum(len(e.tokens) for e in events if isinstance(e, Commit)) == tokens
        drafts = [e for e in events if isinstance(e, Draft)]
        return [len(next(d.tokens for d in drafts if d.canvas == i)) for i in range(drafts[-1].canvas + 1)]

    assert lengths(150, canvas_length=128) == [128, 128]
    assert lengths(150, canvas_length=128, fit=True) == [128, 32]
    assert lengths(10, canvas_length=128, fit=True) == [16]
    assert lengths(128, canvas_length=128, fit=True) == [128]
    assert lengths(120, canvas_length=100, fit=True) == [100, 32]


def test_a_reader_may_do_without_drafts(config: ModelConfig) -> None:
    events = list(Engine(FakePasses(config), None).add(request(5, drafts=False)).events())
    assert not any(isinstance(e, Draft) for e in events)
    assert [t for e in events if isinstance(e, Commit) for t in e.tokens] == alone(config, request(5))[0]


# ---- Real passes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_any_settings_share_passes_and_nothing_is_left(checkpoint: Checkpoint, backend: str) -> None:
    """Three hundred requests of as many settings, eight at a time: tokens as alone, and no slot, state or thread."""
    count = 300 if backend == "inference" else 24
    draw = np.random.default_rng(0)
    wanted = [
        request(
            int(draw.integers(1, 40)), int(draw.integers(1, 20)), seed=i, canvas_length=[None, 8][i % 2],
            sampler={"steps": 2, "t_max": 0.8 + i / 1000, "entropy_bound": i / 1000, "greedy": i % 3 == 0},
        )
        for i in range(count)
    ]  # fmt: skip
    engine, single = on(backend, checkpoint, most_rows=8, prefix_bytes=1 << 16), on(backend, checkpoint, prefix_bytes=0)
    threads = threading.active_count()
    handles = [engine.add(one) for one in wanted]
    got = [answer(one) for one in handles]
    assert_nothing_is_left(engine)
    assert 0 < len(engine.prefixes) <= engine.prefixes.most and engine.prefixes.nbytes <= 1 << 16
    assert threading.active_count() <= threads + 1  # and others of earlier tests may end meanwhile
    for i in range(0, count, 6):
        assert got[i] == answer(single.add(wanted[i])), f"request {i}"


def test_generate_after_three_hundred_streams_that_were_dropped(tmp_path: Path) -> None:
    model = dgemma.load(tiny_checkpoint(tmp_path), backend="torch")
    want = model.generate([5, 6, 7], 16, steps=2).token_ids
    for i in range(300):
        next(model.stream([5, 6, 7, 20 + i % 100], 16, seed=i, steps=2))
    assert model.generate([5, 6, 7], 16, steps=2).token_ids == want
    assert_nothing_is_left(model.engine)
