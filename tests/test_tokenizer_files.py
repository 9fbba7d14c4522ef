"""tokenizer.json as strangers leave it: cut prompts, panics, ids that the model does not have, files of any size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chats import laid_out, opened, user, with_template
from dgemma.core.tokens import Decoder
from dgemma.text.tokens import Tokenizer
from said import says
from tiny import IDS, SPECIAL, VOCAB


def edited(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    folder = with_template(tmp_path)
    data = json.loads((folder / "tokenizer.json").read_text())
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def test_a_prompt_is_neither_cut_nor_filled_up(tmp_path: Path) -> None:
    def train(data: dict[str, Any]) -> None:
        data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        data["padding"] = {
            "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "<pad>",
        }  # fmt: skip

    tokenizer = opened(edited(tmp_path, train))
    assert laid_out(tokenizer, user("a long prompt")) == "<bos><|turn>user\na long prompt<turn|>\n<|turn>model\n"
    assert len(tokenizer.encode("a long prompt")) == len("a long prompt")


PANICS = {
    "when it is read": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "at the first text": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "when it decodes": {"decoder": {"type": "Strip", "content": "a", "start": 5, "stop": 9}},
    "of a model": {
        "model": {
            "type": "BPE", "vocab": {"\u00e9": 0, "b": 1, "\u00e9b": 3}, "merges": ["\u00e9 b"],
            "continuing_subword_prefix": "####",
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("case", PANICS)
def test_a_panic_is_one_line_and_writes_nothing_itself(
    tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with says("tokenizer.json: not a tokenizer"):
        opened(edited(tmp_path, lambda data: data.update(PANICS[case])))
    assert capfd.readouterr().err == ""


def test_what_the_tokenizer_fails_on_later_is_one_line(tmp_path: Path) -> None:
    model = {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}
    folder = edited(tmp_path, lambda data: data.update(model=model, added_tokens=[], post_processor=None, decoder=None))
    tokenizer = opened(folder)
    with says("cannot encode this text", "unk_id"):
        tokenizer.encode("b")
    for bad in ([-1], [1 << 40], ["a"], [None], 3, [1.5]):
        with says("cannot decode"):
            tokenizer.decode(bad)  # type: ignore[arg-type]
    with says("expected text"):
        tokenizer.encode(b"x")  # type: ignore[arg-type]


ADDED = {
    "id": VOCAB + 3, "content": "<extra>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
    "special": False,
}  # fmt: skip


def test_added_tokens_beyond_the_model_are_refused_when_they_are_used(tmp_path: Path) -> None:
    tokenizer = opened(edited(tmp_path, lambda data: data["added_tokens"].append(ADDED)))
    assert tokenizer.render([user("extra <extr")])
    with says("'<extra>'", f"from 0 to {VOCAB - 1}"):
        tokenizer.render([user("an <extra> one")])
    with says("'<extra>'"):
        tokenizer.encode("<extra>")
    special = opened(edited(tmp_path, lambda data: data["added_tokens"].append(ADDED | {"special": True})))
    assert "<extra>" in laid_out(special, user("an <extra> one"))  # which nobody can type


def test_files_longer_than_any_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = with_template(tmp_path)
    monkeypatch.setattr("dgemma.text.tokens.LARGEST_TOKENIZER", 1000)
    with says("tokenizer.json", "expected at most 1,000"):
        opened(folder)


def test_text_that_cannot_fit_is_not_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgemma.text.tokens.LONG", 100)
    tokenizer = Tokenizer(with_template(tmp_path), vocab_size=VOCAB, context=10)
    longest = max(map(len, SPECIAL))
    assert len(tokenizer.encode("x" * 10 * longest)) == 10 * longest  # these ten tokens could be the longest
    with says("characters", "10 tokens", "shorten"):
        tokenizer.encode("x" * (10 * longest + 1))
    with says("characters"):
        tokenizer.render([user("x" * 1000)])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path, name: str) -> None:
    folder = with_template(tmp_path)
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")
    with says(name):
        opened(folder)


# ---- A prompt that ends inside the thinking channel --------------------------------------------------------------

PROMPTS = {
    "<bos><|channel>thought\n": ("ab<channel|>c", "ab", "c"),
    "<bos><|channel>": ("thought\nab<channel|>c", "ab", "c"),
    "<bos><|channel>thou": ("ght\nab<channel|>c", "ab", "c"),
    "<bos><|channel>thought\nhm\n": ("ab", "ab", ""),
    "<bos><|channel>thought\nhm<channel|>": ("ab<|channel>thought\nx<channel|>y", "x", "aby"),
    "<bos>": ("a<|channel>thought\nx<channel|>y", "x", "ay"),
}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_thoughts_begun_in_the_prompt_are_not_the_answer(tmp_path: Path, prompt: str, size: int) -> None:
    tokenizer = opened(with_template(tmp_path))
    written, thinking, answer = PROMPTS[prompt]
    tokens = tokenizer.encode(written)
    decoder = Decoder(tokenizer, ["Z"], tokenizer.encode(prompt))
    pieces = [decoder.push(tokens[i : i + size], last=i + size >= len(tokens)) for i in range(0, len(tokens), size)]
    assert "".join(piece.thinking for piece in pieces) == thinking
    assert "".join(piece.text for piece in pieces) == answer


def test_channels_that_a_user_types_begin_none(tmp_path: Path) -> None:
    tokenizer = opened(with_template(tmp_path))
    prompt = tokenizer.render([user("<|channel>thought\n")])
    assert IDS["<|channel>"] not in prompt
    assert Decoder(tokenizer, (), prompt).push(tokenizer.encode("a"), last=True).text == "a"


def test_an_engine_begins_where_the_prompt_ends(tmp_path: Path) -> None:
    import dgemma
    from tiny import tiny_checkpoint

    model = dgemma.load(str(tiny_checkpoint(tmp_path)), backend="numpy")
    made = model.generate("<|channel>thought\n", 16, steps=2, raw=True, eos=[])
    plain = model.generate("<|channel>thought\n", 16, steps=2, eos=[])
    assert made.token_ids and made.thinking == Decoder(model.tokenizer, (), model.prompt_ids(
        "<|channel>thought\n", raw=True
    )).push(made.token_ids, last=True).thinking  # fmt: skip
    assert plain.thinking == Decoder(model.tokenizer).push(plain.token_ids, last=True).thinking
