"""`generate` over many prompts and samples, its options, and canvases of any length."""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma.cli import options as command
from dgemma.core.options import SAID, GenerateOptions, Options, spread
from dgemma.core.random import step_noise
from dgemma.runtime import DiffusionGemma
from said import says
from tiny import tiny_checkpoint

BOARDS = [".24.\n....\n.1.3\n..1.", "....\n.43.\n....\n4.21"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> DiffusionGemma:
    return dgemma.load(tiny_checkpoint(tmp_path_factory.mktemp("generate"), canvas_length=16), backend="numpy")


# ---- Options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [DiffusionGemma.stream, DiffusionGemma.generate])
def test_an_option_is_declared_once(method: Any) -> None:
    """What the declaration says is what both methods take, with its defaults, and what commands take but for some."""
    taken = {name: one.default for name, one in signature(method).parameters.items()}
    for name in ("self", "prompt", "n", "options"):
        taken.pop(name, None)
    declared = {one.name: one.default for one in fields(GenerateOptions)}
    assert taken == {name: declared[name] for name in taken}
    assert declared.keys() == taken.keys() | Options.__annotations__.keys()
    for name in Options.__annotations__:
        assert f" {name}: " in (DiffusionGemma.stream.__doc__ or "")
    params: set[str] = set()
    for decorate in (command.sampling_options, command.raw_option, command.specials_option):
        params |= {one.name for one in decorate(lambda: None).__click_params__}  # type: ignore[attr-defined]
    assert params == SAID.keys() - set(command.UNASKED)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"canvas_length": 0}, ["canvas_length is 0", "from 1"]), ({"canvas_length": True}, ["canvas_length is true"]),
        ({"canvas_length": "short"}, ["canvas_length is 'short'", "'fit'"]),
        ({"canvas_length": 513}, ["canvas_length is 513", "context is 512"]),
        ({"max_new_tokens": 0}, ["max_new_tokens is 0"]), ({"seed": -1}, ["seed is -1"]),
        ({"thinking": "no"}, ["thinking is 'no'", "True or False"]), ({"stop": ["a", ""]}, ["stop"]),
        ({"n": 0}, ["n is 0"]), ({"seed": [1]}, ["seed is [1]"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(tiny: DiffusionGemma, given: dict[str, Any], words: list[str]) -> None:
    with says(*words):
        tiny.generate([5, 6], **{"max_new_tokens": 4} | given)


def test_a_canvas_that_no_memory_holds_is_refused_with_the_numbers(
    tiny: DiffusionGemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgemma.core.memory.total", lambda: 1_000_000)
    with says("a canvas of 400 positions takes 0.0 GB", "smaller canvas_length"):
        tiny.generate([5], canvas_length=400)


def test_lists_of_values_are_for_each_prompt() -> None:
    seeds = spread({"seed": [3, 4], "stop": ["a", "b"], "eos": (5, 6), "steps": 2}, 2)
    assert [(one.seed, one.stop, one.eos, one.steps) for one in seeds] == [
        (3, ["a", "b"], (5, 6), 2), (4, ["a", "b"], (5, 6), 2),
    ]  # fmt: skip
    each = spread({"stop": [["a"], "b"], "eos": ([5], None)}, 2)
    assert [(one.stops, one.eos) for one in each] == [(("a",), [5]), (("b",), None)]
    with says("seed has 3 values for 2 prompts"):
        spread({"seed": [1, 2, 3]}, 2)


def test_a_draft_says_what_the_next_pass_reads(tiny: DiffusionGemma) -> None:
    """What is accepted, as it was drawn, and the noise of the pass elsewhere."""
    drafts = [one for one in tiny.stream([5, 6], 16, seed=3, greedy=True) if isinstance(one, dgemma.Draft)]
    for one in drafts:
        noise = step_noise(seed=3, canvas=0, step=one.step + 1, length=16, vocab_size=tiny.config.vocab_size)[1]
        assert one.following is not None
        np.testing.assert_array_equal(one.following, np.where(one.accepted, one.tokens, noise))


# ---- Many prompts -----------------------------------------------------------------------------------------------


def test_prompts_side_by_side_are_answered_as_alone() -> None:
    nano = dgemma.load("nano", backend="numpy", rows=3)
    prompts: list[Any] = [*BOARDS, [{"role": "user", "content": BOARDS[0]}], nano.prompt_ids(BOARDS[1]), BOARDS[0]]
    lengths, seeds = [48, 9, 48, 20, 48], [1, 2, 3, 1, 1]
    alone = [nano.generate(p, m, s) for p, m, s in zip(prompts, lengths, seeds, strict=True)]
    made = nano.generate(prompts, lengths, tuple(seeds))
    assert [one.token_ids for one in made] == [one.token_ids for one in alone]
    assert [one.text for one in made] == [one.text for one in alone]
    assert nano.engine.busy == 0


def test_what_a_list_is(tiny: DiffusionGemma) -> None:
    """Of integers or of messages it is one prompt; of texts and lists it is several."""
    one: Any = {"max_new_tokens": 4}
    assert isinstance(tiny.generate([5, 6], **one), dgemma.Generation)
    assert isinstance(tiny.generate([{"role": "user", "content": "a"}], **one), dgemma.Generation)
    for several in (["a"], [[5, 6]], [(5, 6)], [[{"role": "user", "content": "a"}]], ("a", [5])):
        made: Any = tiny.generate(several, **one)
        assert isinstance(made, list) and len(made) == len(several)
    with says("the prompt is empty"):
        tiny.generate([])
    with says("prompt 2: the prompt is empty"):
        tiny.generate([[5], []])


def test_samples_read_their_prompt_once(tmp_path: Path) -> None:
    model = dgemma.load(tiny_checkpoint(tmp_path, canvas_length=16), backend="numpy", prefix_bytes=0)
    prompts = [list(range(20, 40)), list(range(40, 70))]
    alone = [[model.generate(ids, 24, seed).token_ids for seed in (7, 8, 9)] for ids in prompts]
    read: list[int] = []
    whole = model.engine.passes.read
    model.engine.passes.read = lambda rows: (read.append(sum(len(ids) for _, ids in rows)), whole(rows))[1]  # type: ignore[method-assign]
    made = model.generate(prompts, 24, 7, n=3)
    assert [[one.token_ids for one in several] for several in made] == alone
    assert sum(read) == 20 + 30 + 6 * 16  # and a canvas of each
    assert [one.stats.cached_tokens for one in made[1]] == [0, 30, 30]
    assert [one.token_ids for one in model.generate(prompts[0], 24, 7, n=3)] == alone[0]


def test_an_error_ends_them_all(tiny: DiffusionGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise dgemma.DgemmaError("broken")

    monkeypatch.setattr(tiny.engine.passes, "step", broken)
    with says("broken"):
        tiny.generate([[5], [6], [7]], 4)
    assert tiny.engine.run("looking", lambda: None) is None and tiny.engine.busy == 0


# ---- Canvases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 16, 40])
def test_a_canvas_of_any_length(tiny: DiffusionGemma, length: int) -> None:
    drafts = [one for one in tiny.stream([5, 6], 40, canvas_length=length, eos=()) if isinstance(one, dgemma.Draft)]
    assert {one.tokens.shape for one in drafts} == {(length,)}
    assert drafts[-1].canvas == -(-40 // length) - 1


def test_fit_shrinks_the_last_canvas_alone(tmp_path: Path) -> None:
    model = dgemma.load(tiny_checkpoint(tmp_path, canvas_length=48), backend="numpy")

    def lengths(**options: Any) -> list[int]:
        events = [one for one in model.stream([5], 60, eos=(), **options) if isinstance(one, dgemma.Draft)]
        return [next(len(one.tokens) for one in events if one.canvas == i) for i in range(2)]

    assert lengths() == [48, 48] and lengths(canvas_length="fit") == [48, 16]
    whole, fitted = (model.generate([5], 60, eos=(), canvas_length=one).token_ids for one in (None, "fit"))
    assert whole[:48] == fitted[:48] and len(whole) == len(fitted) == 60


def test_what_an_engine_has_room_for_is_an_option_of_load(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    model = dgemma.load(folder, backend="numpy", rows=2, prefix_bytes=0)
    assert (model.engine.most_rows, model.engine.prefixes.budget) == (2, 0)
    for given, words in (({"rows": 0}, "rows is 0"), ({"prefix_bytes": "much"}, 'prefix_bytes is "much"')):
        with says(words):
            dgemma.load(folder, backend="numpy", **given)


def test_numbers_of_numpy_are_numbers(tiny: DiffusionGemma) -> None:
    want = tiny.generate([5, 6, 7], 8, 3, 1, canvas_length=16).token_ids
    given = np.int64(8), np.int64(3), 1
    assert tiny.generate([5, 6, 7], *given, canvas_length=np.int16(16)).token_ids == want  # type: ignore[arg-type]
    assert len(tiny.generate([5, 6, 7], 8, np.uint64((1 << 64) - 1), 1, n=2)) == 2  # type: ignore[arg-type]
