"""Several generations on one model: interleaved in one thread, in many threads, shared, dropped, and after a fork.

Whatever meets, each generation gives exactly what it gives alone.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma import Commit, DgemmaError, DiffusionGemma, Done, Draft
from dgemma.core.turns import Turns
from said import check_line, says
from tiny import tiny_checkpoint

BACKENDS = ("numpy", "torch", "mlx", "onnx")
REQUESTS = [([5, 6, 7], 1), ([5, 6, 7, 8, 9], 2), ([40, 50], 3)]
TOKENS, STEPS = 40, 4  # three canvases


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("turns")
    dense = tiny_checkpoint(where)
    packed = where / "packed"
    wide = tiny_checkpoint(where, name="wide", hidden_size=64, intermediate_size=64, moe_intermediate_size=64)
    dgemma.convert(wide, packed, recipe="4bit")
    return {"dense": dense, "packed": packed}


@pytest.fixture(scope="module", params=[*BACKENDS, "torch packed", "onnx packed"])
def model(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: Any) -> DiffusionGemma:
    name, _, packed = request.param.partition(" ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.which", lambda *_: None)  # so that MLX compiles nothing, which takes it a minute
        return dgemma.load(folders["packed" if packed else "dense"], backend=name)


def stream(model: DiffusionGemma, which: int) -> Iterator[Any]:
    prompt, seed = REQUESTS[which]
    return model.stream(prompt, TOKENS, seed, STEPS, confidence=0.0, eos=())


def said(event: Any) -> Any:
    """All that an event says but for times."""
    if isinstance(event, Draft):
        return event.step, event.tokens.tobytes(), event.accepted.tobytes(), event.entropy.tobytes()
    if isinstance(event, Done):
        return event.finish_reason, event.stats.steps, event.stats.encode_passes
    return event


def alone(model: DiffusionGemma) -> list[list[Any]]:
    return [[said(event) for event in stream(model, which)] for which in range(len(REQUESTS))]


def test_interleaved_streams_give_what_each_gives_alone(model: DiffusionGemma) -> None:
    want, choose = alone(model), np.random.default_rng(0)
    running = [stream(model, which) for which in range(len(REQUESTS))]
    got: list[list[Any]] = [[] for _ in running]
    left = list(range(len(running)))
    while left:
        which = left[choose.integers(len(left))]
        if (event := next(running[which], None)) is None:
            left.remove(which)
        else:
            got[which].append(said(event))
    assert got == want


def test_generate_and_logits_within_a_stream(model: DiffusionGemma) -> None:
    want, canvas = alone(model), list(range(20, 36))
    logits = model.logits([5, 6], canvas)
    tokens = model.generate([9, 8], 20, 7, STEPS).token_ids
    got = []
    for i, event in enumerate(stream(model, 0)):
        got.append(said(event))
        if i % 4 == 1:
            assert model.generate([9, 8], 20, 7, STEPS).token_ids == tokens
            np.testing.assert_array_equal(model.logits([5, 6], canvas), logits)
    assert got == want[0]


def test_threads_give_what_each_gives_alone(model: DiffusionGemma) -> None:
    want = alone(model)
    got: dict[tuple[int, int], list[Any]] = {}
    ready = threading.Barrier(6)

    def write(which: int, again: int) -> None:
        ready.wait()
        got[which, again] = [said(event) for event in stream(model, which)]

    run([threading.Thread(target=write, args=(which, again)) for which in range(3) for again in range(2)])
    assert got == {(which, again): want[which] for which in range(3) for again in range(2)}


def test_a_stream_may_pass_from_thread_to_thread_or_be_shared(model: DiffusionGemma) -> None:
    want, one = alone(model)[1], stream(model, 1)
    got = [said(next(one)) for _ in range(3)]
    rest: list[Any] = []

    def read() -> None:
        for event in one:
            rest.append(said(event))

    run([threading.Thread(target=read) for _ in range(3)])
    assert len(got) + len(rest) == len(want) and all(event in want for event in rest)


def test_a_closed_or_dropped_stream_frees_its_cache(model: DiffusionGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Any]] = []
    engine = type(model.engine)

    class Watched:
        """Stands in a generation's frame beside its cache."""

    original = engine._write

    def watched(self: Any, *arguments: Any) -> Iterator[Any]:
        mark = Watched()
        held.append(weakref.ref(mark))
        yield from original(self, *arguments)
        del mark

    monkeypatch.setattr(engine, "_write", watched)
    gc.collect()
    gc.disable()  # freed when it is let go, not when somebody cleans up
    try:
        closed, dropped = stream(model, 0), stream(model, 1)
        for one in (closed, dropped):
            next(one), next(one), next(one), next(one)
        assert [one() is not None for one in held] == [True, True]
        closed.close()  # type: ignore[attr-defined]
        assert list(closed) == [] and held[0]() is None
        del dropped, one
        assert held[1]() is None
    finally:
        gc.enable()


def test_closing_in_another_thread_ends_a_stream(model: DiffusionGemma) -> None:
    running = stream(model, 0)
    next(running)
    run([threading.Thread(target=running.close)])  # type: ignore[attr-defined]
    assert next(running, None) is None


def run(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


# ---- The rule itself --------------------------------------------------------------------------------------------


class Guarded:
    """What `Turns` asks of a backend."""

    name = "some"
    survives_fork = False

    def guarded(self, doing: str) -> Any:
        from contextlib import nullcontext

        return nullcontext()

    def run(self, work: Any) -> Any:
        return work()


def test_a_pass_within_a_pass_is_refused_and_the_next_is_taken() -> None:
    turns = Turns(Guarded())  # type: ignore[arg-type]
    with says("this very thread"):
        turns.take("testing", lambda: turns.take("testing", int))
    assert turns.take("testing", int) == 0


def test_an_interrupted_pass_gives_the_turn_back() -> None:
    turns = Turns(Guarded())  # type: ignore[arg-type]

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        turns.take("testing", interrupted)
    assert turns.take("testing", int) == 0


def test_a_reader_that_pauses_holds_nobody_up(folders: dict[str, Path]) -> None:
    """The lock is free while a reader has an event: another thread's whole generation fits in between."""
    model = dgemma.load(folders["dense"], backend="torch")
    paused = stream(model, 0)
    next(paused), next(paused)
    run([threading.Thread(target=lambda: list(stream(model, 1)))])
    assert any(isinstance(event, Commit) for event in paused)


# ---- Processes --------------------------------------------------------------------------------------------------

FORK = """
import os, sys, dgemma
model = dgemma.load(sys.argv[1], backend=sys.argv[2])
want = model.generate([5, 6, 7], 16, steps=2).token_ids
stream = model.stream([5, 6, 7], 16, steps=2)
next(stream)
sys.stdout.flush()
if (child := os.fork()) == 0:
    try:
        assert model.generate([5, 6, 7], 16, steps=2).token_ids == want and len(list(stream)) > 2
        print("same")
    except dgemma.DgemmaError as error:
        print(error)
    sys.stdout.flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert model.generate([5, 6, 7], 16, steps=2).token_ids == want
"""

THREAD = """
import sys, threading, dgemma
model = dgemma.load(sys.argv[1], backend=sys.argv[2])
made = []
for _ in range(2):
    thread = threading.Thread(target=lambda: made.append(model.generate([5, 6, 7], 16, steps=2).token_ids))
    thread.start()
    thread.join()
print(made == 2 * [model.generate([5, 6, 7], 16, steps=2).token_ids])
"""


def script(code: str, *arguments: str) -> str:
    """Run a program to its end, and return what it says; its exit code is 0 and it says nothing on stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forked_child_is_refused_where_it_would_hang(folders: dict[str, Path], backend: str) -> None:
    line = script(FORK, str(folders["dense"]), backend).strip()
    if backend == "numpy":
        assert line == "same"
    else:
        check_line(DgemmaError(line), backend, "load it again there", "'spawn'")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_program_that_generates_in_threads_exits_with_0(folders: dict[str, Path], backend: str) -> None:
    assert script(THREAD, str(folders["dense"]), backend) == "True\n"


NO_COMPILER = "import shutil; shutil.which = lambda *_, **__: None  # MLX compiles nothing\n"
DAEMON = """
import atexit, sys, threading, time, dgemma
ready = threading.Event()
def late():
    try:
        model.generate([5, 6, 7], 16, steps=2)
    except dgemma.DgemmaError:
        assert sys.argv[2] == "mlx"
atexit.register(late)
model = dgemma.load(sys.argv[1], backend=sys.argv[2])
def write():
    while True:
        model.generate([5, 6, 7], 16, steps=2)
        ready.set()
threading.Thread(target=write, daemon=True).start()
ready.wait()
print("over")
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_program_may_exit_while_a_daemon_thread_generates(folders: dict[str, Path], backend: str) -> None:
    """Python ends such threads inside C++, which aborts; and handlers of its exit may generate, or are told."""
    assert script(NO_COMPILER + DAEMON, str(folders["dense"]), backend) == "over\n"
