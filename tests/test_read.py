"""Reads: probabilities of choices, compared with what `logits` gives on the same canvas, and what is read for them."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma.canvas.model import end_of
from dgemma.canvas.places import Layout, Place, lay_out
from dgemma.canvas.read import Canvas, Reading, canvas_of, filler_of, layout_of, read
from dgemma.canvas.reader import Look, Reader
from dgemma.core.config import ModelConfig
from dgemma.core.engine import Engine
from dgemma.core.errors import DgemmaError
from dgemma.core.passes import Passes
from dgemma.core.sampler import first_canvas
from fake_passes import CHUNK, FakePasses, answer, reads, request
from tiny import IDS, TEMPLATE, tiny_checkpoint

PROMPT = "Is it so?"
BACKENDS = ("numpy", "torch", "mlx", "onnx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("read"), canvas_length=16)


@pytest.fixture(scope="module")
def tiny(folder: Path) -> dgemma.DiffusionGemma:
    return dgemma.load(folder, backend="numpy")


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, folder: Path) -> dgemma.DiffusionGemma:
    return dgemma.load(folder, backend=request.param, dtype="float32")


class Talkative(FakePasses):
    """Fake passes whose logits follow from the slot and the canvas."""

    def logits(self, slot: int, canvas: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
        self.log.append(("logits", slot))
        seed = [sum(self.held[slot]), *canvas.tolist()]
        logits = np.random.default_rng(seed).normal(size=(len(canvas), self.config.vocab_size)).astype(np.float32)
        return np.full_like(logits, np.nan) if slot in self.spoilt else logits

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        return np.zeros((len(tokens), self.config.hidden_size), np.float32)


def log_p(model: dgemma.DiffusionGemma, canvas: Sequence[int], position: int) -> np.ndarray:
    """What `logits` says of a position, as logs of probabilities."""
    found = model.logits(model.prompt_ids(PROMPT), list(map(int, canvas)))[position].astype(np.float64)
    return found - np.logaddexp.reduce(found)


def close(found: Reading, shares: dict[str, float]) -> None:
    total = sum(shares.values())
    assert found.label_mass == pytest.approx(total, abs=1e-6)
    assert found.probabilities == pytest.approx({name: p / total for name, p in shares.items()}, abs=1e-6)
    assert list(found.probabilities) == list(shares) and found.choice == max(shares, key=shares.__getitem__)


# ---- Equal to logits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
def test_one_token(model: dgemma.DiffusionGemma, samples: int) -> None:
    found = model.read(PROMPT, ["y", "n", "?"], samples=samples, seed=7)
    sure: list[np.ndarray] = []
    for sample in range(samples):
        noise = first_canvas(7, sample, 16, model.config.vocab_size)
        canvas = [noise[0], IDS["<turn|>"], *[model.reader.filler] * 14]
        sure.append(log_p(model, canvas, 0))
    mean = np.exp(sure).mean(0)
    close(found, {one: float(mean[model.tokenizer.encode(one)[0]]) for one in ("y", "n", "?")})
    full = [-(np.exp(one) * one).sum() for one in sure]
    assert found.full_entropy == pytest.approx(np.mean(full), abs=1e-4)
    if samples == 1:
        assert found.token == sure[0].argmax()
    assert found.argmax_is_label == (found.token in [model.tokenizer.encode(one)[0] for one in ("y", "n", "?")])


def test_several_tokens_by_the_chain(model: dgemma.DiffusionGemma) -> None:
    """Each factor is of a canvas with the tokens before it in place; what follows the place is in view."""
    found = model.read(PROMPT, ["ab", "ac", "db"], template="<<read>>")
    encode, noise = model.tokenizer.encode, first_canvas(0, 0, 16, model.config.vocab_size)
    rest = [IDS["<turn|>"], *[model.reader.filler] * 11]

    def canvas(first: int) -> list[int]:
        return [*encode("<"), first, int(noise[2]), *encode(">"), *rest]

    start = log_p(model, canvas(int(noise[1])), 1)
    shares = {}
    for one in ("ab", "ac", "db"):
        a, b = encode(one)
        shares[one] = float(np.exp(start[a] + log_p(model, canvas(a), 2)[b]))
    close(found, shares)


@pytest.mark.parametrize("behind", ["", "!?"])
def test_different_lengths_are_closed_by_what_follows(tiny: dgemma.DiffusionGemma, behind: str) -> None:
    found = tiny.read(PROMPT, ["n", "no"], template=f"<read>{behind}")
    encode, noise = tiny.tokenizer.encode, first_canvas(0, 0, 16, tiny.config.vocab_size)
    n, o = encode("no")
    after = encode(behind)
    free = 3 + len(after)

    def at(*before: int) -> np.ndarray:
        canvas = [*before, *noise[len(before) : free].tolist(), *[tiny.reader.filler] * (16 - free)]
        return log_p(tiny, canvas, len(before))

    close_by = (after or [IDS["<turn|>"]])[0]
    close(
        found,
        {
            "n": float(np.exp(at()[n] + at(n)[close_by])),
            "no": float(np.exp(at()[n] + at(n)[o] + at(n, o)[close_by])),
        },
    )


def test_several_places(tiny: dgemma.DiffusionGemma) -> None:
    found = tiny.read(PROMPT, [["a", "b"], ["c", "d", "e"]], template="1: <read>\n2: <read>")
    canvas, noise = tiny.tokenizer.encode("1: a\n2: c"), first_canvas(0, 0, 16, tiny.config.vocab_size)
    canvas[3], canvas[8] = noise[3], noise[8]
    canvas += [IDS["<turn|>"], *[tiny.reader.filler] * 6]
    for reading, position, some in zip(found, (3, 8), ("ab", "cde"), strict=True):
        sure = np.exp(log_p(tiny, canvas, position))
        close(reading, {one: float(sure[tiny.tokenizer.encode(one)[0]]) for one in some})


def test_all_that_can_be_said_has_a_mass_of_one(tiny: dgemma.DiffusionGemma) -> None:
    vocab = tiny.config.vocab_size
    names = tuple(map(str, range(vocab)))
    prompt = tuple(tiny.prompt_ids(PROMPT))
    canvas = Canvas(vocab_size=vocab, end=1, fillers=(1,))
    one = Place(start=0, choices=names, strings=tuple((i,) for i in range(vocab)))
    two = Place(start=0, choices=names, strings=tuple((20, i) for i in range(vocab)))
    layouts = [Layout(tokens=(0,), places=(one,)), Layout(tokens=(20, 0), places=(two,))]
    (whole,), (behind,) = read(tiny.reader, [(prompt, layout) for layout in layouts], canvas)
    assert whole.label_mass == pytest.approx(1, abs=1e-6) and whole.argmax_is_label
    assert whole.entropy == pytest.approx(whole.full_entropy, abs=1e-4)
    noise = first_canvas(0, 0, 16, vocab)
    first = log_p(tiny, [noise[0], noise[1], *[1] * 14], 0)[20]
    assert behind.label_mass == pytest.approx(np.exp(first), abs=1e-6)


def test_the_default_body_is_what_batches_give(model: dgemma.DiffusionGemma) -> None:
    passes = model.engine.passes
    canvases = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 16)).astype(np.int32)
    at, tokens = [(i % 3, 5 * i % 16) for i in range(40)], np.array([3, 200, 7])

    def run() -> tuple[Any, Any]:
        slots = [passes.open_behind(list(range(20, 30 + 20 * i)), 16) for i in range(3)]
        try:
            return passes.scores(slots, canvases, at, tokens), Passes.scores(passes, slots, canvases, at, tokens)
        finally:
            for slot in slots:
                passes.close(slot)

    mine, default = model.engine.run("testing", run)
    np.testing.assert_allclose(np.exp(mine.log_p), np.exp(default.log_p), atol=1e-6)
    np.testing.assert_allclose(mine.log_p, default.log_p, atol=1e-3)
    np.testing.assert_allclose(mine.entropy, default.entropy, atol=1e-4)
    assert (mine.token == default.token).all()
    np.testing.assert_allclose(mine.top, default.top, atol=1e-4)


# ---- Templates and canvases -------------------------------------------------------------------------------------


def words(text: str) -> list[int]:
    """A tokenizer whose words have the space before them."""
    import re

    return [sum(map(ord, one)) for one in re.findall(r" ?[a-z]+|.|\n", text)]


def test_a_space_before_a_place_goes_with_the_choice() -> None:
    layout = lay_out("it is <read> now", [["not", "so", "never ever"]], words)
    (place,) = layout.places
    assert place.start == 2 and place.strings == tuple(map(tuple, map(words, (" not", " so", " never ever"))))
    assert layout.behind == tuple(words(" now")) and layout.size == 2 + 2 + 1 and not place.even
    assert [words("it is"), words("is so now")] != [list(layout.tokens[:2]), list(layout.tokens[1:])]


def test_choices_that_begin_alike_keep_their_beginning() -> None:
    (place,) = lay_out("ab<read>yz", [["xc", "xd"]], lambda text: list(map(ord, text))).places
    assert place.start == 2 and place.strings == (tuple(map(ord, "xc")), tuple(map(ord, "xd")))


@pytest.mark.parametrize(("size", "length"), [(1, 16), (15, 16), (16, 32), (31, 32), (255, 256)])
def test_the_shortest_canvas_that_holds_a_template_and_its_end(size: int, length: int) -> None:
    layout = lay_out(f"{'x' * (size - 1)}<read>", [["a", "b"]], lambda text: list(map(ord, text)))
    canvas = Canvas(vocab_size=300, end=1, fillers=(0,))
    made = canvas.empty(layout, 0, 0)
    assert len(made) == length and made[size] == 1 and (made[size + 1 :] == 0).all()


def test_a_checkpoint_without_a_template_that_thinks_is_left_alone(tiny: dgemma.DiffusionGemma, tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def spied(model: dgemma.DiffusionGemma) -> tuple[int, ...]:
        scores = model.reader.scores
        model.reader.scores = lambda looks, *a: seen.append(looks[0].prompt) or scores(looks, *a)  # type: ignore
        model.read("so?", ["y", "n"])
        model.reader.scores = scores  # type: ignore[method-assign]
        return seen[-1]

    assert spied(tiny) == tuple(tiny.prompt_ids("so?"))
    folder = tiny_checkpoint(tmp_path, canvas_length=16)
    (folder / "chat_template.jinja").write_text(TEMPLATE + "{#- <|channel> -#}")
    thinking = dgemma.load(folder, backend="numpy")
    closed = [IDS["<|channel>"], *thinking.tokenizer.encode("thought\n"), IDS["<channel|>"]]
    assert spied(thinking) == (*thinking.prompt_ids("so?"), *closed)
    assert thinking.read([5, 6], ["y", "n"]) and seen[-1] != (5, 6)


def test_nano_knows_its_digits() -> None:
    nano = dgemma.load("nano", backend="torch", dtype="float32")
    board, digits = ".3.1 .2.. .... ...4", ["1", "2", "3", "4"]
    assert nano.reader.filler is None
    found = nano.read(board, digits)
    assert found.choice == "4" and found.label_mass > 0.9 and found.argmax_is_label
    assert nano.reader.filler == 1  # what it was trained on
    places = nano.read(board, digits, template="43<read>1\n1243\n34<read>2\n2134", samples=2)
    assert [one.choice for one in places] == ["2", "1"] and all(one.label_mass > 0.9 for one in places)


# ---- The engine -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tiny: dgemma.DiffusionGemma) -> ModelConfig:
    return tiny.config


def look(prompt: Sequence[int], seed: int = 0) -> Look:
    return Look(prompt=tuple(prompt), canvas=first_canvas(seed, 0, 16, 272), at=(0,))


def test_a_thousand_reads_over_one_prompt_read_it_once(config: ModelConfig) -> None:
    passes = Talkative(config, chunk=CHUNK)
    reader = Reader(Engine(passes, None, prefix_bytes=1 << 20))
    prompt = list(range(20, 120))
    for seed in range(1000):
        reader.scores([look(prompt, seed)], [5, 6])
    assert sum(sum(one.values()) for one in reads(passes)) == len(prompt)
    assert not passes.held and len(reads(passes)) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_of_a_model_over_one_prompt(folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dgemma.load(folder, backend=backend)
    model.read(PROMPT, ["a", "b"])
    before, count = model.engine.passes.read, [0]
    monkeypatch.setattr(model.engine.passes, "read", lambda rows: count.append(len(rows)) or before(rows))
    for seed in range(20):
        model.read(PROMPT, ["a", "b", "cc"], seed=seed)
    assert sum(count) == 0


def test_with_no_memory_for_prompts_one_call_reads_its_prompt_once(config: ModelConfig) -> None:
    passes = Talkative(config, chunk=CHUNK)
    reader = Reader(Engine(passes, None, prefix_bytes=0))
    prompt = list(range(20, 60))
    found = reader.scores([look(prompt, seed) for seed in range(100)], [5, 6])
    assert sum(sum(one.values()) for one in reads(passes)) == len(prompt) and not passes.held
    alone = Reader(Engine(Talkative(config), None)).scores([look(prompt, 77)], [5, 6])[0]
    assert (found[77].log_p == alone.log_p).all()


def test_a_beginning_in_common_is_read_once(config: ModelConfig) -> None:
    for kept in (0, 1 << 20):
        passes = Talkative(config, chunk=CHUNK)
        reader = Reader(Engine(passes, None, prefix_bytes=kept))
        stem = tuple(range(20, 70))
        passes.spare = lambda: 1 << 20  # type: ignore[method-assign]
        reader.scores([look((*stem, 20 + i, 20 + i)) for i in range(30)], [5], stem)
        assert sum(sum(one.values()) for one in reads(passes)) == len(stem) + 30 * 2


def test_a_long_prompt_holds_others_up_by_a_chunk(config: ModelConfig) -> None:
    passes = Talkative(config, chunk=CHUNK)
    engine = Engine(passes, None)
    handle = engine.add(request(5, 16 * 30))  # which begins with the read: alone it might be over before
    Reader(engine).scores([look(range(20, 20 + 200))], [5])
    assert answer(handle)[2] == "length"
    sizes = [(what, max(value.values()) if what == "read" else 0) for what, value in passes.log]
    chunks = [i for i, one in enumerate(sizes) if one[0] == "read" and one[1] == CHUNK]
    assert len(chunks) == 200 // CHUNK and max(size for _, size in sizes) == CHUNK
    between = [{what for what, _ in sizes[a:b]} for a, b in pairwise(chunks)]
    assert all("step" in one for one in between), "another row waited for more than one chunk"


def test_looks_share_passes(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, sizes = Talkative(config), list[int]()
    scores = passes.scores
    monkeypatch.setattr(passes, "scores", lambda slots, *rest: sizes.append(len(slots)) or scores(slots, *rest))
    reader = Reader(Engine(passes, None))
    reader.scores([look(range(20, 30), seed) for seed in range(70)], [5, 6])
    assert sizes == [32, 32, 6]
    passes.room = 5
    reader.scores([look(range(20, 30), seed) for seed in range(8)], [5, 6])
    assert sizes[3:] == [4, 4]


def test_a_pass_that_comes_to_nan(config: ModelConfig) -> None:
    passes = Talkative(config)
    reader = Reader(Engine(passes, None))
    reader.scores([look((20, 21))], [5])
    passes.logits = lambda *a: np.full((16, 272), np.nan, np.float32)  # type: ignore[method-assign, assignment]
    with pytest.raises(DgemmaError, match="NaN"):
        reader.scores([look((20, 21))], [5])
    assert not passes.held and not reader._waiting and not reader._line


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")
def test_a_forked_child_reads_too(tiny: dgemma.DiffusionGemma) -> None:
    """The oracle's backend survives a fork, and so do reads, whoever was reading when it came."""
    want = tiny.read(PROMPT, ["a", "b"])
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            tiny.read(PROMPT, ["a", "b"])

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            child = os.fork()
        if not child:
            same = False
            try:
                same = tiny.read(PROMPT, ["a", "b"]).probabilities == pytest.approx(want.probabilities)
            finally:
                os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        thread.join()


def test_an_interrupted_read_leaves_nothing_behind(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Talkative(config)
    engine = Engine(passes, None, prefix_bytes=1 << 20)
    reader, run = Reader(engine), engine.run
    reader.scores([look((20, 21))], [5])

    def interrupted(doing: str, work: Any) -> Any:
        if work == reader._pass:
            raise KeyboardInterrupt
        return run(doing, work)

    monkeypatch.setattr(engine, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reader.scores([look((20, 21))], [5])
    monkeypatch.setattr(engine, "run", run)
    before = len(passes.log)
    reader.scores([look((20, 21), 3)], [5])
    assert [what for what, _ in passes.log[before:]] == ["open", "logits", "close"]
    assert not passes.held and not reader._waiting and not reader._line


def test_threads_and_generations_side_by_side(tiny: dgemma.DiffusionGemma) -> None:
    prompts = [PROMPT, "another", "x" * 90]
    alone = {(p, s): tiny.read(p, ["a", "b", "cc"], seed=s) for p in prompts for s in range(3)}
    text = tiny.generate("so", 40, steps=3).token_ids
    wrong: list[Any] = []

    def read_all(shift: int) -> None:
        keys = list(alone)
        for prompt, seed in keys[shift:] + keys[:shift]:
            found = tiny.read(prompt, ["a", "b", "cc"], seed=seed)
            if found.probabilities != pytest.approx(alone[prompt, seed].probabilities, abs=1e-3):  # rounding
                wrong.append((prompt, seed, found))

    def write() -> None:
        if tiny.generate("so", 40, steps=3).token_ids != text:
            wrong.append("text")

    threads = [threading.Thread(target=read_all, args=(i,)) for i in range(4)] + [threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and tiny.engine.busy == 0 and not tiny.reader._line


# ---- What is refused --------------------------------------------------------------------------------------------

THREE: dict[str, Any] = {"canvas_length": 3}
REFUSED: list[tuple[str, Callable[[dgemma.DiffusionGemma], Any]]] = [
    ("choices: None, expected a list of two", lambda m: m.read(PROMPT)),
    ("choices: 'yes', expected a list", lambda m: m.read(PROMPT, "yes")),
    ("choices: \\['a'\\], expected a list of two", lambda m: m.read(PROMPT, ["a"])),
    ("none of them empty", lambda m: m.read(PROMPT, ["a", ""])),
    ("choices: 'a' is there twice", lambda m: m.read(PROMPT, ["a", "a"])),
    ("the template has no <read>", lambda m: m.read(PROMPT, ["a", "b"], template="x")),
    ("choices: 'x.ud800' is not valid text", lambda m: m.read(PROMPT, ["a", "x\ud800"])),
    ("template: '.ud800<read>' is not valid", lambda m: m.read(PROMPT, ["a", "b"], template="\ud800<read>")),
    ("the template holds an image token", lambda m: m.read(PROMPT, ["<|image|>", "b"], specials=True)),
    ("template is 5", lambda m: m.read(PROMPT, ["a", "b"], template=5)),  # type: ignore[arg-type]
    ("has 2 places .* given for 3", lambda m: m.read(PROMPT, [["a", "b"]] * 3, template="<read> <read>")),
    ("choices of place 2 are of different", lambda m: m.read(PROMPT, [["a", "b"], ["a", "bb"]], "<read> <read>")),
    ("has 300 tokens with its end", lambda m: m.read(PROMPT, ["a", "b"], template="x" * 298 + "<read>")),
    ("canvas_length is 3, and the template takes 5", lambda m: m.read(PROMPT, ["a", "b"], "xxxx<read>", **THREE)),
    ("canvas_length is 0", lambda m: m.read(PROMPT, ["a", "b"], canvas_length=0)),
    ("samples is 0", lambda m: m.read(PROMPT, ["a", "b"], samples=0)),
    ("seed is -1", lambda m: m.read(PROMPT, ["a", "b"], seed=-1)),
    ("raw is 'no'", lambda m: m.read(PROMPT, ["a", "b"], raw="no")),  # type: ignore[arg-type]
    ("the prompt is empty", lambda m: m.read([], ["a", "b"])),
    ("token id 9999", lambda m: m.read([9999], ["a", "b"])),
    ("the prompt has 505 tokens and the canvas 16", lambda m: m.read([20] * 505, ["a", "b"])),
]  # fmt: skip


@pytest.mark.parametrize("match", [match for match, _ in REFUSED])
def test_refused_before_any_pass(tiny: dgemma.DiffusionGemma, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.reader, "filler", None)
    monkeypatch.setattr(tiny.engine.passes, "read", None)
    monkeypatch.setattr(tiny.engine.passes, "scores", None)
    with pytest.raises(DgemmaError, match=match) as error:
        dict(REFUSED)[match](tiny)
    assert "\n" not in str(error.value)


def test_what_canvases_end_with(tiny: dgemma.DiffusionGemma) -> None:
    made = canvas_of(tiny.config, (1, 5), 5, length=None, samples=1, seed=0)
    assert made.end == 5 and made.fillers == (0, 1, 5)
    assert canvas_of(tiny.config, (), None, length=None, samples=1, seed=0).end == tiny.config.pad_token_id
    turn = IDS["<turn|>"]
    assert [end_of(tiny.tokenizer, ends) for ends in ((1, turn), (1,), ())] == [turn, 1, None]
    assert filler_of(tiny.reader, replace(made, fillers=(7,))) == 7
    assert layout_of(["a", "b"], None, tiny.tokenizer.encode).size == 1
