"""Several generations on one model: interleaved in one thread, in many threads, shared, dropped, and after a fork.

Whatever meets, each generation gives what it gives alone: tokens, accepted positions and steps exactly. Rows that meet
share passes, and a product of more rows may round otherwise: entropies are held to the law.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma import Commit, DgemmaError, DiffusionGemma, Done, Draft
from dgemma.core.owner import Owner
from dgemma.core.prefix import Prefixes
from law import assert_close_f32
from said import check_line, says
from tiny import tiny_checkpoint

BACKENDS = ("numpy", "torch", "mlx", "onnx")
REQUESTS = [([5, 6, 7], 1), ([5, 6, 7, 8, 9], 2), ([40, 50], 3)]
TOKENS, STEPS = 40, 4  # three canvases


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("turns")
    dense = tiny_checkpoint(where, gain=0.4)
    packed = where / "packed"
    wide = tiny_checkpoint(where, name="wide", gain=0.4, hidden_size=64, intermediate_size=64, moe_intermediate_size=64)
    dgemma.convert(wide, packed, recipe="4bit")
    return {"dense": dense, "packed": packed}


@pytest.fixture(scope="module", params=[*BACKENDS, "torch packed", "onnx packed"])
def model(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: Any) -> DiffusionGemma:
    name, _, packed = request.param.partition(" ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.which", lambda *_: None)  # so that MLX compiles nothing, which takes it a minute
        loaded = dgemma.load(folders["packed" if packed else "dense"], backend=name)
        loaded.engine.prefixes = Prefixes(0)  # how much of a prompt is read is the same every time
        return loaded


def stream(model: DiffusionGemma, which: int) -> Iterator[Any]:
    prompt, seed = REQUESTS[which]
    return model.stream(prompt, TOKENS, seed, STEPS, confidence=0.0, eos=())


def said(event: Any) -> Any:
    """All that an event says but for times and entropies."""
    if isinstance(event, Draft):
        return event.canvas, event.step, event.tokens.tobytes(), event.accepted.tobytes()
    if isinstance(event, Done):
        return event.finish_reason, event.stats.steps, event.stats.encode_passes
    return event


def entropies(events: Sequence[Any]) -> list[np.ndarray]:
    return [event.entropy for event in events if isinstance(event, Draft)]


def assert_same(got: Sequence[Any], want: Sequence[Any]) -> None:
    assert [said(event) for event in got] == [said(event) for event in want]
    assert_close_f32(entropies(got), entropies(want), "entropies of a generation")


def alone(model: DiffusionGemma) -> list[list[Any]]:
    return [list(stream(model, which)) for which in range(len(REQUESTS))]


def settled(model: DiffusionGemma) -> int:
    """How many requests the engine has, when what is running is over."""
    model.engine.run("testing", int)
    return model.engine.busy


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
            got[which].append(event)
    for one, other in zip(got, want, strict=True):
        assert_same(one, other)


def test_generate_and_logits_within_a_stream(model: DiffusionGemma) -> None:
    want, canvas = alone(model), list(range(20, 36))
    logits = model.logits([5, 6], canvas)
    tokens = model.generate([9, 8], 20, 7, STEPS).token_ids
    got = []
    for i, event in enumerate(stream(model, 0)):
        got.append(event)
        if i % 4 == 1:
            assert model.generate([9, 8], 20, 7, STEPS).token_ids == tokens
            np.testing.assert_array_equal(model.logits([5, 6], canvas), logits)
    assert_same(got, want[0])


def test_threads_give_what_each_gives_alone(model: DiffusionGemma) -> None:
    want = alone(model)
    got: dict[tuple[int, int], list[Any]] = {}
    ready = threading.Barrier(6)

    def write(which: int, again: int) -> None:
        ready.wait()
        got[which, again] = list(stream(model, which))

    run([threading.Thread(target=write, args=(which, again)) for which in range(3) for again in range(2)])
    assert len(got) == 6
    for (which, _), one in got.items():
        assert_same(one, want[which])


def test_a_stream_may_pass_from_thread_to_thread_or_be_shared(model: DiffusionGemma) -> None:
    want, one = [said(event) for event in alone(model)[1]], stream(model, 1)
    got = [said(next(one)) for _ in range(3)]
    rest: list[Any] = []

    def read() -> None:
        for event in one:
            rest.append(said(event))

    run([threading.Thread(target=read) for _ in range(3)])
    assert len(got) + len(rest) == len(want) and all(event in want for event in rest)
    assert next(one, None) is None


def test_a_closed_or_dropped_stream_frees_its_slot(model: DiffusionGemma) -> None:
    gc.collect()
    gc.disable()  # freed when it is let go, not when somebody cleans up
    try:
        closed, dropped, handle = stream(model, 0), stream(model, 1), stream(model, 2)
        for one in (closed, dropped):
            next(one), next(one)
        closed.close()  # type: ignore[attr-defined]
        assert list(closed) == [] and model.engine.busy <= 3
        del dropped, one
        assert [type(event) for event in handle][-1] is Done
        assert settled(model) == 0
        unread = stream(model, 0)
        assert settled(model) == 1, "nothing runs before its events are read"
        del unread
        assert settled(model) == 0
    finally:
        gc.enable()


def test_a_stream_that_is_closed_ends_soon(folders: dict[str, Path]) -> None:
    """After the pass that is running, not after its budget of a thousand passes."""
    model = dgemma.load(folders["dense"], backend="numpy")
    long = model.stream([5, 6, 7], 400, 0, 100, confidence=0.0, eos=())
    next(long), next(long), next(long)
    long.close()  # type: ignore[attr-defined]
    assert settled(model) == 0 and next(long, None) is None


def test_closing_in_another_thread_ends_a_stream(model: DiffusionGemma) -> None:
    running = stream(model, 0)
    next(running)
    run([threading.Thread(target=running.close)])  # type: ignore[attr-defined]
    assert next(running, None) is None and settled(model) == 0


def test_closing_wakes_whoever_waits(folders: dict[str, Path]) -> None:
    """Three threads wait for one stream's events while a fourth, from the engine's own thread, closes it."""
    model = dgemma.load(folders["dense"], backend="numpy")
    running = model.stream([5, 6, 7], 400, 0, 100, confidence=0.0, eos=())
    next(running)
    readers = [threading.Thread(target=lambda: list(running)) for _ in range(3)]
    for one in readers:
        one.start()
    model.engine.run("testing", running.close)  # type: ignore[attr-defined]
    for one in readers:
        one.join(60)
        assert not one.is_alive()


def run(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


# ---- The thread that runs passes --------------------------------------------------------------------------------


def test_work_within_work_runs_where_it_is() -> None:
    owner = Owner(nullcontext, anywhere=True)
    assert owner.run(lambda: owner.run(threading.current_thread)) is owner.run(threading.current_thread)
    assert owner.run(threading.current_thread) is not threading.current_thread()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_work_that_raises_leaves_the_thread_as_it_was(error: type[BaseException]) -> None:
    owner = Owner(nullcontext, anywhere=True)

    def raising() -> None:
        raise error

    with pytest.raises(error):
        owner.run(raising)
    assert owner.run(int) == 0


def test_its_thread_is_inside_home_and_ends_with_it() -> None:
    inside: list[str] = []

    @contextmanager
    def home() -> Iterator[None]:
        inside.append("in")
        yield
        inside.append("out")

    owner = Owner(home, anywhere=True)
    assert not inside, "the thread starts with the first work"
    thread = owner.run(threading.current_thread)
    assert inside == ["in"]
    del owner
    thread.join(60)
    assert inside == ["in", "out"] and not thread.is_alive()


@pytest.mark.parametrize("anywhere", [True, False])
def test_after_its_thread_has_ended(anywhere: bool) -> None:
    """As at the process's exit: work runs in the thread that asks, or the runtime is gone and says so."""
    owner = Owner(nullcontext, anywhere=anywhere)
    thread = owner.run(threading.current_thread)
    owner._queue.put(None)
    thread.join(60)
    if anywhere:
        assert owner.run(threading.current_thread) is threading.current_thread() and not owner.post(int)
    else:
        with says("the process is exiting"):
            owner.run(int)


def test_an_engine_that_is_dropped_ends_its_thread(folders: dict[str, Path]) -> None:
    before = set(threading.enumerate())
    model = dgemma.load(folders["dense"], backend="numpy")
    model.generate([5, 6, 7], 16, steps=2)
    (thread,) = set(threading.enumerate()) - before
    del model
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_a_reader_that_pauses_holds_nobody_up(folders: dict[str, Path]) -> None:
    """Another thread's whole generation fits in between two of its events."""
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
