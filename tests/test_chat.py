"""Chat templates: where they are found, what they are given, what they may cost, and what messages may be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from chats import laid_out, opened, user, with_template
from dgemma.cli import main
from dgemma.text.tokens import Tokenizer
from said import says
from tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return opened(with_template(tmp_path_factory.mktemp("chat")))


# ---- What the published template's features become --------------------------------------------------------------

CALL = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": {
    "city": 'Pa"ris', "days": 3, "l": ["a", 1], "n": None, "o": {"k": "v"}, "ok": True,
}}}  # fmt: skip
CALLED = (
    '<|tool_call>call:weather{city:<|"|>Pa"ris<|"|>,days:3,l:[<|"|>a<|"|>,1],n:null,o:{k:<|"|>v<|"|>},ok:true}'
    "<tool_call|>"
)
RESULT = '<|tool_response>response:weather{value:<|"|>sunny<|"|>}<tool_response|>'
ASKED = {"role": "assistant", "tool_calls": [CALL], "content": None}
TOLD = {"role": "tool", "name": "weather", "content": "sunny"}

GOLDENS: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "one user": ([user(" Hi\n")], {}, "<|turn>user\nHi<turn|>\n<|turn>model\n"),
    "parts are joined": (
        [user([{"type": "text", "text": "a"}, {"type": "text", "text": " b"}])], {},
        "<|turn>user\nab<turn|>\n<|turn>model\n",
    ),
    "system and thinking": (
        [{"role": "system", "content": "S"}, user("Hi")], {"thinking": True},
        "<|turn>system\n<|think|>\nS<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n",
    ),
    "a later system message": (
        [user("Hi"), {"role": "system", "content": "S"}], {},
        "<|turn>user\nHi<turn|>\n<|turn>system\nS<turn|>\n<|turn>model\n",
    ),
    "thoughts of earlier turns are left out": (
        [user("Hi"), {"role": "assistant", "content": "<|channel>thought\nhm\n<channel|>Yo"}, user("?")], {},
        "<|turn>user\nHi<turn|>\n<|turn>model\nYo<turn|>\n<|turn>user\n?<turn|>\n<|turn>model\n",
    ),
    "reasoning": (
        [user("Hi"), {"role": "assistant", "reasoning": "hm", "content": "Yo"}, user("?")], {},
        "<|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\nhm\n<channel|>Yo<turn|>\n"
        "<|turn>user\n?<turn|>\n<|turn>model\n",
    ),
    "a call": ([user("Hi"), ASKED, TOLD], {}, f"<|turn>user\nHi<turn|>\n<|turn>model\n{CALLED}{RESULT}"),
    "thinking on after a call": (
        [user("Hi"), ASKED, TOLD], {"thinking": True},
        f"<|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n{CALLED}{RESULT}<|channel>thought\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GOLDENS)
def test_what_the_model_reads(tokenizer: Tokenizer, case: str) -> None:
    messages, options, expected = GOLDENS[case]
    assert laid_out(tokenizer, *messages, **options) == "<bos>" + expected


def test_arguments_may_be_json_text(tokenizer: Tokenizer) -> None:
    function = {"name": "weather", "arguments": json.dumps(CALL["function"]["arguments"])}
    asked = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    assert tokenizer.render([user("Hi"), asked, TOLD]) == tokenizer.render([user("Hi"), ASKED, TOLD])


# ---- What templates may use ---------------------------------------------------------------------------------------

EXTENSIONS = {
    "{% generation %}a{{ messages[0].content }}{% endgeneration %}b": "ahib",
    "{%- generation -%} a {%- endgeneration -%} b": "ab",
    "{{ {'b': 'é<', 'a': [1]} | tojson }}": '{"b": "é<", "a": [1]}',
    "{{ {'b': 'é', 'a': [1]} | tojson(ensure_ascii=True, indent=1, separators=(',', ':'), sort_keys=True) }}":
        '{\n "a":[\n  1\n ],\n "b":"\\u00e9"\n}',
    "{{ {'b': 1} | tojson(True, 2) }}": '{\n  "b": 1\n}',
    "{{ messages | tojson }}": '[{"role": "user", "content": "hi"}]',
    "{{ strftime_now('%Y') | length }}": "4",
    "{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{% if x == 3 %}{% break %}{% endif %}{{ x }}"
    "{% endfor %}": "1",
    "{{ tools is none }}{{ documents is none }}": "TrueTrue",
    "{{ 'x' if add_generation_prompt }}{{ enable_thinking }}": "xFalse",
    "{% set n = namespace(x=1) %}{% set n.x = n.x + 1 %}{{ n.x }}{{ dict(a=1).a }}": "21",
}  # fmt: skip


@pytest.mark.parametrize("template", EXTENSIONS)
def test_what_templates_of_the_field_use(tmp_path: Path, template: str) -> None:
    assert laid_out(opened(with_template(tmp_path, template)), user("hi")) == EXTENSIONS[template]


def test_tokens_are_named_as_transformers_names_them(tmp_path: Path) -> None:
    names = ["bos_token", "eos_token", "pad_token", "unk_token", "image_token", "eoc_token", "boi_token"]
    folder = with_template(
        tmp_path, "|".join(f"{{{{ {name} }}}}" for name in names), eoc_token="<channel|>", image_token="<|image|>",
        eos_token={"content": "<turn|>", "__type": "AddedToken"}, additional_special_tokens={"boi_token": "<|image>"},
        bos_token=None,
    )  # fmt: skip
    assert laid_out(opened(folder), user("hi")) == "<bos>|<turn|>|<pad>|<unk>|<|image|>|<channel|>|<|image>"
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<unused0>"}}))
    assert "<unused0>" in laid_out(opened(folder), user("hi"))


# ---- Where templates are found --------------------------------------------------------------------------------------

NAMED = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "list"}]
PLACES: dict[str, dict[str, Any]] = {
    "file": {"chat_template.jinja": "file", "tokenizer_config.json": "config", "chat_template.json": "old"},
    "extra": {"additional_chat_templates/default.jinja": "extra", "tokenizer_config.json": "config"},
    "config": {"tokenizer_config.json": "config", "processor_config.json": "processor"},
    "list": {"tokenizer_config.json": NAMED},
    "processor": {"processor_config.json": "processor", "chat_template.json": "old"},
    "old": {"chat_template.json": "old"},
    "older": {"preprocessor_config.json": "older"},
}


@pytest.mark.parametrize("expected", PLACES)
def test_a_template_is_found_where_transformers_finds_it(tmp_path: Path, expected: str) -> None:
    folder = with_template(tmp_path, None)
    for name, content in PLACES[expected].items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if path.suffix == ".jinja" else json.dumps({"chat_template": content}))
    assert laid_out(opened(folder), user("hi")) == expected


def test_without_a_template_text_is_taken_as_it_stands(tmp_path: Path) -> None:
    tokenizer = opened(with_template(tmp_path, None))
    assert not tokenizer.has_template
    with says("no chat template"):
        tokenizer.render([user("hi")])


def test_the_command_line_says_so(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    for args, said in (([], False), (["--raw"], False)):
        assert ("no chat template" in answered(folder, *args)) is said
    (folder / "chat_template.jinja").unlink()
    assert answered(folder).count("no chat template") == 1
    assert "no chat template" not in answered(folder, "--raw")


def answered(folder: Path, *args: str) -> str:
    """What stands on stderr after one answer."""
    line = ["generate", "hi", "-m", str(folder), "--backend", "numpy", "-n", "1", "--steps", "1", *args]
    result = CliRunner().invoke(main, line, prog_name="dgemma")
    assert result.exit_code == 0, result.output
    return result.stderr


def unreadable(folder: Path, kind: str) -> str:
    path = folder / "chat_template.jinja"
    match kind:
        case "dangling link":
            path.symlink_to("nowhere")
        case "link out":
            path.symlink_to("/proc/self/environ" if os.path.exists("/proc/self/environ") else "/etc/hosts")
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "bytes":
            path.write_bytes(b"\xff\xfe{{ x }}")
        case "large":
            path.write_text("x" * ((1 << 20) + 1))
        case "no default":
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "rag.jinja").write_text("x")
            return "default"
        case "named":
            (folder / "chat_template.json").write_text(json.dumps({"chat_template": {"rag": "x"}}))
            return "chat_template.json"
        case "number":
            (folder / "chat_template.json").write_text(json.dumps({"chat_template": 3}))
            return "expected text"
        case "config is a pipe":
            (folder / "tokenizer_config.json").unlink()
            os.mkfifo(folder / "tokenizer_config.json")
            return "tokenizer_config.json"
    return "chat_template.jinja"


KINDS = ["dangling link", "link out", "folder", "pipe", "bytes", "large", "no default", "named", "number"]


@pytest.mark.parametrize("kind", [*KINDS, "config is a pipe"])
def test_a_template_that_cannot_be_read_is_refused_not_ignored(tmp_path: Path, kind: str) -> None:
    folder = with_template(tmp_path, None)
    word = unreadable(folder, kind)
    with says(word):
        opened(folder)


# ---- Messages -------------------------------------------------------------------------------------------------------


class Strange:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def circular() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


REFUSED: dict[str, tuple[Any, str]] = {
    "no list": ({"role": "user", "content": "x"}, "expected a list"),
    "text": ("hi", "expected a list"),
    "a set": ({1}, "expected a list"),
    "number": ([user("a"), 3], "message 1"),
    "none": ([user("a"), None], "message 1"),
    "no role": ([{"content": "x"}], "message 0"),
    "role of another type": ([{"role": ["user"], "content": "x"}], "message 0: role"),
    "empty role": ([{"role": "", "content": "x"}], "message 0: role"),
    "unknown role": ([{"role": "judge", "content": "x"}], "no role judge"),
    "content none": ([user(None)], "message 0"),
    "content number": ([user(3)], "must be text"),
    "content bytes": ([user(b"x")], "message 0"),
    "content object": ([{"role": "tool", "name": "f", "content": {"a": 1}}], "give it as JSON text"),
    "part of text": ([user(["x"])], "message 0"),
    "image": ([user([{"type": "image", "url": "x"}])], "'image' is not supported"),
    "part without text": ([user([{"type": "text"}])], "message 0"),
    "key of a number": ([{"role": "user", "content": "x", 3: "y"}], "the key 3"),
    "key of a part": ([user([{"type": "text", "text": "x", None: 1}])], "message 0: the key"),
    "strange value": ([user("x") | {"y": Strange()}], "Strange"),
    "a set inside": ([user("x") | {"y": {1}}], "set"),
    "nan": ([user("x") | {"y": float("nan")}], "nan"),
    "huge number": ([user("x") | {"y": 10**5000}], "message 0"),
    "deep": ([user("x") | {"y": nested(900)}], "levels deep"),
    "circular": ([user("x") | {"y": circular()}], "levels deep"),
    "half a character": ([user("\ud83d")], "lone surrogate"),
    "half a key": ([user("x") | {"\ud83d": 1}], "lone surrogate"),
    "calls of a number": ([user("x"), {"role": "assistant", "tool_calls": 3}], "message 1: tool_calls"),
    "call of text": ([user("x"), {"role": "assistant", "tool_calls": ["f"]}], "message 1: tool call 0"),
    "call without a name": ([user("x"), {"role": "assistant", "tool_calls": [{"function": {}}]}], "message 1"),
    "arguments": (
        [user("x"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]}], "message 1",
    ),
    "deep arguments": (
        [user("x"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 99999}}]}], "1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_message_that_cannot_be_is_named(tokenizer: Tokenizer, case: str) -> None:
    messages, word = REFUSED[case]
    with says(word):
        tokenizer.render(messages)


def test_a_chat_longer_than_any_context_is_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgemma.text.chat.LARGEST", 1000)
    with says("no model reads so much"):
        tokenizer.render([user("x" * 500), user("x" * 500)])


def test_none_is_as_if_it_were_not_there(tokenizer: Tokenizer) -> None:
    plain = [user("Hi"), {"role": "assistant", "content": "Yo"}]
    assert tokenizer.render([one | {"tool_calls": None, "name": None} for one in plain]) == tokenizer.render(plain)


def test_empty_text_is_text(tokenizer: Tokenizer) -> None:
    assert laid_out(tokenizer, user("")) == laid_out(tokenizer, user([])) == "<bos><|turn>user\n<turn|>\n<|turn>model\n"
