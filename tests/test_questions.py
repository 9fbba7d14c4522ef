"""Typed questions: their shapes, how they are put, what is made of their readings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma.canvas.questions import Answer, behind, common, joined, labels_of, questions_of, single
from dgemma.core.errors import DgemmaError
from tiny import tiny_checkpoint

STATE = "The bus is late and it rains."
QUESTIONS: dict[str, dict[str, Any]] = {
    "wet": {"type": "noul", "instructions": "Does it rain?", "criteria": {"true": "water falls", "false": "it is dry"}},
    "when": {"type": "choice", "instructions": "When does the bus come?", "criteria": {"now": "", "later": "not yet"}},
    "mood": {"type": "score", "instructions": "How happy are they?", "criteria": ["not at all", "a bit", "very"]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dgemma.DiffusionGemma:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("questions"), max_position_embeddings=16384)
    return dgemma.load(folder, backend="numpy")


def letters(text: str) -> list[int]:
    return list(map(ord, text))


def test_answers_in_the_shape_of_systemone(model: dgemma.DiffusionGemma) -> None:
    answers = model.read(STATE, questions=QUESTIONS)
    made = json.loads(json.dumps({name: answer.as_dict() for name, answer in answers.items()}))
    beside = {"label_mass", "entropy", "argmax_is_label"}
    assert made["wet"].keys() == {"type", "noul"} | beside
    assert made["when"].keys() == {"type", "choice", "confidence", "probabilities"} | beside
    assert made["mood"].keys() == {"type", "score", "confidence", "legend", "probabilities"} | beside
    assert [one["type"] for one in made.values()] == ["noul", "choice", "score"]
    assert made["when"]["choice"] in ("now", "later") and list(made["when"]["probabilities"]) == ["now", "later"]
    assert made["mood"]["legend"] == {"0": "not at all", "1": "a bit", "2": "very"}
    shares = made["mood"]["probabilities"]
    assert made["mood"]["score"] == pytest.approx(shares["1"] + 2 * shares["2"])
    assert sum(shares.values()) == pytest.approx(1)
    assert isinstance(answers["wet"], Answer) and 0 < made["wet"]["noul"] < 1
    assert made["wet"]["noul"] == answers["wet"].score == answers["wet"].probabilities["true"]


def test_an_answer_is_the_reading_of_its_letters(model: dgemma.DiffusionGemma) -> None:
    (question,) = questions_of({"when": QUESTIONS["when"]})
    text, template = single(question, ["A", "B"])
    found = model.read(behind(STATE, text), ["A", "B"], template=template)
    answer = model.read(STATE, questions={"when": QUESTIONS["when"]})["when"]
    assert list(answer.probabilities.values()) == pytest.approx(list(found.probabilities.values()), abs=1e-5)
    assert answer.label_mass == pytest.approx(found.label_mass, rel=1e-3)
    assert answer.entropy == pytest.approx(found.entropy, abs=1e-5)


def test_joint_is_one_canvas_with_a_line_each(model: dgemma.DiffusionGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    some = questions_of(QUESTIONS)
    labels = [["A", "B"], ["A", "B"], ["A", "B", "C"]]
    text, template = joined(some, labels)
    assert template == "1: <read>\n2: <read>\n3: <read>"
    assert "2. When does the bus come?\nA: now\nB: later (not yet)\n\n3. How happy" in text
    found = model.read(behind(STATE, text), labels, template=template)
    scores, sizes = model.engine.passes.scores, list[int]()
    monkeypatch.setattr(
        model.engine.passes, "scores", lambda slots, *rest: sizes.append(len(slots)) or scores(slots, *rest)
    )
    answers = model.read(STATE, questions=QUESTIONS, joint=True)
    assert sizes == [1]
    for one, answer in zip(found, answers.values(), strict=True):
        assert list(answer.probabilities.values()) == pytest.approx(list(one.probabilities.values()), abs=1e-5)


def test_each_by_itself_whatever_else_is_asked(model: dgemma.DiffusionGemma) -> None:
    whole = model.read(STATE, questions=QUESTIONS)
    for name, one in QUESTIONS.items():
        alone = model.read(STATE, questions={name: one})[name]
        assert list(alone.probabilities.values()) == pytest.approx(list(whole[name].probabilities.values()), abs=1e-3)


def test_a_state_is_read_once(model: dgemma.DiffusionGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    state = "A long story. " * 80
    before, counts = model.engine.passes.read, list[int]()
    monkeypatch.setattr(
        model.engine.passes, "read", lambda rows: counts.append(sum(len(x) for _, x in rows)) or before(rows)
    )
    for i in range(3):
        model.read(state, questions={f"{i}{j}": QUESTIONS["wet"] | {"instructions": f"{i}{j}?"} for j in range(10)})
    size = len(model.prompt_ids(state))
    assert sum(counts) < size + 30 * 150 and max(counts) <= 512


def test_openai_and_systemone_are_one_record() -> None:
    ours = questions_of({"q": {"type": "choice", "instructions": "Which?", "criteria": {"a": "one", "b": None}}})
    given = [{"name": "a", "description": "one"}, "b"]
    theirs = questions_of([{"name": "q", "type": "choice", "instructions": "Which?", "choices": given}])
    assert ours == theirs
    score = questions_of([{"name": "q", "type": "score", "instructions": "?", "levels": ["low", "high"]}])
    assert score[0].options == (("low", ""), ("high", ""))
    predicate, yes_no = (questions_of({"q": {"type": t, "instructions": "?"}})[0] for t in ("predicate", "yes_no"))
    assert predicate.kind == yes_no.kind == "predicate" and predicate.options == (("yes", ""), ("no", ""))


def test_states_of_every_kind(model: dgemma.DiffusionGemma) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert behind(chat, "Q")[2] == {"role": "user", "content": "Q"}
    assert behind({"a": [1, None]}, "Q") == '{"a": [1, null]}\n\nQ' and behind("", "Q") == "Q" and behind(None, "Q")
    for state in (chat, {"a": [1, "ü"]}, 5, [1.5, "x"], ""):
        assert model.read(state, questions={"wet": QUESTIONS["wet"]})["wet"].label_mass > 0
    with pytest.raises(DgemmaError, match="the prompt is token ids"):
        model.read([5, 6], questions=QUESTIONS)
    with pytest.raises(DgemmaError, match="the state is"):
        model.read({"a": {1, 2}}, questions=QUESTIONS)


# ---- Labels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 26, 27, 255])
def test_labels_of_one_length(count: int) -> None:
    made = labels_of(count, letters)
    assert len(set(made)) == count and len({len(one) for one in made}) == 1 and made[0] in ("A", "AA")
    single_pairs = labels_of(count, lambda text: [1] if len(text) == 1 or text[0] in "AEIOUKLMNPQR" else [1, 2])
    assert len(set(single_pairs)) == count and all(len(x) == 1 or x[0] in "AEIOUKLMNPQR" for x in single_pairs)


def test_255_options(model: dgemma.DiffusionGemma) -> None:
    question = {"type": "choice", "instructions": "Which?", "criteria": {f"n{i}": "" for i in range(255)}}
    answer = model.read(STATE, questions={"q": question})["q"]
    assert len(answer.probabilities) == 255 and sum(answer.probabilities.values()) == pytest.approx(1)


def test_confidence() -> None:
    def answer(kind: str, shares: list[float]) -> Answer:
        levels = [str(i) for i in range(len(shares))]
        (question,) = questions_of({"q": {"type": kind, "instructions": "?", "criteria": levels}})
        return Answer(
            question=question, probabilities=dict(zip(levels, shares, strict=True)), label_mass=1.0, entropy=0.0,
            argmax_is_label=True,
        )  # fmt: skip

    assert answer("choice", [0.25] * 4).confidence == pytest.approx(0)
    assert answer("choice", [0, 1, 0]).confidence == pytest.approx(1)
    assert answer("choice", [0.7, 0.3]).confidence == pytest.approx(0.4)
    assert answer("score", [0, 0, 1]).confidence == pytest.approx(1)
    assert answer("score", [1 / 3] * 3).confidence == pytest.approx(0)
    assert answer("score", [0.6, 0.4, 0]).confidence == pytest.approx(1 - 0.4 / 1)
    assert answer("score", [0.4, 0, 0.2, 0.4]).confidence == 0


def test_common_beginnings() -> None:
    assert common([(1, 2, 3), (1, 2, 4), (1, 2)]) == (1, 2) and common([(5,)]) == (5,) and common([(1,), (2,)]) == ()
    draw = np.random.default_rng(0)
    for _ in range(100):
        prompts = [tuple(draw.integers(0, 2, draw.integers(1, 6)).tolist()) for _ in range(draw.integers(1, 5))]
        size = len(common(prompts))
        assert len({one[:size] for one in prompts}) == 1
        assert len({one[: size + 1] for one in prompts}) > 1 or min(map(len, prompts)) == size


# ---- What is refused --------------------------------------------------------------------------------------------


MANY = dict.fromkeys(map(str, range(256)))


@pytest.mark.parametrize(
    ("match", "given"),
    [
        ("questions is 'x', expected a table", "x"),
        ("questions: 0 are given", {}),
        ("question 1: name is None", [{"type": "noul", "instructions": "?"}]),
        ("question 'q' is there twice", [{"name": "q", "type": "noul", "instructions": "?"}] * 2),
        ("question 'q' is 5, expected an object", {"q": 5}),
        ("question 'q': type is 'maybe', expected noul", {"q": {"type": "maybe"}}),
        ("question 'q': type is None", {"q": {}}),
        ("question 'q': 'critera' is unknown", {"q": {"type": "noul", "critera": {}}}),
        ("question 'q': instructions is 5", {"q": {"type": "noul", "instructions": 5}}),
        ("question 'q': instructions are missing", {"q": {"type": "noul"}}),
        ("question 'q': criteria is {'maybe'", {"q": {"type": "noul", "criteria": {"maybe": "x"}}}),
        ("question 'q': criteria is None, expected names", {"q": {"type": "choice"}}),
        ("question 'q': criteria has 256, expected from 2 to 255", {"q": {"type": "choice", "criteria": MANY}}),
        ("question 'q': choices has 1", {"q": {"type": "choice", "choices": ["a"]}}),
        ("question 'q': choices holds 'a' twice", {"q": {"type": "choice", "choices": ["a", "a"]}}),
        ("question 'q': choices holds 5", {"q": {"type": "choice", "choices": [5, "a"]}}),
        ("question 'q': criteria and choices are", {"q": {"type": "choice", "choices": ["a"], "criteria": ["a"]}}),
        ("question 'q': levels has 11, expected from 2 to 10", {"q": {"type": "score", "levels": list("abcdefghijk")}}),
        ("question 'q': criteria is {'a': 'x'}, expected a list", {"q": {"type": "score", "criteria": {"a": "x"}}}),
    ],
)  # fmt: skip
def test_refused_by_name(match: str, given: Any, model: dgemma.DiffusionGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.engine.passes, "read", None)
    with pytest.raises(DgemmaError, match=match) as error:
        model.read(STATE, questions=given)
    assert "\n" not in str(error.value)


def test_refused_together(model: dgemma.DiffusionGemma) -> None:
    with pytest.raises(DgemmaError, match="questions have choices and a template of their own"):
        model.read(STATE, ["a", "b"], questions=QUESTIONS)
    with pytest.raises(DgemmaError, match="joint: the answers to 100 questions take"):
        model.read(STATE, questions={str(i): QUESTIONS["wet"] for i in range(100)}, joint=True)


def test_a_tiny_checkpoint_of_another_end(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, generation={"eos_token_id": 1})
    assert dgemma.load(folder, backend="numpy").read("x", questions={"wet": QUESTIONS["wet"]})["wet"].label_mass > 0
