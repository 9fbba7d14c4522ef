"""What has been said in a chat, and the commands that change it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from ..core.errors import DgemmaError, quoted, shown

HELP = """\
/retry            ask the last message again, with the next seed
/clear            forget everything said so far (/reset does too)
/system [TEXT]    set the system prompt, or take it away
/set              list the settings; /set NAME VALUE changes one, /set NAME default puts it back
/thinking on|off  let the model think before it answers
/seed N           draw other random numbers
/save FILE        write the conversation down; /load FILE takes one up again
/quit             leave (so does Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next.
A message that starts with / is written with two.
"""
FORM = "dgemma chat 1"
LARGEST = 64 << 20
"""Bytes of a conversation that is read."""


@dataclass(kw_only=True)
class Conversation:
    """The turns so far, and how to go on. Thinking is not kept: the model never sees earlier thoughts."""

    system: str | None
    sampling: dict[str, Any]
    options: Sequence[click.Parameter] = ()
    """Those that /set changes."""
    turns: list[dict[str, str]] = field(default_factory=list)
    asked: str | None = None
    """The newest message, answered or not."""

    def messages(self) -> list[dict[str, str]]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.turns

    def ask(self, line: str) -> None:
        self.asked = line
        self.turns.append({"role": "user", "content": line})

    def answered(self, text: str) -> None:
        """Take down the answer; an empty one is as if nothing had been asked."""
        if text:
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.turns.pop()

    def again(self) -> str:
        """Take back the last message and its answer, and return it; it is asked with the next seed.

        Raises:
            DgemmaError: nothing has been asked yet.
        """
        if self.asked is None:
            raise DgemmaError("/retry: nothing has been asked yet")
        if self.turns and self.turns[-1]["role"] == "assistant" and self.turns[-2]["content"] == self.asked:
            del self.turns[-2:]
        self.sampling["seed"] = (self.sampling["seed"] + 1) % 2**64
        return self.asked

    def command(self, line: str) -> str:
        """Carry out a line that starts with a slash → what to tell the user.

        Raises:
            EOFError: the user wants to leave.
            DgemmaError: no such command, or a value it cannot take.
        """
        name, _, value = line.strip().partition(" ")
        value = value.strip()
        match name:
            case "/help" | "/?":
                return HELP
            case "/quit" | "/exit":
                raise EOFError
            case "/clear" | "/reset":
                self.turns.clear()
                self.asked = None
                return "forgotten"
            case "/system":
                self.system = value or None
                return "system prompt set" if value else "no system prompt"
            case "/set":
                return self.change(*value.split(maxsplit=1)) if value else self._settings()
            case "/thinking" | "/seed":
                if not value:
                    raise DgemmaError(f"{name} needs {'on or off' if name == '/thinking' else 'a whole number'}")
                return self.change(name[1:], value)
            case "/save" | "/load":
                if not value:
                    raise DgemmaError(f"{name} needs the name of a file")
                path = Path(os.path.expanduser(value))
                return self.save(path) if name == "/save" else self.load(path)
        raise DgemmaError(f"no command {quoted(name)[1:-1]}; /help lists them")

    def change(self, name: str, value: str = "") -> str:
        """Set one of the options, as the command line would."""
        key = name.lstrip("-").replace("-", "_")
        spelled = f"--{key.replace('_', '-')}"
        option = next((one for one in self.options if one.name == key or spelled in one.opts), None)
        if option is None:
            known = ", ".join(str(one.name).replace("_", "-") for one in self.options)
            raise DgemmaError(f"/set: no setting {quoted(name)}; there are {known}")
        key = str(option.name)
        if not value:
            return f"{name} {_said(self.sampling[key])}"
        if value == "default":
            self.sampling[key] = click.Command("set", params=[option]).make_context("set", []).params[key]
            return f"{name} {_said(self.sampling[key])}"
        flag = isinstance(option, click.Option) and option.is_flag
        try:
            got = (click.BOOL if flag else option.type).convert(value, option, None)
        except click.BadParameter as error:
            raise DgemmaError(f"{name}: {' '.join(error.message.split())}") from None
        self.sampling[key] = (got,) if option.multiple else got
        return f"{name} {_said(self.sampling[key])}"

    def _settings(self) -> str:
        rows = [(str(one.name).replace("_", "-"), _said(self.sampling[str(one.name)])) for one in self.options]
        return "\n".join(f"{name:<15} {value}" for name, value in rows)

    def save(self, path: Path) -> str:
        """Write the conversation to a file for the user's eyes alone, which may be an earlier one and nothing else."""
        from ..checkpoints import files

        if os.path.lexists(path):
            self._read(path)  # refuses what is not a conversation
        data = {"format": FORM, "system": self.system, "messages": self.turns}
        files.write_text(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n", private=True)
        return f"{count(self.turns)} saved in {shown(path)}"

    def load(self, path: Path) -> str:
        system, turns = self._read(path)
        self.system, self.turns, self.asked = system, turns, None
        if turns:
            self.asked = next((one["content"] for one in reversed(turns) if one["role"] == "user"), None)
        return f"{count(turns)} taken up from {shown(path)}{'' if system is None else ', with its system prompt'}"

    @staticmethod
    def _read(path: Path) -> tuple[str | None, list[dict[str, str]]]:
        from ..checkpoints import files

        text, where = files.read_text(path, LARGEST), shown(path)
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            raise DgemmaError(f"{where}: not a conversation that /save wrote") from None
        if not isinstance(data, dict) or data.get("format") != FORM:
            raise DgemmaError(f"{where}: not a conversation that /save wrote")
        system, turns = data.get("system"), data.get("messages")
        if not isinstance(turns, list) or len(turns) % 2 or not isinstance(system, str | None):
            raise DgemmaError(f"{where}: damaged: expected messages of user and assistant in turn")
        for i, one in enumerate(turns):
            good = isinstance(one, dict) and one.keys() == {"role", "content"} and isinstance(one["content"], str)
            if not good or one["role"] != ("user", "assistant")[i % 2]:
                raise DgemmaError(f"{where}: message {i + 1} is not one of user and assistant in turn")
        return system, turns


def settable(params: Iterable[click.Parameter], names: Iterable[str]) -> list[click.Parameter]:
    wanted = set(names)
    return [one for one in params if one.name in wanted]


def count(turns: Sequence[Any]) -> str:
    many = len(turns) // 2
    return f"{many} exchange{'' if many == 1 else 's'}"


def _said(value: Any) -> str:
    if value is None:
        return "the checkpoint's"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(map(repr, value)) or "none"
    return str(value)
