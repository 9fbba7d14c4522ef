"""Who encodes: this process or, for checkpoints of some size, one worker process for each core.

NumPy lets other threads run during an operation, but on pieces that fit in a cache an operation takes some ten
microseconds, about as long as handing over Python's lock: two threads are no faster than one, two processes are twice
as fast. A worker makes the same plan from the same arguments, reads, encodes and writes for itself, and answers with a
few numbers, one line of JSON for each run of rows. It holds the folder's lock as well, so that nobody else begins there
before the last write of a killed conversion is over.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..core.errors import DgemmaError, shown
from .encode import encode, largest
from .job import Job, prepare
from .partial import Partial, digest
from .recipes import Recipe

SMALL = 128 << 20
"""Bytes of target up to which starting workers takes longer than they save."""

_START = "import sys; sys.path[:] = {path!r}; from {package}.crew import work; work()"


class Written(NamedTuple):
    """What became of rows."""

    wrong: float
    total: float
    """Squared error and weights, as measured."""
    size: int
    """Bytes written."""
    digest: str


class Crew(Protocol):
    def encode(self, index: int, start: int, stop: int, factor: float | None) -> Written:
        """Encode and write rows of an item."""
        ...

    def largest(self, index: int, start: int, stop: int) -> float:
        """Return the largest magnitude among rows of an item."""
        ...


class Here:
    """Encodes in the calling thread."""

    def __init__(self, job: Job, partial: Partial) -> None:
        self.job, self.partial = job, partial
        self.places = {name: (shard.name, start) for shard in job.shards for name, start in shard.places.items()}

    def encode(self, index: int, start: int, stop: int, factor: float | None) -> Written:
        item = self.job.items[index]
        result = encode(item, start, stop, factor)
        parts = {one.kind: result.data[one.kind].reshape(-1).view("u1").data for one in item.components}
        for one in item.components:
            shard, offset = self.places[one.name]
            self.partial.write(shard, offset + start * one.row_bytes, parts[one.kind])
        size = sum(part.nbytes for part in result.data.values())
        return Written(wrong=result.wrong, total=result.total, size=size, digest=digest(parts.values()))

    def check(self, index: int, start: int, stop: int) -> bool:
        """Whether rows that were written before are as they were written."""
        places = [(*self.places[one.name], one) for one in self.job.items[index].components]
        found = (
            self.partial.read(shard, offset + start * one.row_bytes, (stop - start) * one.row_bytes or one.nbytes)
            for shard, offset, one in places
        )
        return digest(found) == self.partial.digests[index, start]

    def largest(self, index: int, start: int, stop: int) -> float:
        return largest(self.job.items[index], start, stop)


class Workers:
    """Hands work to processes; safe from as many threads as there are processes."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        for one in processes:
            self._idle.put(one)

    def encode(self, index: int, start: int, stop: int, factor: float | None) -> Written:
        answer = self._ask(["encode", index, start, stop, None if factor is None else factor.hex()])
        wrong, total, size, digest = answer
        return Written(wrong=float.fromhex(wrong), total=float.fromhex(total), size=size, digest=digest)

    def largest(self, index: int, start: int, stop: int) -> float:
        return float.fromhex(self._ask(["largest", index, start, stop, None]))

    def _ask(self, request: list[Any]) -> Any:
        process = self._idle.get()
        try:
            answer = _exchange(process, request)
        finally:
            self._idle.put(process)
        return answer


def _exchange(process: subprocess.Popen[str], request: Any) -> Any:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        raise DgemmaError(
            "a worker process ended, perhaps for want of memory; the same command goes on where it stopped, "
            "with fewer --workers if need be"
        )
    match json.loads(line):
        case {"answer": answer}:
            return answer
        case {"os": [code, said, name]}:
            raise OSError(code, said, name)
        case {"error": said}:
            raise DgemmaError(said)
        case other:
            raise DgemmaError(f"a worker process failed: {other}")


@contextmanager
def gather(job: Job, partial: Partial, workers: int) -> Iterator[Crew]:
    """Start workers, and end them when the block is left."""
    if workers < 2 or sum(item.nbytes for item in job.items) < SMALL or not sys.executable:
        yield Here(job, partial)
        return
    code = _START.format(path=sys.path, package=__package__)
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    lock = () if sys.platform == "win32" else (partial.lock,)
    processes: list[subprocess.Popen[str]] = []
    try:
        for _ in range(workers):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                    pass_fds=lock, start_new_session=True, env=environment,
                )
            )  # fmt: skip
        for one in processes:
            assert one.stdin is not None
            with suppress(BrokenPipeError):  # one that has ended is missed when it is asked something
                one.stdin.write(json.dumps(_arguments(job, partial)) + "\n")
                one.stdin.flush()
        yield Workers(processes)
    finally:
        for one in processes:
            assert one.stdin is not None and one.stdout is not None
            with suppress(BrokenPipeError):
                one.stdin.close()  # which a worker takes for the end, after what it is at
        for one in processes:
            one.wait()
            assert one.stdout is not None
            one.stdout.close()


def _arguments(job: Job, partial: Partial) -> dict[str, Any]:
    return {
        "source": str(job.location.absolute()), "recipe": job.recipe.to_json(), "mlx": job.mlx,
        "tokenizer": str(job.gguf.tokenizer) if job.gguf and job.gguf.tokenizer else None,
        "plan": job.plan, "partial": str(partial.folder), "folder": partial.files.identity,
    }  # fmt: skip


def work() -> None:
    """Run in a worker: one request a line on stdin, one answer a line on stdout."""
    arguments = json.loads(sys.stdin.readline() or "null")
    here = None
    for line in sys.stdin:
        try:
            here = here or _start(arguments)
            answer = {"answer": _do(here, *json.loads(line))}
        except DgemmaError as error:
            answer = {"error": str(error)}
        except OSError as error:
            answer = {"os": [error.errno, error.strerror, str(error.filename or "")]}
        try:
            print(json.dumps(answer), flush=True)
        except BrokenPipeError:  # whoever asked has been killed
            os._exit(0)


def _start(arguments: Mapping[str, Any]) -> Here:
    # What the parent was allowed to round again, it has said; a worker asks no second time.
    job = prepare(
        Path(arguments["source"]), Recipe.from_json(arguments["recipe"]), mlx=arguments["mlx"], requantize=True,
        tokenizer=arguments["tokenizer"],
    )  # fmt: skip
    if json.loads(json.dumps(job.plan)) != arguments["plan"]:
        raise DgemmaError(
            f"{shown(job.folder)}: the source changed while it was being converted; start over with --force"
        )
    partial = Partial(Path(arguments["partial"]))
    if list(partial.files.identity) != arguments["folder"]:
        raise DgemmaError(f"{shown(partial.folder)}: another folder has taken its place; start again")
    return Here(job, partial)


def _do(here: Here, what: str, index: int, start: int, stop: int, factor: str | None) -> Any:
    if what == "largest":
        return here.largest(index, start, stop).hex()
    made = here.encode(index, start, stop, None if factor is None else float.fromhex(factor))
    return [made.wrong.hex(), made.total.hex(), made.size, made.digest]
