"""Automata over the tokens of vocabularies: what is walked decodes to text that matches, all such text is walked."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

import gemma3
from dgemma.constraints import TokenAutomaton, compile_constraint, from_pattern, from_states, regex_of_schema
from dgemma.constraints.stored import cache_folder
from dgemma.core.errors import DgemmaError
from dgemma.text.tokens import Tokenizer

NANO = Path(__file__).parents[1] / "models" / "nano"
SPECIALS = ["<pad>", "<eos>", "<bos>", "<|channel>", "<channel|>", "<end>"]
EOS, PAD, OPEN, CLOSE = (1, 5), 0, 3, 4

PATTERNS = [
    r"\d{4}-\d\d-\d\d",
    "yes|no|maybe|perhaps not| yes",
    r'\{"name": "[^"\\\x00-\x1f]{0,6}", "n": (?:0|-?[1-9][0-9]{0,3})\}',
    ".*",
    " *(?:the|a) (?:cat|café|😀)+ ?",
    "[é-߀]{2}|[^a-z]{1,3}",
    "|a",
    "▁<0x41>?",
]


def pieces(kind: str) -> list[str]:
    """Return tokens: of several characters, halves of characters, with spaces in front, and look-alikes."""
    words = [
        "the",
        "cat",
        "caf",
        "é",
        "yes",
        "no",
        "may",
        "be",
        "per",
        "haps",
        "not",
        "20",
        "25",
        "-",
        '{"',
        '"',
        '": ',
        "name",
        "n",
        "}",
    ]
    words += ["😀", "aé", "  ", " ", " the", " a", " cat", "   yes", " 1", "\n", "\n\n", "日本", "߀"]
    if kind == "ByteLevel":
        split, alphabet = (
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.ByteLevel.alphabet(),
        )
        made = [split.pre_tokenize_str(word)[0][0] for word in words]
        return [
            *sorted(alphabet),
            *made,
            split.pre_tokenize_str("😀")[0][0][:2],
            split.pre_tokenize_str("café")[0][0][:-1],
        ]
    marked = [word.replace(" ", "▁") for word in words] + [chr(code) for code in range(0x21, 0x7F)]
    return marked + ([f"<0x{byte:02X}>" for byte in range(256)] if kind in ("Gemma", "Llama") else [])


DECODERS = {
    "ByteLevel": decoders.ByteLevel(),
    "Gemma": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "Llama": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "Metaspace": decoders.Metaspace(),
    "MetaspaceNever": decoders.Metaspace(prepend_scheme="never"),
    "none": None,
}


def tokenizer(folder: Path, kind: str, more: int = 2) -> Tokenizer:
    """Return a tokenizer with some decoder; its last added tokens are one that is text and one beyond the model."""
    names = list(dict.fromkeys([*SPECIALS, *pieces(kind)]))
    backend = Backend(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    backend.add_tokens([AddedToken("\n\n\n", normalized=False), AddedToken("<beyond>")])
    if DECODERS[kind] is not None:
        backend.decoder = DECODERS[kind]
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    # "<beyond>" is beyond the model, behind three ids that have no token where `more` says so.
    return Tokenizer(folder, vocab_size=len(names) + 1 if more == 2 else len(names) + 5)


@pytest.fixture(scope="module", params=DECODERS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer(tmp_path_factory.mktemp(request.param), request.param)


def walk(draw: random.Random, found: TokenAutomaton, length: int) -> list[int] | None:
    """Return a whole answer by random steps, None where the walk does not come to an end."""
    members = [np.flatnonzero(found.classes == label).tolist() for label in range(found.count)]
    state, tokens = found.start, []
    for _ in range(length):
        if found.accepting[state] and draw.random() < 0.3:
            return tokens
        at = draw.choice(np.flatnonzero(found.sources == state).tolist())
        tokens.append(draw.choice(members[found.labels[at]]))
        state = int(found.targets[at])
    return tokens if found.accepting[state] else None


def answer(tokens: list[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in EOS), len(tokens))]


def check_record(found: TokenAutomaton) -> None:
    """What the record promises."""
    order = np.lexsort((found.labels, found.sources))
    assert (order == np.arange(len(order))).all()
    assert len(np.unique(found.sources.astype(np.int64) * found.count + found.labels)) == len(order)
    firsts = [int(np.flatnonzero(found.classes == label)[0]) for label in range(found.count)]
    assert firsts == sorted(firsts) and set(found.labels.tolist()) == set(range(found.count))
    assert all(one.dtype == np.int32 for one in (found.classes, found.sources, found.labels, found.targets))
    ends = np.flatnonzero(found.accepting).tolist()
    for sources, targets, goals in (
        (found.sources, found.targets, [found.start]),
        (found.targets, found.sources, ends),
    ):
        steps: dict[int, list[int]] = {}
        for one, other in zip(sources, targets, strict=True):
            steps.setdefault(int(one), []).append(int(other))
        todo = list(goals)
        for state in todo:
            todo += [one for one in dict.fromkeys(steps.get(state, [])) if one not in todo]
        assert len(todo) == found.states


def compiled(pattern: str, made: Tokenizer) -> TokenAutomaton:
    try:
        return compile_constraint(pattern, made, ends=EOS, pad=PAD)
    except DgemmaError as error:
        assert "with this vocabulary" in str(error)
        pytest.skip("has no tokens for it")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_walked_decodes_to_text_that_matches(made: Tokenizer, pattern: str) -> None:
    found = compiled(pattern, made)
    check_record(found)
    draw, judge, said = random.Random(3), re.compile(pattern), 0
    for _ in range(150):
        tokens = walk(draw, found, 80)
        if tokens is not None:
            assert found.accepts(tokens)
            assert judge.fullmatch(made.decode(answer(tokens))), (tokens, made.decode(answer(tokens)))
            said += 1
    assert said > 30


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tokens_that_decode_to_text_that_matches_are_walked(made: Tokenizer, pattern: str) -> None:
    """The other way round, on random tokens and on walks with a token changed: the judge is decoding."""
    found, judge = compiled(pattern, made), re.compile(pattern)
    draw, usable = random.Random(4), np.flatnonzero(made.spelling.known).tolist()
    likely = np.flatnonzero(found.classes >= 0).tolist()
    for _ in range(400):
        tokens = answer(walk(draw, found, 10) or draw.choices(likely, k=draw.randrange(5)))
        if draw.random() < 0.6:
            at = draw.randrange(len(tokens) + 1)
            tokens[at : at + draw.randrange(2)] = draw.choices(usable, k=draw.randrange(2))
        tokens = [token for token in tokens if token in usable]
        whole = b"".join(made.spelling.inside.of(token) for token in tokens)
        if "\ufffd" not in made.decode(tokens) or b"\xef\xbf\xbd" in whole:  # else there are halves of characters
            assert found.accepts(tokens) == bool(judge.fullmatch(made.decode(tokens))), (tokens, made.decode(tokens))


def test_every_token_says_what_decoding_says(made: Tokenizer) -> None:
    spelling, word = made.spelling, made.id_of("cat")
    assert word is not None
    for token in np.flatnonzero(spelling.known).tolist():
        inside, first = (spelling.inside.of(token), spelling.first.of(token))
        whole = spelling.first.of(word) + inside
        if "\ufffd" not in (said := whole.decode(errors="replace")):
            assert made.decode([word, token]) == said
        if "\ufffd" not in (said := first.decode(errors="replace")):
            assert made.decode([token]) == said
    assert not spelling.known[: len(SPECIALS)].any() and spelling.named[: len(SPECIALS)].all()
    text = made.id_of("\n\n\n")
    assert text is not None and spelling.known[text]  # added tokens that are not special are text


def test_ends_padding_and_ids_without_a_token(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, "Gemma", more=5)
    found = compile_constraint("a*", made, ends=(5, 1, 99999), pad=PAD)
    a = made.id_of("a")
    assert all(map(found.accepts, [[], [a], [1], [5, 1, 0, 0, 1], [a, 1]]))
    assert not any(map(found.accepts, [[0], [a, 0], [1, a], [2], [a, OPEN]]))
    assert (found.classes[-3:] == -1).all() and len(found.classes) == made.vocab_size
    assert found.classes[1] == found.classes[5] != found.classes[0]
    without = compile_constraint("a*", made, ends=(1,))
    assert without.accepts([a, 1, 1]) and not without.accepts([a, 1, 0]) and not without.accepts([a, 5])
    same = compile_constraint("a*", made, ends=(1, 0), pad=0)
    assert same.accepts([0]) and same.accepts([a, 1, 0])
    for ends in ((), (99999,), (-1,)):
        with pytest.raises(DgemmaError, match="needs a token that ends the answer"):
            compile_constraint("a*", made, ends=ends)
    with pytest.raises(DgemmaError, match="can be written with this vocabulary"):
        compile_constraint("ÿ+", tokenizer(tmp_path, "Metaspace"), ends=(1,))


def test_thinking_before_the_answer_is_free(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, "Llama", more=5)
    a, space, end = made.id_of("a"), made.id_of("▁"), made.id_of("cat")
    found = compile_constraint("a{1,2}", made, ends=(1,), pad=0, thinking=True)
    check_record(found)
    right = [[a], [a, 1, 0], [OPEN, CLOSE, a], [OPEN, a, end, 0, 2, 5, OPEN, CLOSE, space, a, a, 1]]
    wrong = [
        [],
        [OPEN],
        [OPEN, a],
        [OPEN, CLOSE],
        [OPEN, 1, CLOSE, a],
        [CLOSE, a],
        [a, OPEN, CLOSE],
        [OPEN, CLOSE, OPEN, CLOSE, a],
        [a, a, a],
    ]
    assert all(map(found.accepts, right)) and not any(map(found.accepts, wrong))
    assert (found.classes[-3:] == -1).all()  # ids that have no token are not thought either
    opened = compile_constraint("a{1,2}", made, ends=(1,), pad=0, opened=True)
    assert opened.key == compile_constraint("a{1,2}", made, ends=(1,), pad=0, thinking=True, opened=True).key
    assert opened.accepts([CLOSE, a]) and opened.accepts([a, end, CLOSE, a, 1]) and not opened.accepts([a])
    empty = compile_constraint("a*", made, ends=(1,), thinking=True, opened=True)
    assert (
        not empty.accepts([])
        and empty.accepts([CLOSE])
        and compile_constraint("a*", made, ends=(1,), thinking=True).accepts([])
    )


def test_nano() -> None:
    made = Tokenizer(NANO, vocab_size=272, controls=(0, 1, 2, 5))
    board = compile_constraint(r"[1-6]{6}(?:\n[1-6]{6}){5}", made, ends=(1, 5), pad=0)
    ids = made.encode("\n".join(["123456"] * 6))
    assert board.accepts(ids) and board.accepts([*ids, 5, 0, 0]) and not board.accepts(ids[:-1])
    assert compile_constraint("a😀é", made, ends=(1,)).accepts(made.encode("a😀é"))  # a token for each byte
    thought = compile_constraint("[1-6]", made, ends=(1, 5), pad=0, thinking=True)
    assert thought.accepts([*made.encode("<|channel>thought\nhm<channel|>4"), 5])


def test_an_automaton_of_a_users_own(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, "Gemma")
    own = from_states(start=0, accepting=[0], transitions={0: {"a": 1}, 1: {"b": 0}})
    found = compile_constraint(own, made, ends=(1,), pad=0)
    assert found.key == compile_constraint("(?:ab)*", made, ends=(1,), pad=0).key
    assert found.key != compile_constraint("(?:ab)+", made, ends=(1,), pad=0).key


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Strip(" ", 1, 0),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
    ],
)
def test_decoders_that_cannot_be_followed_are_refused(tmp_path: Path, decoder: object) -> None:
    tokenizer(tmp_path, "Metaspace")
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["decoder"] = json.loads(decoder.__getstate__())  # type: ignore[attr-defined]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(DgemmaError, match="cannot follow the decoder"):
        compile_constraint("a", Tokenizer(tmp_path, vocab_size=400), ends=(1,))


def test_what_was_compiled_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, folder = tokenizer(tmp_path / "model", "Gemma"), tmp_path / "a" / "cache"
    first = compile_constraint("[0-9]+é", made, ends=(1,), pad=0, cache=folder)
    (path,) = folder.iterdir()
    monkeypatch.setattr("dgemma.constraints.compiled.from_pattern", lambda pattern: pytest.fail("compiled again"))
    again = compile_constraint("[0-9]+é", made, ends=(1,), pad=0, cache=folder)
    assert again.key == first.key and again.accepts(made.encode("20")) == first.accepts(made.encode("20"))
    monkeypatch.setattr("dgemma.constraints.compiled.from_pattern", from_pattern)
    for other in ({"pad": None}, {"ends": (1, 5)}, {"thinking": True}, {"thinking": True, "opened": True}):
        assert compile_constraint("[0-9]+é", made, **{"ends": (1,), "pad": 0, "cache": folder} | other).key != first.key
    assert len(list(folder.iterdir())) == 5
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"not an archive",
        whole[:100],
        whole[:-30],
        whole[:200] + bytes([whole[200] ^ 1]) + whole[201:],
    ):
        path.write_bytes(damaged)
        assert compile_constraint("[0-9]+é", made, ends=(1,), pad=0, cache=folder).key == first.key
        assert path.read_bytes() != damaged
    np.savez(path, classes=np.zeros(3, np.int32), other=np.array([object()], object))
    assert compile_constraint("[0-9]+é", made, ends=(1,), pad=0, cache=folder).key == first.key


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, file = tokenizer(tmp_path / "model", "Gemma"), tmp_path / "file"
    file.write_text("")
    assert compile_constraint("a", made, ends=(1,), cache=file / "folder").accepts(made.encode("a"))
    monkeypatch.setattr("dgemma.constraints.stored.os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    folder = tmp_path / "cache"
    assert compile_constraint("a", made, ends=(1,), cache=folder).accepts(made.encode("a"))
    assert list(folder.iterdir()) == []


def test_the_cache_is_kept_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, folder = tokenizer(tmp_path / "model", "Gemma"), tmp_path / "cache"
    monkeypatch.setattr("dgemma.constraints.stored.LARGEST", 6000)
    for n in range(12):
        compile_constraint("a" * (n + 1), made, ends=(1,), cache=folder)
    assert 1 <= len(list(folder.iterdir())) < 12 and sum(one.stat().st_size for one in folder.iterdir()) <= 6000


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dgemma" / "constraints"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder().is_absolute()


@pytest.fixture(scope="module")
def gemma() -> Tokenizer:
    return Tokenizer(gemma3.fetched(), vocab_size=gemma3.VOCABULARY)


def test_a_real_vocabulary_says_what_it_decodes_to(gemma: Tokenizer) -> None:
    known = np.flatnonzero(gemma.spelling.known)
    assert len(known) > 262_000
    for token in [*range(3, 800), *known[::97].tolist()]:
        said = gemma.spelling.inside.of(token)
        if said and "\ufffd" not in said.decode(errors="replace"):
            assert gemma.decode([token]).encode() == said


@pytest.mark.parametrize(
    "pattern",
    [
        r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
        "yes|no|maybe|perhaps",
        r'[^"\\\x00-\x1f]{0,200}',
        "(?:😀|👩‍🚀|é|日本)+[.!]",
        regex_of_schema(
            {
                "type": "object",
                "properties": {name: {"type": "string", "maxLength": 30} for name in "abcdef"},
                "required": list("abcdef"),
            }
        ),
    ],
    ids=["date", "choices", "text", "emoji", "schema"],
)
def test_a_real_vocabulary(gemma: Tokenizer, pattern: str) -> None:
    found = compile_constraint(pattern, gemma, ends=(1, 106), pad=0, thinking=True)
    members = np.argsort(found.classes, kind="stable")
    bounds = np.searchsorted(found.classes[members], np.arange(found.count + 1))
    draw, judge, over = random.Random(7), re.compile(pattern), 0
    for _ in range(30):
        state, tokens = found.start, []
        while not (found.accepting[state] and (len(tokens) > 120 or draw.random() < 0.5)) and len(tokens) < 600:
            low, high = np.searchsorted(found.sources, [state, state + 1])
            at = draw.randrange(low, high)
            token = members[draw.randrange(*bounds[found.labels[at] : found.labels[at] + 2])]
            tokens.append(int(token))
            state = int(found.targets[at])
        if found.accepting[state]:
            cut = next((i for i, token in enumerate(tokens) if token in (1, 106)), len(tokens))
            assert judge.fullmatch(gemma.decode(tokens[:cut])), tokens
            over += 1
    assert over > 20
    for text in ("2024-02-29", "maybe", "é👩‍🚀日本!"):
        assert found.accepts([*gemma.encode(text), 106, 0, 1]) == bool(judge.fullmatch(text))
