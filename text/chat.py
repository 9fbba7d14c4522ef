"""Chats: what a message may be, where a checkpoint keeps its chat template, and what the template is given."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.checkpoint import inside
from ..checkpoints.files import read_json, read_text
from ..core.errors import DgemmaError, quoted, shown
from .rendering import LARGEST

Message = Mapping[str, Any]

LARGEST_TEMPLATE = 1 << 20
"""Bytes of a chat template; published ones have up to 30,000."""

_DEEPEST = 50  # levels of a message: tool calls need a dozen, and JSON's reader follows no more than a thousand
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A chat template's source, and the file that it is from."""

    source: str
    where: str


def find_template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """Return a checkpoint's template, or None where it has none.

    Looked for in the order of transformers 5.23: its tokenizer takes `chat_template.jinja` with the folder
    `additional_chat_templates`, or else what `tokenizer_config.json` holds; its processor adds `processor_config.json`
    and the older `chat_template.json`. Of several named ones it is the one called "default".

    Args:
        folder: the checkpoint.
        settings: its `tokenizer_config.json`.

    Raises:
        DgemmaError: a template that is there and cannot be read.
    """
    named = {}
    main, more = folder / "chat_template.jinja", folder / "additional_chat_templates"
    if os.path.lexists(main):
        named["default"] = _read_template(folder, main.name)
    if os.path.lexists(more):
        named |= {path.stem: _read_template(folder, f"{more.name}/{path.name}") for path in _templates_in(more)}
    if named:
        if "default" not in named:
            names = quoted(sorted(named), 60)
            raise DgemmaError(f"{shown(more)}: none of its templates {names} is the default; name one default.jinja")
        return named["default"]
    places = {"tokenizer_config.json": settings}
    for name in ("processor_config.json", "chat_template.json", "preprocessor_config.json"):
        if os.path.lexists(folder / name):
            places[name] = read_json(inside(folder, name))
    for name, data in places.items():
        if data.get("chat_template") is not None:
            where = shown(folder / name)
            return ChatTemplate(source=_pick(data["chat_template"], where), where=where)
    return None


def _templates_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".jinja")
    except OSError as error:
        raise DgemmaError(f"{shown(folder)}: {error.strerror}; expected a folder of templates") from None


def _read_template(folder: Path, name: str) -> ChatTemplate:
    return ChatTemplate(source=read_text(inside(folder, name), LARGEST_TEMPLATE), where=shown(folder / name))


def _pick(found: Any, where: str) -> str:
    """Return the default of what a JSON file gives as its template: text, or named texts."""
    if isinstance(found, list):
        entries = [one for one in found if isinstance(one, dict)]
        found = {one.get("name"): one.get("template") for one in entries if isinstance(one.get("name"), str)}
    if isinstance(found, dict):
        if "default" not in found:
            raise DgemmaError(f"{where}: none of its chat templates {quoted(sorted(found), 60)} is called 'default'")
        found = found["default"]
    if not isinstance(found, str):
        raise DgemmaError(f"{where}: chat_template is {quoted(found, 40)}, expected text or a list of named ones")
    if len(found) > LARGEST_TEMPLATE:
        raise DgemmaError(
            f"{where}: chat_template has {len(found):,} characters, expected at most {LARGEST_TEMPLATE:,}"
        )
    return found


def token_variables(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables that name tokens, as transformers gives them to a template.

    Those are the usual ones, every other key that ends in `_token`, and the names in `extra_special_tokens` (formerly
    `additional_special_tokens`) where that is a table. Older folders keep them in `special_tokens_map.json`.
    """
    given = dict(settings)
    if "added_tokens_decoder" not in given and os.path.lexists(folder / "special_tokens_map.json"):
        given |= read_json(inside(folder, "special_tokens_map.json"))
    extra = given.get("extra_special_tokens") or given.get("additional_special_tokens")
    given = {key: value for key, value in given.items() if key in _TOKENS or key.endswith("_token")}
    spelled = {key: _token_text(value) for key, value in (given | (extra if isinstance(extra, dict) else {})).items()}
    return {key: text for key, text in spelled.items() if text is not None}


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


# ---- Messages -------------------------------------------------------------------------------------------------


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return chat messages as JSON's own types, ready for a template.

    A message has a role, and text or a list of text parts as its content; an assistant's may have tool calls or
    reasoning instead. Keys whose value is None are dropped, and a call's arguments are read where they come as JSON
    text, as OpenAI's clients send them.

    Raises:
        DgemmaError: what is wrong with which message, in one line.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise DgemmaError(f"the chat is a {type(messages).__name__}, expected a list of messages")
    if not len(messages):
        raise DgemmaError("the chat has no messages")
    checked = [_check_message(f"message {i}", message) for i, message in enumerate(messages)]
    if _size(checked) > LARGEST:
        raise DgemmaError(f"the chat has more than {LARGEST:,} characters; no model reads so much at once")
    return checked


def _check_message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DgemmaError(f"{where}: expected an object with role and content, found {type(message).__name__}")
    found = {key: value for key, value in plain(message, where).items() if value is not None}
    if "role" not in message:
        raise DgemmaError(f"{where}: expected an object with role and content")
    role = found.get("role")
    if not isinstance(role, str) or not role:
        raise DgemmaError(f"{where}: role is {quoted(role, 40)}, expected text such as 'user'")
    instead = role == "assistant" and found.keys() & {"tool_calls", "reasoning", "reasoning_content"}
    if "content" not in found and not instead:
        raise DgemmaError(f"{where}: expected an object with role and content")
    content = found.get("content", "")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                what = quoted(kind, 40)
                raise DgemmaError(f"{where}: content of type {what} is not supported; this version reads text only")
    elif not isinstance(content, str):
        advice = "; give it as JSON text" if isinstance(content, dict) else ""
        raise DgemmaError(f"{where}: content must be text, found {type(content).__name__}{advice}")
    if "tool_calls" in found:
        found["tool_calls"] = _check_calls(where, found["tool_calls"])
    return found


def _check_calls(where: str, calls: Any) -> list[Any]:
    if not isinstance(calls, list):
        raise DgemmaError(f"{where}: tool_calls is {quoted(calls, 40)}, expected a list")
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DgemmaError(f"{where}: tool call {i} is {quoted(call, 40)}, expected a function with a name")
        if isinstance(function.get("arguments"), str):
            try:
                given = json.loads(function["arguments"] or "{}")
            except (ValueError, RecursionError):
                given = None
            if not isinstance(given, dict):
                raise DgemmaError(f"{where}: the arguments of tool call {i} are no JSON object")
            function["arguments"] = plain(given, where)
    return calls


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """Return a value in JSON's own types, whatever subclasses and NumPy's scalars it is made of.

    Raises:
        DgemmaError: something in it that JSON has no word for.
    """
    if depth > _DEEPEST:
        raise DgemmaError(f"{where}: nested more than {_DEEPEST} levels deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, Mapping):
        return _object(value, where, depth)
    if isinstance(value, list | tuple):
        return [plain(one, where, depth + 1) for one in value]
    if isinstance(value, np.generic):
        return plain(value.item(), where, depth + 1)
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 64:
        return int.__int__(value)
    if isinstance(value, float) and math.isfinite(value):
        return float.__float__(value)
    raise DgemmaError(f"{where}: holds {_shown(value)}, which JSON cannot write")


def _object(value: Mapping[Any, Any], where: str, depth: int) -> dict[str, Any]:
    made = {}
    for key in value:
        if not isinstance(key, str):
            raise DgemmaError(f"{where}: the key {_shown(key)} is not text")
        made[_text(key, where)] = plain(value[key], where, depth + 1)
    return made


def _text(value: str, where: str) -> str:
    text = str.__str__(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DgemmaError(f"{where}: not valid text: it holds half a character (a lone surrogate)") from None
    return text


def _shown(value: Any) -> str:
    """Return a value of any type for a message, in its own words only where they are short."""
    return quoted(value, 40) if type(value) in (int, float, bytes) else f"a {quoted(type(value).__name__, 40)[1:-1]}"


def _size(value: Any) -> int:
    if isinstance(value, dict):
        return sum(len(key) + _size(one) for key, one in value.items())
    if isinstance(value, list):
        return 1 + sum(map(_size, value))
    return len(value) if isinstance(value, str) else 1
