"""What is committed always parses: whole generations in a language, of models that would never have said it."""

from __future__ import annotations

import json
import os
import random
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma.core.errors import DgemmaError
from dgemma.runtime import DiffusionGemma
from said import says
from test_constraints_regex import written
from test_constraints_schema import judged, random_schema
from tiny import tiny_checkpoint

PATTERNS = int(os.environ.get("DGEMMA_TEST_PATTERNS", "40"))
"""Random patterns; the figure in docs/LOG.md is of 2,000, and of 200 schemas."""
SCHEMAS = int(os.environ.get("DGEMMA_TEST_SCHEMAS", "12"))

BOARD = ".24.\n....\n.1.3\n..1."


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DiffusionGemma]:
    folder = tiny_checkpoint(
        tmp_path_factory.mktemp("constrained"), max_position_embeddings=2048, canvas_length=24, gain=0.3
    )  # rows beside each other round otherwise, and at full strength a random model makes much of that
    return {name: dgemma.load(folder, backend=name, dtype="float32", prefix_bytes=0) for name in ("numpy", "torch")}


def test_random_patterns_are_matched(models: dict[str, DiffusionGemma]) -> None:
    """Of random weights, over several canvases, and cut by a budget that they only just fit."""
    told = 0
    for seed in range(PATTERNS):
        draw = random.Random(seed)
        pattern, model = written(draw, 3), models["numpy" if seed % 8 == 0 else "torch"]
        options: dict[str, Any] = {
            "steps": draw.choice([1, 2, 3]), "max_new_tokens": draw.choice([5, 24, 60]), "seed": seed,
            "canvas_length": draw.choice([8, 24, None]), "greedy": draw.random() < 0.3,
            "feedback": draw.choice([None, 0.0, 0.5, 1.0]),
        }  # fmt: skip
        try:
            made = model.generate("a", regex=pattern, **options)
        except DgemmaError as error:
            assert "needs at least" in str(error) or "matches no text" in str(error), (pattern, error)
            told += 1
            continue
        assert re.fullmatch(pattern, made.text), (pattern, made.text)
        assert made.stats.log_accept is not None and made.stats.log_accept <= 1e-3
    assert told < PATTERNS / 2


def test_random_schemas_are_obeyed(models: dict[str, DiffusionGemma]) -> None:
    for seed in range(SCHEMAS):
        schema = random_schema(random.Random(seed), 2)
        made = models["torch"].generate("a", max_new_tokens=400, steps=1, seed=seed, schema=schema)
        judged(schema, made.text)
        assert made.parsed == json.loads(made.text)


def test_a_character_of_four_tokens(models: dict[str, DiffusionGemma]) -> None:
    """Bytes of an emoji are tokens of their own, and fall on both sides of a canvas's border."""
    for model in models.values():
        made = model.generate("a", regex="(?:😀|€){5}", canvas_length=7, steps=2)
        assert re.fullmatch("(?:😀|€){5}", made.text)


def test_backends_choose_the_same(models: dict[str, DiffusionGemma]) -> None:
    for pattern in ("[a-f]{30}", r"\d+(,\d+){3}", "(foo|bar)+"):
        texts = {m.generate("a", regex=pattern, max_new_tokens=48, steps=4, seed=3).text for m in models.values()}
        assert len(texts) == 1


def test_rows_of_several_languages_and_none(models: dict[str, DiffusionGemma]) -> None:
    """Side by side each writes what it writes alone."""
    model, patterns = models["torch"], ["[ab]{9}", None, "[0-9]{30}", "[ab]{9}", None]
    alone = [model.generate("a", 40, seed, regex=one).token_ids for seed, one in enumerate(patterns)]
    made = model.generate(["a"] * 5, 40, seed=[0, 1, 2, 3, 4], regex=patterns)
    assert [one.token_ids for one in made] == alone


def test_held_tokens_in_a_language(models: dict[str, DiffusionGemma]) -> None:
    model = models["torch"]
    at = {2: model.tokenizer.encode("x")[0], 30: model.tokenizer.encode("7")[0]}
    for seed in range(4):
        made = model.generate("a", 48, seed, regex="[a-z]{8}[0-9]{28}", held=at)
        assert re.fullmatch("[a-z]{8}[0-9]{28}", made.text) and (made.text[2], made.text[30]) == ("x", "7")
    with says("held", "position 2"):
        model.generate("a", regex="[0-9]{8}", held=at)


def test_thinking_before_the_answer_is_free(models: dict[str, DiffusionGemma]) -> None:
    made = models["torch"].generate("a", 120, thinking=True, thinking_budget=20, regex="[xy]{10}", canvas_length=16)
    assert re.fullmatch("[xy]{10}", made.text)


@dataclass
class Point:
    x: int
    name: str


def test_an_answer_is_an_object_of_its_schema(models: dict[str, DiffusionGemma]) -> None:
    made = models["torch"].generate("a", 200, schema=Point, steps=2)
    assert isinstance(made.parsed, Point) and made.parsed.x == json.loads(made.text)["x"]
    one, other = models["torch"].generate(["a", "b"], 200, schema=[Point, None], steps=2)
    assert isinstance(one.parsed, Point) and other.parsed is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"regex": "a{50}", "max_new_tokens": 20}, ["at least 50", "max_new_tokens is 20"]),
        ({"regex": "a", "stop": "b"}, ["regex and stop"]), ({"regex": "a", "eos": ()}, ["eos is empty"]),
        ({"regex": "a", "choices": ["b"]}, ["regex and choices"]), ({"regex": "("}, ["regular expression"]),
        ({"regex": 3}, ["regex is of type int"]), ({"dfa": "a"}, ["dfa is of type str", "from_states"]),
        ({"choices": []}, ["choice"]), ({"choices": ["a", 3]}, ["choices"]), ({"feedback": 0.5}, ["feedback"]),
        ({"feedback": 2, "regex": "a"}, ["feedback is 2"]), ({"schema": "{"}, ["schema is no JSON"]),
        ({"schema": {"type": "thing"}}, ["thing"]), ({"thinking_budget": 32}, ["thinking_budget is 32"]),
        ({"held": {-1: 5}}, ["position of held"]), ({"held": [5, 9999]}, ["token of held is 9999"]),
        ({"strength": 1.5, "init": "a"}, ["strength is 1.5"]), ({"strength": 0.5}, ["strength", "init"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_before_any_pass(
    models: dict[str, DiffusionGemma], given: dict[str, Any], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["numpy"]
    monkeypatch.setattr(model.engine.passes, "read", None)
    with says(*words):
        model.generate("a", **{"max_new_tokens": 32} | given)


def test_nano_keeps_its_form() -> None:
    """A model that knows the format loses nothing by it."""
    nano = dgemma.load("nano", backend="torch", dtype="float32")
    made = nano.generate(BOARD, regex=r"(?:[1-4]{4}\n){3}[1-4]{4}")
    assert made.text == nano.generate(BOARD).text
    assert made.stats.log_accept is not None and made.stats.log_accept > -0.1


def test_a_draft_is_kept_as_far_as_strength_says(models: dict[str, DiffusionGemma]) -> None:
    model, draft = models["torch"], "a draft that goes over two canvases"
    kept = model.generate("a", len(draft), init=draft, strength=0)
    assert kept.text == draft and kept.stats.steps == 0
    first = next(one for one in model.stream("a", 24, init=draft, strength=0.5) if isinstance(one, dgemma.Draft))
    assert first.held is None
    forgotten, plain = (model.generate("a", 24, **given) for given in ({"init": draft, "strength": 1}, {}))
    assert forgotten.token_ids == plain.token_ids


def test_a_draft_begins_the_canvas(models: dict[str, DiffusionGemma], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of its tokens as strength says are in what the first pass reads."""
    model, seen = models["numpy"], []
    step = model.engine.passes.step
    monkeypatch.setattr(model.engine.passes, "step", lambda slots, draws, starts: (
        seen.extend(starts.values()), step(slots, draws, starts))[1])  # fmt: skip
    draft = model.tokenizer.encode("x" * 24)
    for strength in (0.25, 0.75):
        seen.clear()
        for seed in range(20):
            model.generate("a", 24, seed, 1, init=draft, strength=strength)
        share = np.mean(np.stack(seen) == draft[0])
        assert abs(share - (1 - strength)) < 0.1


def test_an_answer_behind_all_of_the_thinking_has_to_fit(models: dict[str, DiffusionGemma]) -> None:
    model = models["torch"]
    with says("needs at least 51 tokens", "max_new_tokens is 50"):
        model.generate("a", 50, thinking=True, thinking_budget=20, regex="a{30}")
    assert model.generate("a", 51, thinking=True, thinking_budget=20, regex="a{30}", steps=2).text == "a" * 30


def test_a_row_that_cannot_go_on_ends_alone(models: dict[str, DiffusionGemma], monkeypatch: pytest.MonkeyPatch) -> None:
    from dgemma.constraints.walk import Walk

    model, choose = models["numpy"], Walk.choose

    def failing(self: Walk, *arguments: Any, **options: Any) -> Any:
        if options["uniforms"][0] == first:
            raise DgemmaError("this one cannot go on")
        return choose(self, *arguments, **options)

    from dgemma.core.random import step_noise

    first = step_noise(seed=1, canvas=0, step=1, length=24, vocab_size=model.config.vocab_size)[0][0]
    monkeypatch.setattr(Walk, "choose", failing)
    streams = [model.stream("a", 20, seed, regex="[ab]{9}") for seed in (0, 1)]
    assert [type(one).__name__ for one in streams[0]][-1] == "Done"
    with says("this one cannot go on"):
        list(streams[1])
    assert model.engine.busy == 0
