"""What hostile and curious users ask of a canvas: it is done as asked, or refused in one line before any pass."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import dgemma
from dgemma.cli import main
from dgemma.cli.chat import chat
from dgemma.cli.conversation import Conversation, settable
from dgemma.constraints import compile_constraint
from dgemma.constraints.stored import load, save
from dgemma.core.options import GenerateOptions
from dgemma.runtime import DiffusionGemma
from said import says
from tiny import IDS, tiny_checkpoint

OPEN, CLOSE = IDS["<|channel>"], IDS["<channel|>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionGemma:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("hostile"), max_position_embeddings=256, gain=0.3)
    return dgemma.load(folder, backend="numpy", dtype="float32")


# ---- What is no value of an option ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [5, {"x": 1}, {"x", "y"}, (one for one in "xy")])
def test_choices_that_are_no_list_of_texts(value: Any) -> None:
    with says("choices is", "a text or a list of texts"):
        GenerateOptions(choices=value)


def test_no_choices_for_one_of_several_prompts(model: DiffusionGemma) -> None:
    assert GenerateOptions(choices=None).language is None
    made = model.generate(["a", "b"], 16, choices=[None, ["x", "y"]], steps=1)
    assert made[0].token_ids == model.generate("a", 16, steps=1).token_ids and made[1].text in ("x", "y")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"schema": "null"}, ["schema is JSON's null"]), ({"schema": ()}, ["schema"]), ({"dfa": ()}, ["dfa"]),
        ({"choices": []}, ["choices"]),
    ],
)  # fmt: skip
def test_a_language_that_says_nothing_is_not_taken_for_none(
    model: DiffusionGemma, given: dict[str, Any], words: list[str]
) -> None:
    with says(*words):
        model.generate("a", 16, **given)


def test_an_end_token_of_numpy(model: DiffusionGemma) -> None:
    assert model.generate("a", 16, eos=np.int64(20)).token_ids == model.generate("a", 16, eos=20).token_ids


def test_a_type_of_a_long_name_is_refused_in_a_short_line(model: DiffusionGemma) -> None:
    with says("prompt 2: ", "dataclass"):
        model.generate(["a", "b"], 16, schema=[None, type("Long" * 40, (), {})])


def test_a_schema_of_a_file_is_one(model: DiffusionGemma, tmp_path: Path) -> None:
    """Null would be none, and what cannot be read is not said to be no JSON."""
    path = tmp_path / "schema.json"
    path.write_text("null")
    for name, words in ((path, "JSON's null, expected an object"), (tmp_path / "none.json", "none.json: no such file")):
        given = ["generate", "a", "--model", model.path, "--json-schema", name]
        result = CliRunner().invoke(main, list(map(str, given)), prog_name="dgemma")
        assert result.exit_code and words in result.stderr and "is not JSON" not in result.stderr, result.stderr


def test_chat_takes_the_command_lines_names(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "null"}')
    names = ("schema", "thinking_budget")
    options = settable(chat.params, names)
    talk = Conversation(system=None, sampling=dict.fromkeys(names), options=options)
    for name in ("json-schema", "schema"):
        talk.change(name, str(path))
        assert talk.sampling == {"schema": {"type": "null"}, "thinking_budget": None}
        talk.change(name, "default")
        assert talk.sampling["schema"] is None


# ---- Held -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [{16: 30}, [-1] * 16 + [30], {10**9: 30}, {np.uint8(255): 30}])
def test_a_held_token_that_the_answer_has_no_room_for(model: DiffusionGemma, held: Any) -> None:
    with says("held has a token at position", "room for 16"):
        model.generate("a", 16, held=held)
    with says("held has a token at position 12", "room for 6"):
        model.generate([30] * 250, 16, held={12: 30})


def test_free_positions_behind_the_answer_are_nothing(model: DiffusionGemma) -> None:
    held = [-1, 30] + [-1] * 100
    assert model.generate("a", 16, held=held, eos=()).token_ids[1] == 30
    assert model.generate("a", 16, held={10**9: -1}).token_ids == model.generate("a", 16).token_ids


# ---- The thinking budget --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"regex": "a"}])
def test_a_context_that_ends_within_the_thinking_budget(model: DiffusionGemma, given: dict[str, Any]) -> None:
    with says("thinking_budget is 100", "room for 6 tokens"):
        model.generate([30] * 249 + [OPEN], 200, thinking_budget=100, **given)


def test_an_answer_without_room_behind_the_thinking_budget_is_laid_to_it(model: DiffusionGemma) -> None:
    with says("thinking_budget is 12", "at least 21 tokens", "max_new_tokens is 20"):
        model.generate([OPEN, 30], 20, thinking_budget=12, regex="a{8}")


@pytest.mark.parametrize("given", [{}, {"regex": "[ab]{3}"}, {"regex": "[ab]{3}", "greedy": True}])
def test_the_channel_is_closed_by_its_budget(model: DiffusionGemma, given: dict[str, Any]) -> None:
    """At every place of a canvas, its borders too."""
    for budget in (1, 2, 7, 8, 9, 15, 16, 17, 20):
        tokens = model.generate(
            [OPEN, 30], 24, budget, thinking_budget=budget, eos=(1,), canvas_length=8, **given
        ).token_ids  # fmt: skip
        assert CLOSE in tokens[: budget + 1] or OPEN in tokens or 1 in tokens[:budget] or len(tokens) <= budget
        assert not given or CLOSE in tokens[: budget + 1]


# ---- Several prompts ------------------------------------------------------------------------------------------------


def test_which_prompt_cannot_be_answered(model: DiffusionGemma) -> None:
    """Its number, and nothing of the others is left behind."""
    with says("prompt 2: ", "at least 40 tokens"):
        model.generate(["a", "b"], 16, regex=["a", "b{40}"])
    assert model.generate("a", 16, regex="a").text == "a"
    assert model.engine.busy == 0


# ---- Stored automata ------------------------------------------------------------------------------------------------


def test_stored_automata_that_are_damaged(model: DiffusionGemma, tmp_path: Path) -> None:
    """By any bit, any cut: what is there is never trusted and never an error."""
    made = compile_constraint("(foo|ba[rz]){2,5}", model.tokenizer, ends=(1,))
    save(tmp_path, "one", made)
    path = tmp_path / "one.npz"
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    for at in draw.permutation(len(whole))[:400].tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << int(draw.integers(8)))]) + whole[at + 1 :])
        found = load(tmp_path, "one")
        assert found is None or found.key == made.key
        path.write_bytes(whole[:at])
        assert load(tmp_path, "one") is None


def test_a_pipe_in_the_place_of_a_stored_automaton(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "one.npz")
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.append(load(tmp_path, "one")), daemon=True)
    reader.start()
    reader.join(10)
    assert found == [None]


def test_ids_that_are_none_say_what_was_expected(model: DiffusionGemma) -> None:
    for given, words in (
        ({"held": "xyz"}, "held: expected a flat"),
        ({"init": [0.5]}, "init: expected text or a flat"),
    ):
        with says(words):
            model.generate("a", 16, **given)


@pytest.mark.parametrize("given", [{}, {"regex": "[ab]{3}"}, {"regex": "[ab]{3}", "feedback": 1.0, "greedy": True}])
def test_a_channel_that_the_last_pass_opens_is_closed_too(model: DiffusionGemma, given: dict[str, Any]) -> None:
    """No pass is left that could hold its end: what is committed has it, and events say so."""
    opened = 0
    given = {"thinking": True, "thinking_budget": 5, "eos": (1,), "held": {0: OPEN}} | given
    for seed in range(20):
        events = list(model.stream("a", 24, seed, 1, **given))
        tokens = [token for one in events if isinstance(one, dgemma.Commit) for token in one.tokens]
        draft = next(one for one in events if isinstance(one, dgemma.Draft))
        marks = [token for token in tokens[:5] if token in (OPEN, CLOSE)]
        if marks and marks[-1] == OPEN and len(tokens) > 5:
            opened += 1
            assert tokens[5] == CLOSE == draft.tokens[5] and draft.held is not None and draft.held[5]
        text = "".join(one.text for one in events if isinstance(one, dgemma.Commit))
        assert "regex" not in given or re.fullmatch("[ab]{3}", text)
    assert opened > 10
