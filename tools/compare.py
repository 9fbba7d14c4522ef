"""Hold one checkpoint against another: what quantizing, or any other change of the weights, does to a model.

    A ── writes freely ──▶ text, steps      with the same prompts, seeds and settings as      B ── writes freely ──▶
    A ── denoises ──▶ canvases, distributions ──▶ B reads the very same ──▶ logits beside A's

In the second line both follow A's trajectory: every canvas is the one that A's engine has denoised, every distribution
that self-conditioning reads is A's, and each model embeds them with its own table. Differences are then the weights'
alone, and do not pile up on the way.

Models are loaded one after the other. Of A, only its vocabulary head stays, and the states that its passes ended with,
from which the head makes the logits again: memory is that of the larger model and one embedding table. States, 4·L·D
bytes for a pass, go to a temporary file where there are many.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..checkpoints import weights
from ..checkpoints.checkpoint import Checkpoint, resolve
from ..core.config import ModelConfig, SamplerConfig
from ..core.errors import DgemmaError, quoted, shown
from ..core.events import Commit, Done, Draft
from ..core.row import check_tokens
from ..core.sampler import first_canvas
from ..runtime import DiffusionGemma, Prompt, load
from .agreement import Agreeing, Agreement, Outcome, Tally, tally

HELD = 256 << 20
"""Bytes of recorded states that stay in memory."""

Progress = Callable[[str, int, int], None]
"""Told what is being done, and how much of how much: bytes while loading, prompts afterwards."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prompt, as `generate` takes them, and what is known about it."""

    prompt: Prompt
    answer: str | None = None
    """What the model's text has to be, but for space around it."""
    group: str = ""
    """Prompts of a group are counted together, besides all of them."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two models."""

    name: str
    backend: str
    device: str
    dtype: str
    bytes: int
    """Of the text weights, as stored."""
    bits_per_weight: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    a: Side
    b: Side
    agreement: Agreement
    total: Tally
    groups: tuple[Tally, ...]
    """One for each group, if there is more than one."""

    def to_dict(self) -> dict[str, Any]:
        def counted(one: Tally) -> dict[str, Any]:
            return asdict(one) | {"rate_change": asdict(one.rate_change) if one.rate_change else None}

        return {
            "a": asdict(self.a), "b": asdict(self.b),
            "agreement": asdict(self.agreement) | {"entropy_shift": self.agreement.entropy_shift},
            "total": counted(self.total), "groups": [counted(one) for one in self.groups],
        }  # fmt: skip


def compare(
    a: str | Path | DiffusionGemma,
    b: str | Path | DiffusionGemma,
    prompts: Sequence[Prompt | Mapping[str, Any] | Case],
    *,
    max_new_tokens: int | None = None,
    seed: int = 0,
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Comparison:
    """Measure what distinguishes model B from model A.

    Args:
        a: the reference: a name as `load` takes it, or a loaded model. Both use its sampler settings.
        b: the candidate, likewise. Vocabulary, prompt format and canvas length have to be A's.
        prompts: as `generate` takes them; or mappings of `prompt`, `answer` (the right text) and `group`.
        max_new_tokens: each answer has at most so many; by default what A's checkpoint says, or 256.
        seed: of the first prompt; the others count up.
        backend: for models given by name, as are `device` and `dtype`.
        device: as above.
        dtype: as above.
        progress: see `Progress`.

    Raises:
        DgemmaError: models that cannot be compared, prompts that cannot be read.
    """
    ways = {"backend": backend, "device": device, "dtype": dtype}
    cases = [one if isinstance(one, Case) else _case(one, f"prompt {i + 1}") for i, one in enumerate(prompts)]
    if not cases:
        raise DgemmaError("no prompts: at least one is needed")
    _check_alike(a, b)  # before hours are spent on A
    report = progress or (lambda what, done, total: None)
    with record(a, cases, max_new_tokens=max_new_tokens, seed=seed, ways=ways, progress=report) as recording:
        gc.collect()  # an engine and its compiled step refer to each other; B needs the room
        return measure(recording, b, ways=ways, progress=report)


Head = Callable[[np.ndarray], np.ndarray]
"""What makes logits of states; see `Passes.head`."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What A did. A context manager: leaving it gives the temporary file back."""

    side: Side
    cases: tuple[Case, ...]
    ids: tuple[list[int], ...]
    """Each prompt as A reads it."""
    settings: dict[str, Any]
    """Arguments of `generate` that B gets too."""
    sampler: SamplerConfig
    seed: int
    outcomes: tuple[Outcome, ...]
    canvases: tuple[tuple[np.ndarray, ...], ...]
    """For each prompt and canvas: what every pass read, and last what was committed, int32 [passes + 1, L]."""
    states: IO[bytes]
    """What every pass ended with, float32 [L, D], in order."""
    width: int
    """D."""
    head: Head

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *error: object) -> None:
        self.states.close()


def record(
    a: str | Path | DiffusionGemma, cases: Sequence[Case], *, max_new_tokens: int | None, seed: int,
    ways: Mapping[str, str] | None = None, progress: Progress = lambda what, done, total: None,
) -> Recording:  # fmt: skip
    """Let A write, and follow its denoising."""
    model = _open(a, ways or {}, progress)
    name, sampler = _name(a), model.generation.sampler
    ids = [model.prompt_ids(case.prompt) for case in cases]
    for i, one in enumerate(ids):
        check_tokens(one, model.config.vocab_size, model.config.image_token_ids, what=f"prompt {i + 1}")
    ends = model.generation.eos_token_ids or model.config.eos_token_ids
    budget = max_new_tokens or model.generation.budget(max(map(len, ids)))
    settings = {"max_new_tokens": budget, "eos": ends, **asdict(sampler)}
    outcomes, canvases = [], []
    states = tempfile.SpooledTemporaryFile(max_size=HELD)  # noqa: SIM115 - the recording owns it
    head = model.engine.passes.head()

    def keep(ended: np.ndarray, temperature: float) -> np.ndarray:
        states.write(ended.tobytes())
        return head(ended)

    try:
        for i, (case, one) in enumerate(zip(cases, ids, strict=True)):
            progress(f"A, {name}", i, len(cases))
            outcome, trace = _write(model, case, one, seed + i, settings)
            outcomes.append(outcome)
            canvases.append(trace)
            _follow(model, sampler, one, trace, keep)
    except OSError as error:
        states.close()
        raise DgemmaError(f"the recording does not fit into {tempfile.gettempdir()}: {error.strerror}") from None
    except BaseException:
        states.close()
        raise
    return Recording(
        side=_side(name, model), cases=tuple(cases), ids=tuple(ids), settings=settings, sampler=sampler, seed=seed,
        outcomes=tuple(outcomes), canvases=tuple(canvases), states=states,
        width=model.config.hidden_size, head=head,
    )  # fmt: skip


def measure(
    recording: Recording, b: str | Path | DiffusionGemma, *,
    ways: Mapping[str, str] | None = None, progress: Progress = lambda what, done, total: None,
) -> Comparison:  # fmt: skip
    """Let B write the same, follow A's recording with it, and compare. May be called again with another B."""
    model = _open(b, ways or {}, progress)
    name, agreeing, outcomes = _name(b), Agreeing(), []
    recording.states.seek(0)
    head = model.engine.passes.head()

    def beside(ended: np.ndarray, temperature: float) -> np.ndarray:
        kept = np.frombuffer(bytearray(recording.states.read(4 * len(ended) * recording.width)), np.float32)
        want = recording.head(kept.reshape(len(ended), recording.width))
        agreeing.add(want, head(ended), temperature)
        return want

    for i, (case, ids) in enumerate(zip(recording.cases, recording.ids, strict=True)):
        progress(f"B, {name}", i, len(recording.cases))
        if model.prompt_ids(case.prompt) != ids:
            raise DgemmaError(
                f"prompt {i + 1} is {len(ids)} tokens to {recording.side.name}, and others to {name}: "
                "their tokenizers or chat templates differ"
            )
        outcomes.append(_write(model, case, ids, recording.seed + i, recording.settings)[0])
        _follow(model, recording.sampler, ids, recording.canvases[i], beside)
        agreeing.canvases += len(recording.canvases[i])
    groups = list(dict.fromkeys(case.group for case in recording.cases))

    def counted(group: str | None) -> Tally:
        chosen = [i for i, case in enumerate(recording.cases) if group in (None, case.group)]
        return tally(group or "", [recording.outcomes[i] for i in chosen], [outcomes[i] for i in chosen])

    return Comparison(
        a=recording.side,
        b=_side(name, model),
        agreement=agreeing.result(),
        total=counted(None),
        groups=tuple(counted(group) for group in groups) if len(groups) > 1 else (),
    )


def _write(
    model: DiffusionGemma, case: Case, ids: list[int], seed: int, settings: Mapping[str, Any]
) -> tuple[Outcome, tuple[np.ndarray, ...]]:
    """Let a model write: what came of it, and for each canvas what its passes read and, last, what was committed."""
    if case.answer is not None:
        model.tokenizer  # noqa: B018 - which says so if there is none
    seed %= 1 << 64
    drafts: list[list[Draft]] = []
    tokens: list[int] = []
    text, done = "", None
    for event in model.stream(ids, seed=seed, **settings):
        match event:
            case Draft():
                if event.step == 0:
                    drafts.append([])
                drafts[-1].append(event)
            case Commit():
                tokens += event.tokens
                text += event.text
            case Done():
                done = event
    assert done is not None
    solved = None if case.answer is None else text.strip() == case.answer.strip()
    outcome = Outcome(tokens=tuple(tokens), steps=done.stats.steps, canvases=done.stats.canvases, solved=solved)
    return outcome, tuple(_trace(several, seed, model.config.vocab_size) for several in drafts)


def _trace(drafts: Sequence[Draft], seed: int, vocab_size: int) -> np.ndarray:
    """Return what the passes over a canvas read and, last, what was committed: int32 [passes + 1, L]."""
    last = drafts[-1].tokens
    first = first_canvas(seed, drafts[0].canvas, len(last), vocab_size)
    return np.stack([first, *(one.following for one in drafts[:-1]), last]).astype(np.int32)  # type: ignore[arg-type]


def _follow(
    model: DiffusionGemma, sampler: SamplerConfig, ids: list[int], canvases: Sequence[np.ndarray],
    take: Callable[[np.ndarray, float], np.ndarray],
) -> None:  # fmt: skip
    """Run a model's pass over every canvas of a trace.

    `take` is given what each ends with, float32 [L, D], and its temperature, and returns A's logits [L, V] of it.
    """
    passes, prefix = model.engine.passes, list(ids)
    ask = partial(model.engine.run, "comparing")  # a pass at a time: an interrupt waits for no more
    for *read, committed in canvases:
        slot = ask(lambda c=committed: passes.open_behind(prefix, len(c)))
        try:
            previous = None
            for i, canvas in enumerate(read):
                temperature = sampler.temperature(i)
                logits = ask(lambda c=canvas, p=previous, t=temperature: take(passes.states(slot, c, p), t))  # noqa: B023
                previous = logits / np.float32(temperature)
        finally:
            ask(lambda: passes.close(slot))  # noqa: B023
        prefix.extend(committed.tolist())


# ---- Models and prompts ---------------------------------------------------------------------------------------


def _open(model: str | Path | DiffusionGemma, ways: Mapping[str, Any], progress: Progress) -> DiffusionGemma:
    if isinstance(model, DiffusionGemma):
        return model
    return load(model, **ways, progress=lambda done, total: progress(f"loading {_name(model)}", done, total))


def _name(model: str | Path | DiffusionGemma) -> str:
    return shown(model.path if isinstance(model, DiffusionGemma) else model)


def _side(name: str, model: DiffusionGemma) -> Side:
    size = Checkpoint.open(model.path).nbytes
    parameters = sum(int(np.prod(shape)) for shape in weights.shapes(model.config).values())
    return Side(
        name=name, backend=model.backend, device=model.device, dtype=model.dtype, bytes=size,
        bits_per_weight=8 * size / parameters,
    )  # fmt: skip


def _check_alike(a: str | Path | DiffusionGemma, b: str | Path | DiffusionGemma) -> None:
    """Refuse models that cannot follow each other, by their headers alone."""

    def config(model: str | Path | DiffusionGemma) -> ModelConfig:
        if isinstance(model, DiffusionGemma):
            return model.config
        checkpoint = Checkpoint.open(resolve(model))
        checkpoint.check()
        return checkpoint.config

    one, other = config(a), config(b)
    for what, first, second in (
        ("vocabulary", one.vocab_size, other.vocab_size),
        ("canvas", one.canvas_length, other.canvas_length),
    ):
        if first != second:
            raise DgemmaError(
                f"{_name(a)} and {_name(b)} cannot be compared: a {what} of {first:,} tokens, and of {second:,}"
            )


def read_prompts(text: str, where: str) -> list[Case]:
    """Read a file of prompts: one a line or, if it begins with `{`, JSON objects of `prompt`, `answer` and `group`.

    Raises:
        DgemmaError: no prompts, or a line that is none; names the line.
    """
    lines = [(i + 1, line) for i, line in enumerate(text.split("\n")) if line.strip()]
    if not lines:
        raise DgemmaError(f"{where}: no prompts in it; expected one a line, or JSON lines with a 'prompt' each")
    if not lines[0][1].lstrip().startswith("{"):
        return [Case(prompt=line.removesuffix("\r")) for _, line in lines]
    cases = []
    for number, line in lines:
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DgemmaError(f"{where}: line {number} is not JSON: {quoted(str(error))}") from None
        if not isinstance(data, dict):
            raise DgemmaError(f"{where}: line {number} is no JSON object; expected one with a 'prompt'")
        cases.append(_case(data, f"{where}: line {number}"))
    return cases


def _case(given: Any, where: str) -> Case:
    if not isinstance(given, Mapping):
        return Case(prompt=given)
    if unknown := [key for key in given if key not in Case.__dataclass_fields__]:
        raise DgemmaError(f"{where}: unknown key {quoted(unknown[0], 40)}; known: prompt, answer, group")
    if not given.get("prompt"):
        raise DgemmaError(f"{where}: no prompt")
    for key in ("answer", "group"):
        if key in given and not isinstance(given[key], str):
            raise DgemmaError(f"{where}: {key} is {quoted(given[key], 40)}, expected text")
    return Case(**given)
