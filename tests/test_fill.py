"""Fill: what is outside holes comes back byte for byte, holes have their lengths, and no control token is in them."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import dgemma
from dgemma.canvas.borders import Speller
from dgemma.canvas.candidate import Filled
from dgemma.canvas.edit import job_of as edit_job
from dgemma.canvas.fill import job_of
from dgemma.canvas.holes import Hole, escaped, marked, template_of
from dgemma.canvas.language import Room, any_text, language_of
from dgemma.canvas.lengths import spread
from dgemma.canvas.windows import next_start, window_at
from dgemma.constraints.automaton import TokenAutomaton
from dgemma.core.events import Commit, Done, Draft
from dgemma.core.options import GenerateOptions
from dgemma.text.tokens import Tokenizer
from said import says
from spellings import KINDS, checkpoint
from tiny import IDS, tiny_checkpoint

CUTS = 1000 if os.environ.get("DGEMMA_ALL_CUTS") else 60
"""Random cuts of real files; all of them take minutes."""

CONTROL = set(IDS.values())


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fill")


@pytest.fixture(scope="module")
def models(where: Path) -> Iterator[dict[str, dgemma.DiffusionGemma]]:
    yield {kind: dgemma.load(checkpoint(where, kind), backend="torch") for kind in KINDS}


@pytest.fixture(scope="module")
def model(models: dict[str, dgemma.DiffusionGemma]) -> dgemma.DiffusionGemma:
    return models["gemma"]


@pytest.fixture(scope="module")
def nano() -> dgemma.DiffusionGemma:
    return dgemma.load(backend="torch")


# ---- Markers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, pieces, lengths",
    [
        ("a<fill>b", ("a", "b"), (None,)),
        ("<fill:12>", ("", ""), (12,)),
        ("<fill><fill:1>", ("", "", ""), (None, 1)),
        ("<fill:>x<fill>", ("<fill>x", ""), (None,)),
        ("<fill::12>x<fill:3>", ("<fill:12>x", ""), (3,)),
        ("<fill::><fill>", ("<fill:>", ""), (None,)),
        ("<fill12><FILL>< fill><fill>", ("<fill12><FILL>< fill>", ""), (None,)),
    ],
)
def test_markers(text: str, pieces: tuple[str, ...], lengths: tuple[int | None, ...]) -> None:
    template = template_of(text)
    assert template.pieces == pieces
    assert tuple(hole.length for hole in template.holes) == lengths
    assert template_of(marked(template)) == template
    parts = [part for pair in zip(pieces, template.holes, strict=False) for part in pair]
    assert template_of([*parts, pieces[-1]]) == template


@pytest.mark.parametrize("text", ["<fill>", "<fill:>", "<fill:3>", "<fill::3> <fill:::>", "[[?]] \\<fill>", ""])
def test_every_text_can_be_written(text: str) -> None:
    for marker in ("<fill>", "[[?]]", "____"):
        assert template_of(f"{escaped(text, marker)}{marker}", marker).pieces == (text, "")


def test_another_marker() -> None:
    template = template_of("a ____ b [[?]] <fill>", "[[?]]")
    assert template.pieces == ("a ____ b ", " <fill>")
    assert template_of("[[?]:4]", "[[?]]").holes == (Hole(4),)


# ---- Borders --------------------------------------------------------------------------------------------------------

HOSTILE = (
    "", " ", "  ", "\n", "\r\n", "\r", "\t", "\n\n    ", "\0", "a\0b", "e\u0301", "\u0301", "é", "\u00e9\u0301x",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\ufe0f", "한국어", "नि", " x", "x ", "\u00a0", "\u2028", "\ufeffx",
    "▁", "▁▁a", "<0x41>", "<bos>", "<|turn>user", "</s>", "Ġ", "\ufffd", "\U0010ffff", "    return x\n", "ab" * 40,
    "\x1b[0m", "İ", "ß", "ﬁ", "Å\u030a",
)  # fmt: skip


def writable(kind: str) -> list[str]:
    """Those that a tokenizer has tokens for; what stands for a space is, to one of them, nothing but that."""
    return [text for text in HOSTILE if kind != "metaspace" or "▁" not in text]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_spell_themselves(models: dict[str, dgemma.DiffusionGemma], kind: str) -> None:
    tokenizer = models[kind].tokenizer
    speller = Speller(tokenizer)
    letter = tokenizer.encode("a")
    for before in writable(kind):
        for piece in (before, before + "x", "x" + before, before * 3):
            ids = speller.ids(piece)
            assert not CONTROL & set(ids)
            assert tokenizer.decode([*letter, *ids], special=True) == tokenizer.decode(letter, special=True) + piece
            assert speller.text(ids) == piece
            first = speller.ids(piece, first=True)
            assert speller.text(first) in (piece, " " + piece)


def test_what_cannot_be_written_is_named(where: Path) -> None:
    loaded = dgemma.load(checkpoint(where, "lower"), backend="torch")
    assert loaded.fill("abc<fill:2> é").text.startswith("abc")
    assert loaded.fill("Abc<fill:2>").text.startswith("Abc")  # in bytes
    with says("'\\u2581'", "cannot write exactly"):
        dgemma.load(checkpoint(where / "again", "metaspace"), backend="torch").fill("▁<fill>")
    folder = tiny_checkpoint(where, name="wordless")
    data = (
        '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<pad>": 0, "<eos>": 1, "a": 2, "[UNK]": 3}, '
        '"unk_token": "[UNK]"}}'
    )
    (folder / "tokenizer.json").write_text(data)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    with says("'b'", "cannot write exactly"):
        dgemma.load(folder, backend="torch").fill("b<fill>")


# ---- Fills ----------------------------------------------------------------------------------------------------------


def check(result: Filled, text: str) -> None:
    template = template_of(text)
    at = 0
    for piece, hole, filling in zip(template.pieces, template.holes, result.holes, strict=False):
        assert result.text[at : at + len(piece)] == piece
        at += len(piece)
        assert (filling.start, filling.end) == (at, at + len(filling.text))
        assert result.text[at : filling.end] == filling.text
        at = filling.end
        assert hole.length is None or len(filling.token_ids) == hole.length
        assert not CONTROL & set(filling.token_ids)
        assert len(filling.log_probabilities) - len(filling.token_ids) in (0, 1)
        assert all(x <= 0 for x in filling.log_probabilities)
    assert result.text[at:] == template.pieces[-1]
    assert np.isfinite(result.score)


def files() -> list[Path]:
    folder = Path(os.__file__).parent
    return sorted(
        [*folder.glob("*.py"), *folder.glob("pydoc_data/*.py"), *folder.glob("email/*.rst"), *folder.glob("*.txt")]
    )


@cache
def text_of(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def cut(seed: int) -> str:
    """A stretch of a real file with some of it cut out."""
    draw = random.Random(seed)
    text = text_of(draw.choice(files()))
    start = draw.randrange(max(len(text) - 400, 1))
    text = text[start : start + draw.randrange(20, 400)]
    places = sorted(draw.randrange(len(text) + 1) for _ in range(2 * draw.choice((1, 1, 1, 2, 3))))
    parts, at = [], 0
    for begin, end in zip(places[::2], places[1::2], strict=True):
        hole = draw.choice(("<fill>", f"<fill:{draw.randrange(1, 40)}>"))
        parts += [escaped(text[at:begin]), hole]
        at = end
    return "".join([*parts, escaped(text[at:])])


@pytest.mark.parametrize("part", range(5))
def test_cuts_of_real_files(models: dict[str, dgemma.DiffusionGemma], part: int) -> None:
    for seed in range(part, CUTS, 5):
        loaded, text = models[KINDS[seed // 5 % len(KINDS)]], cut(seed)
        prompt = None if seed % 3 else "Complete this."
        check(loaded.fill(text, prompt, steps=2, seed=seed), text)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_surroundings(models: dict[str, dgemma.DiffusionGemma], kind: str) -> None:
    for i, piece in enumerate(writable(kind)):
        text = f"{escaped(piece)}<fill:3>{escaped(piece)}<fill>{escaped(piece)}"
        check(models[kind].fill(text, None if i % 2 else "x", steps=1, max_new_tokens=3), text)


@pytest.mark.parametrize(
    "text",
    ["<fill>", "<fill:1>", "<fill><fill>", "<fill:3><fill><fill:2><fill>", "<fill:40>x", "a<fill:70>", "<fill:33>"],
)
@pytest.mark.parametrize("prompt", [None, "Write."])
def test_holes_alone_and_side_by_side(model: dgemma.DiffusionGemma, text: str, prompt: str | None) -> None:
    check(model.fill(text, prompt, steps=2), text)


def test_the_lengths_of_holes_are_found(nano: dgemma.DiffusionGemma) -> None:
    board = ".3.1\n.2..\n....\n...4"
    for text in ("4321\n<fill>\n3412\n2134", "<fill>\n1243\n<fill>\n2134", "43<fill>1\n1<fill>3\n3412\n<fill>4"):
        assert nano.fill(text, board).text == "4321\n1243\n3412\n2134"
    assert len(nano.fill("4321\n<fill>\n3412\n2134", board, lengths=[2, 3]).holes[0].token_ids) in (2, 3)
    assert len(nano.fill("4321\n<fill>\n3412\n2134", board, lengths=[]).holes[0].token_ids) == 12


def test_lengths_that_are_looked_at() -> None:
    assert spread(1) == [1] and spread(32) == list(range(1, 33))
    for room in (33, 64, 200, 4096):
        found = spread(room)
        assert len(found) <= 32 and found[:16] == list(range(1, 17)) and found[-1] == room


def test_a_hole_may_come_back_short(nano: dgemma.DiffusionGemma) -> None:
    board = ".3.1\n.2..\n....\n...4"
    found = nano.fill("4321\n1243\n34<fill>", board)
    assert found.text == "4321\n1243\n3412\n2134"
    assert len(found.holes[0].token_ids) == 7 and len(found.holes[0].log_probabilities) == 8


def test_the_language_of_holes() -> None:
    """Every string of a small vocabulary is judged by what holes say: 0 is filler, 1 and 2 are text, 3 is neither."""
    draw = random.Random(1)
    for _ in range(60):
        rooms, held, at = [], [], 0
        for _ in range(draw.randrange(1, 4)):
            gap = draw.choice((0, 0, 1, 2)) if at < 6 else 1
            at += gap
            rooms.append(Room(start=at, length=draw.randrange(1, 4), open=draw.random() < 0.6))
            at = rooms[-1].end
        at += draw.choice((0, 1))
        free = {i for room in rooms for i in range(room.start, room.end)}
        constraint = language_of(rooms, any_text(np.array([1, 2]), 4), np.array([0]))
        held = np.array([-1 if i in free else 3 for i in range(at)])
        automaton = constraint.automaton
        assert constraint.begin(budget=at, canvas_length=at, held=held)
        for _ in range(60):
            tokens = [3 if i not in free else draw.choice((0, 1, 1, 2, 2, 3)) for i in range(at)]
            fits = all(_fits(tokens[room.start : room.end], room.open) for room in rooms)
            states = [automaton.start]
            for i, token in enumerate(tokens):
                label = automaton.held_class if i not in free else int(automaton.classes[token])
                states.append(_step(automaton, states[-1], label))
            assert (states[-1] >= 0 and bool(automaton.accepting[states[-1]])) == fits, (rooms, tokens)


@pytest.mark.parametrize("kind", ["bytes", "gemma", "llama", "composed"])
def test_no_character_is_left_half(models: dict[str, dgemma.DiffusionGemma], kind: str) -> None:
    for seed in range(8):
        found = models[kind].fill("a<fill:9>b<fill:1><fill:5><fill>c", seed=seed, steps=1, max_new_tokens=9)
        assert "\ufffd" not in found.text
        assert [len(one.token_ids) for one in found.holes[:3]] == [9, 1, 5]


def _fits(tokens: list[int], open_: bool) -> bool:
    count = next((i for i, token in enumerate(tokens) if token == 0), len(tokens))
    return all(token in (1, 2) for token in tokens[:count]) and (
        all(token == 0 for token in tokens[count:]) if open_ else count == len(tokens)
    )


def _step(automaton: TokenAutomaton, state: int, label: int) -> int:
    found = np.flatnonzero((automaton.sources == state) & (automaton.labels == label))
    assert len(found) <= 1
    return int(automaton.targets[found[0]]) if len(found) and label >= 0 else -1


def test_candidates_are_ranked_and_each_is_what_its_seed_gives(model: dgemma.DiffusionGemma) -> None:
    text = "def f(<fill:3>):\n    return <fill>\n" + "y = 1\n" * 12 + "<fill:2>"
    every = model.fill(text, n=4, steps=2)
    assert [one.score for one in every] == sorted((one.score for one in every), reverse=True)
    assert sorted(one.seed for one in every) == [0, 1, 2, 3]
    for one in every[:2]:
        assert model.fill(text, seed=one.seed, steps=2).text == one.text


def test_scores_are_log_probabilities_of_the_final_canvas(model: dgemma.DiffusionGemma) -> None:
    result = model.fill("ab <fill:4> cd", steps=3)
    speller = Speller(model.tokenizer)
    prompt = [2, *speller.ids("ab ", first=True)]
    canvas = [*result.holes[0].token_ids, *speller.ids(" cd")]
    logits = model.logits(prompt, canvas).astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = [logs[i, token] for i, token in enumerate(canvas)]
    np.testing.assert_allclose(result.holes[0].log_probabilities, expected[:4], atol=1e-4)
    assert result.score == pytest.approx(np.mean(expected), abs=1e-4)


def test_events_are_a_generations(model: dgemma.DiffusionGemma) -> None:
    text = "a<fill:3>" + "b" * 60 + "<fill>c"
    stream = model.stream_fill(text, steps=2)
    events = list(stream)
    assert isinstance(events[-1], Done) and sum(isinstance(one, Done) for one in events) == 1
    drafts = [one for one in events if isinstance(one, Draft)]
    assert {one.canvas for one in drafts} == {0, 1}
    for one in drafts:
        assert one.held is not None and one.held.any() and not one.held.all()
    assert sum(isinstance(one, Commit) for one in events) == 2
    assert stream.result is not None and stream.result.text == model.fill(text, steps=2).text
    closed = model.stream_fill(text)
    next(closed)
    closed.close()
    assert list(closed) == []
    while model.engine.busy:  # until the pass that is running has ended
        time.sleep(0.01)


def test_stop_ends_a_hole(models: dict[str, dgemma.DiffusionGemma]) -> None:
    whole = models["bytes"].fill("a<fill:20>b", steps=1).holes[0].text
    middle = whole[len(whole) // 2]
    short = models["bytes"].fill("a<fill:20>b", steps=1, stop=middle)
    assert short.text == f"a{whole.partition(middle)[0]}b"


# ---- Layout ---------------------------------------------------------------------------------------------------------


def job(model: dgemma.DiffusionGemma, text: str, prompt: str | None = None, **options: object):
    return job_of(model, text, prompt, GenerateOptions(**options))  # type: ignore[arg-type]


def test_a_document_begins_with_bos_and_its_canvas_at_the_hole(model: dgemma.DiffusionGemma) -> None:
    made = job(model, "left<fill:2>right")
    assert made.prompt == (2,) and made.end is None
    window = window_at(made.laid, 0)
    assert window.held[:2] == (-1, -1) and window.held[2:] == made.laid.pieces[1]


def test_an_answer_stands_on_its_canvas_whole_and_ends_its_turn(model: dgemma.DiffusionGemma) -> None:
    made = job(model, "left<fill:2>right", "Question")
    assert model.tokenizer.decode(made.prompt, special=True).endswith("<|turn>model\n")
    window = window_at(made.laid, 0)
    assert made.laid.whole and made.end == IDS["<turn|>"]
    request = made.request(window, made.prompt, seed=0, drafts=False)
    assert request.held == (*made.laid.pieces[0], -1, -1, *made.laid.pieces[1], IDS["<turn|>"])


def test_what_no_canvas_has_room_for_is_told_in_the_prompt(model: dgemma.DiffusionGemma) -> None:
    far = "".join(f"line {i}\n" for i in range(40))
    made = job(model, f"left<fill:2>{far}<fill:3> and more")
    said = model.tokenizer.decode(made.prompt, special=True)
    assert said.startswith("<bos><|turn>user\n") and "line 39\n<fill:3> and more" in said and "line 0\n" not in said
    check(model.fill(f"left<fill:2>{far}<fill:3> and more", steps=1), f"left<fill:2>{far}<fill:3> and more")
    with says("right of a hole", "canvas of 32", "raw"):
        job(model, f"left<fill:2>{far}", raw=True)
    said = model.tokenizer.decode(job(model, f"left<fill:2>{far}", "Question").prompt, special=True)
    assert "Question\n\n" in said and "line 39" in said
    with says("prompt of token ids"):
        model.fill(f"left<fill:2>{far}", [5, 6])


def test_every_hole_has_its_turn(model: dgemma.DiffusionGemma) -> None:
    draw = random.Random(5)
    for _ in range(200):
        parts = []
        for _ in range(draw.randrange(1, 6)):
            parts += ["x" * draw.choice((0, 1, 5, 30)), f"<fill:{draw.randrange(1, 90)}>"]
        laid = job(model, "".join([*parts, "y" * draw.choice((0, 3, 50))])).laid
        at, seen = (0, 0), [0] * len(laid.rooms)
        while at is not None:
            window = window_at(laid, *at)
            assert 0 < len(window.held) <= laid.length
            assert sum(token < 0 for token in window.held) == sum(room.length for room in window.rooms)
            for hole, room in zip(window.holes, window.rooms, strict=True):
                seen[hole] += room.length
            at = next_start(laid, window, at[1], ended=False)
        assert seen == list(laid.rooms)


def test_the_closed_thought_ends_the_prompt_where_the_template_knows_the_channel(where: Path) -> None:
    folder = tiny_checkpoint(where, name="channel")
    path = folder / "chat_template.jinja"
    path.write_text("{# <|channel> #}" + path.read_text())
    template, thought = path.read_text(), "<|channel>thought\n<channel|>"
    for writes in ("", thought):  # a template that closes a thought itself
        path.write_text(template + writes)
        loaded = dgemma.load(folder, backend="numpy")
        rewritten = edit_job(loaded, "a b", (0, 1), "Hi", 1, GenerateOptions())
        assert rewritten is not None
        asked = loaded.request("Hi", GenerateOptions(choices=["yes", "no"]))
        for ids in (job(loaded, "<fill:2>", "Hi").prompt, rewritten.prompt, asked.prompt):
            said = loaded.tokenizer.decode(ids, special=True)
            assert said.endswith(f"<|turn>model\n{thought}") and said.count(thought) == 1


# ---- Refused --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_filled_is_said_before_any_pass(model: dgemma.DiffusionGemma) -> None:
    with says("no hole", "<fill>", "<fill:12>"):
        model.fill("text")
    with says("no hole"):
        model.fill(["text"])
    with says("expected text with markers"):
        model.fill(7)  # type: ignore[arg-type]
    for text in ("<fill:0>", "<fill:99999999999>", "<fill:1048577>"):
        with says(text, "1 to 1,048,576"):
            model.fill(text)
    with says("marker"):
        model.fill("x", marker="")
    with says("n is 0"):
        model.fill("<fill>", n=0)
    with says("lengths"):
        model.fill("<fill>", lengths=[0])
    with says("lengths go up to 9", "max_new_tokens"):
        model.fill("<fill>", lengths=[9], max_new_tokens=8)
    with says("thinking"):
        model.fill("<fill>", thinking=True)
    with says("context is 4,096", "5,0"):
        model.fill("<fill:5000>")
    with says("not valid text", "surrogates"):
        model.fill("\ud800<fill>")
    assert model.engine.busy == 0


def test_a_checkpoint_without_a_beginning_needs_text(where: Path) -> None:
    folder = tiny_checkpoint(where, name="headless", bos_token_id=None)
    with says("begins with a hole"):
        dgemma.load(folder, backend="numpy").fill("<fill>")


def test_no_tokenizer(where: Path) -> None:
    folder = tiny_checkpoint(where, name="mute")
    (folder / "tokenizer.json").unlink()
    with says("no tokenizer.json"):
        dgemma.load(folder, backend="numpy").fill("<fill>")


def test_text_tokens_are_no_controls(model: dgemma.DiffusionGemma) -> None:
    tokenizer: Tokenizer = model.tokenizer
    assert not CONTROL & set(tokenizer.text_ids.tolist()) and len(tokenizer.text_ids) > 500
