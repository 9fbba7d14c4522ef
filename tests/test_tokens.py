"""Text in and out: template, channels, stop strings, and decoding canvas by canvas."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from dgemma.core.errors import DgemmaError
from dgemma.core.tokens import Decoder, split_at_end
from dgemma.text.tokens import Tokenizer
from tiny import IDS, SPECIAL, VOCAB, tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder, vocab_size=VOCAB, bos_token_id=2)


def feed(decoder: Decoder, canvases: list[list[int]]) -> tuple[str, str, list[int], bool]:
    text, thinking, tokens = "", "", []
    for i, canvas in enumerate(canvases):
        piece = decoder.push(canvas, last=i == len(canvases) - 1)
        text, thinking, tokens = text + piece.text, thinking + piece.thinking, tokens + list(piece.tokens)
        if piece.stopped:
            return text, thinking, tokens, True
    return text, thinking, tokens, False


def cut(tokens: list[int], sizes: list[int]) -> list[list[int]]:
    parts = []
    for size in sizes:
        parts.append(tokens[:size])
        tokens = tokens[size:]
    return [*parts, tokens]


SIZES = st.lists(st.integers(0, 7), max_size=12)


@given(text=st.text(max_size=40), sizes=SIZES)
def test_text_survives_any_cut_into_canvases(tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    tokens = tokenizer.encode(text)
    if any(token < len(SPECIAL) for token in tokens):
        return
    got, thinking, ids, stopped = feed(Decoder(tokenizer), cut(tokens, sizes))
    assert (got, thinking, ids, stopped) == (text, "", tokens, False)


@given(
    before=st.text("abxéX", max_size=12),
    stop=st.text("xX", min_size=1, max_size=4),
    after=st.text("abx", max_size=9),
    sizes=SIZES,
)
def test_a_stop_string_cuts_exactly(tokenizer: Tokenizer, before: str, stop: str, after: str, sizes: list[int]) -> None:
    whole = before + stop + after
    tokens = tokenizer.encode(whole)
    text, _, ids, stopped = feed(Decoder(tokenizer, [stop]), cut(tokens, sizes))
    assert stopped
    assert text == whole[: whole.index(stop)]
    assert ids == tokenizer.encode(text)


def test_what_may_become_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    decoder = Decoder(tokenizer, ["END"])
    piece = decoder.push(tokenizer.encode("one EN"), last=False)
    assert (piece.text, len(piece.tokens)) == ("one ", 4)
    piece = decoder.push(tokenizer.encode("Z two"), last=True)
    assert (piece.text, tokenizer.decode(piece.tokens)) == ("ENZ two", "ENZ two")


def test_half_a_character_at_the_end_of_a_canvas_is_no_stop_string(tokenizer: Tokenizer) -> None:
    """A replacement character stands for it until the rest comes, and that alone must not end a text."""
    tokens = tokenizer.encode("b😀c")
    text, _, ids, stopped = feed(Decoder(tokenizer, ["\ufffd"]), [tokens[:3], tokens[3:]])
    assert (text, ids, stopped) == ("b😀c", tokens, False)
    text, _, _, stopped = feed(Decoder(tokenizer, ["\ufffd"]), [tokens[:3], tokenizer.encode("c")])
    assert (text, stopped) == ("b", True)


def test_the_earliest_of_several_stop_strings_wins(tokenizer: Tokenizer) -> None:
    text, _, _, stopped = feed(Decoder(tokenizer, ["zz", "b"]), [tokenizer.encode("aabzz")])
    assert (text, stopped) == ("aa", True)


@given(thought=st.text("abc\né", max_size=15), answer=st.text("xyzé", max_size=15), sizes=SIZES)
def test_the_thinking_channel_comes_back_apart(
    tokenizer: Tokenizer, thought: str, answer: str, sizes: list[int]
) -> None:
    tokens = tokenizer.encode(f"<|channel>thought\n{thought}<channel|>{answer}")
    text, thinking, ids, _ = feed(Decoder(tokenizer, ["c"] if "c" not in answer else []), cut(tokens, sizes))
    assert (text, thinking, ids) == (answer, thought, tokens)  # a stop string inside the thinking does not stop


def test_a_channel_that_never_closes_is_all_thinking(tokenizer: Tokenizer) -> None:
    text, thinking, _, _ = feed(Decoder(tokenizer), [tokenizer.encode("a<|channel>thought\nhm")])
    assert (text, thinking) == ("a", "hm")


def test_special_tokens_never_reach_the_text(tokenizer: Tokenizer) -> None:
    text, _, ids, _ = feed(Decoder(tokenizer), [[IDS["<|turn>"], *tokenizer.encode("a"), IDS["<pad>"]]])
    assert (text, len(ids)) == ("a", 3)


def test_split_at_end() -> None:
    assert split_at_end([5, 6, 1, 7], (1, 106)) == ([5, 6], True)
    assert split_at_end([5, 6], (1,)) == ([5, 6], False)
    assert split_at_end([1], ()) == ([1], False)


def test_the_template_lays_out_a_chat(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]} | {"content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    shown = tokenizer.decode(tokenizer.render(messages, thinking=True), special=True)
    assert shown == (
        "<bos><|turn>system\n<|think|>\nbe brief<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\nhello<turn|>\n"
        "<|turn>user\nbye<turn|>\n<|turn>model\n"
    )


BAD_MESSAGES = {
    "no messages": ([], "no messages"),
    "not an object": (["hi"], "role and content"),
    "no content": ([{"role": "user"}], "role and content"),
    "an image": ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "'image' is not supported"),
    "a number": ([{"role": "user", "content": 3}], "must be text"),
    "an unknown role": ([{"role": "judge", "content": "x"}], "no role judge"),
    "no role's type": ([{"role": None, "content": "x"}], "message 0: role is None"),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_bad_messages_are_refused_in_one_line(tokenizer: Tokenizer, case: str) -> None:
    messages, expected = BAD_MESSAGES[case]
    with pytest.raises(DgemmaError, match=expected) as raised:
        tokenizer.render(messages)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_a_template_cannot_reach_out_of_its_sandbox(folder: Path, tmp_path: Path) -> None:
    evil = tiny_checkpoint(tmp_path)
    (evil / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(DgemmaError, match="chat template refused"):
        Tokenizer(evil, vocab_size=VOCAB).render([{"role": "user", "content": "x"}])


def test_broken_tokenizers_are_refused(tmp_path: Path) -> None:
    broken = tiny_checkpoint(tmp_path)
    with pytest.raises(DgemmaError, match="beyond the model's vocabulary of 100"):
        Tokenizer(broken, vocab_size=100)
    (broken / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(DgemmaError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer(broken, vocab_size=VOCAB)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(DgemmaError, match="no such file"):
        Tokenizer(broken, vocab_size=VOCAB)


# ---- Tokenizers whose text does not only grow ------------------------------------------------------------------------

LETTERS = "abx .,!"


@cache
def awkward(kind: str) -> Tokenizer:
    """A tokenizer that says half characters (a token for each byte), or one that cleans up spaces before stops."""
    if kind == "bytes":
        words = [*LETTERS, *(f"<0x{i:02X}>" for i in range(256))]
        backend = Backend(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    else:
        words = ["a", "b", "x", ".", ",", "!", "##b", "do", "not", "n't", "'s"]
        backend = Backend(models.WordPiece(vocab={word: i for i, word in enumerate([*words, "[UNK]"])}))
        backend.decoder = decoders.WordPiece(cleanup=True)
    with tempfile.TemporaryDirectory() as where:
        backend.save(str(Path(where) / "tokenizer.json"))
        return Tokenizer(Path(where), vocab_size=300)


def fewest(tokenizer: Tokenizer, tokens: list[int], text: str) -> int:
    return next(n for n in range(len(tokens) + 1) if tokenizer.decode(tokens[:n]).startswith(text))


@pytest.mark.parametrize("kind", ["bytes", "spaces"])
@given(data=st.data())
def test_a_stop_string_leaves_the_fewest_tokens_of_any_tokenizer(kind: str, data: st.DataObject) -> None:
    tokenizer = awkward(kind)
    if kind == "bytes":
        text = data.draw(st.text("ab😀é€x", max_size=9))
        tokens = tokenizer.encode(text)
    else:
        tokens = data.draw(st.lists(st.integers(0, 10), max_size=12))
    stop = data.draw(st.sampled_from(["x", "😀", "€", "b.", "ab", " a", "n't", "é😀"]))
    whole = tokenizer.decode(tokens)
    at = whole.find(stop)
    got, _, ids, stopped = feed(Decoder(tokenizer, [stop]), [tokens])
    assert stopped == (at >= 0)
    assert got == (whole if at < 0 else whole[:at])
    assert ids == (tokens if at < 0 else tokens[: fewest(tokenizer, tokens, whole[:at])])


@given(text=st.text("ab😀é€x", max_size=9), stop=st.sampled_from(["x", "😀", "€", "é😀", "x😀"]), sizes=SIZES)
def test_bytes_of_a_stop_string_are_held_back_over_canvases(text: str, stop: str, sizes: list[int]) -> None:
    tokenizer = awkward("bytes")
    tokens, at = tokenizer.encode(text), text.find(stop)
    got, _, ids, stopped = feed(Decoder(tokenizer, [stop]), cut(tokens, sizes))
    assert (got, stopped) == (text if at < 0 else text[:at], at >= 0)
    assert ids == tokenizer.encode(got)


def test_half_a_character_behind_a_whole_one_spoils_neither() -> None:
    """Five tokens say five replacement characters, four of them a smile."""
    tokenizer = awkward("bytes")
    tokens = tokenizer.encode("😀€STOP")
    assert tokenizer.decode(tokens[:5]) == "\ufffd" * 5
    text, _, ids, stopped = feed(Decoder(tokenizer, ["€"]), [tokens])
    assert (text, ids, stopped) == ("😀", tokens[:4], True)


def test_what_is_thought_behind_a_stop_string_is_not_given_out(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("<|channel>thought\none<channel|>yes.<|channel>thought\ntwo<channel|>no")
    text, thinking, ids, _ = feed(Decoder(tokenizer, ["."]), [tokens])
    assert (text, thinking) == ("yes", "one")
    assert tokenizer.decode(ids, special=True) == "<|channel>thought\none<channel|>yes"
    text, thinking, ids, _ = feed(Decoder(tokenizer, ["yes"]), [tokens])
    assert (text, thinking) == ("", "one")
