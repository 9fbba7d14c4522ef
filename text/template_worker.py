"""The process that chat templates run in, started by `rendering.py`; it imports nothing of this package.

A template comes with the weights, from strangers. Jinja's sandbox keeps it from files and from Python's insides, not
from looping for hours or from making a string of ten gigabytes, and much of that happens in one call of C that nobody
can interrupt. So it runs here, where the operating system ends it: by an alarm, and by a limit of memory.

What users say must not become control tokens, however a template cuts it, joins it or changes it. So of every string
that comes from a message, characters that control tokens are spelled with are hidden: each is replaced by a character
that nobody used, and whoever encodes the text knows by that whose they were. `Said` lets the template see none of this.
"""

from __future__ import annotations

import codecs
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, BinaryIO, ClassVar

HIDDEN_FROM, HIDDEN_TO = 0xF0000, 0xFFFFD
"""Private characters, of which as many as are needed and nobody used stand for hidden ones."""


class Said(str):
    """Text with hidden characters in it, which answers a template's questions as if it had none.

    Lengths and places are the same either way. What an operation of Python's own makes of it keeps them hidden. Names
    that strings do not have begin with an underscore, which a template cannot reach.
    """

    _hide: ClassVar[Mapping[int, int]] = {}
    _show: ClassVar[Mapping[int, int]] = {}

    @classmethod
    def _keep(cls, text: str) -> str:
        """Return text that may have hidden characters in it, as this kind where it does."""
        return cls(text) if any(chr(code) in text for code in cls._show) else str(text)

    @classmethod
    def _of(cls, text: str) -> str:
        """Return a user's text with its characters hidden."""
        return cls._keep(text.translate(cls._hide))

    @property
    def _text(self) -> str:
        return str.translate(self, self._show)

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        return self._of(repr(self._text))

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return self._text == _plain(other)

    def __ne__(self, other: object) -> bool:
        return self._text != _plain(other)

    def __lt__(self, other: str) -> bool:
        return self._text < _plain(other)

    def __le__(self, other: str) -> bool:
        return self._text <= _plain(other)

    def __gt__(self, other: str) -> bool:
        return self._text > _plain(other)

    def __ge__(self, other: str) -> bool:
        return self._text >= _plain(other)

    def __contains__(self, part: object) -> bool:
        return _plain(part) in self._text

    def __getitem__(self, key: Any) -> str:
        return self._keep(str.__getitem__(self, key))

    def __iter__(self) -> Iterator[str]:
        return map(self._keep, str.__iter__(self))

    def __add__(self, other: str) -> str:
        return self._keep(str.__add__(self, other))

    def __radd__(self, other: Any) -> Any:
        return self._keep(str.__add__(other, self)) if isinstance(other, str) else NotImplemented

    # Where a template names what it looks for, it is looked for in the plain text and the piece is cut from this one;
    # what cannot be hidden is found here as well.

    def split(self, sep: str | None = None, maxsplit: int = -1) -> list[str]:  # type: ignore[override]
        if sep is None or self._never_hidden(sep):
            return [self._keep(part) for part in str.split(self, sep, maxsplit)]
        return self._cut(self._text.split(_plain(sep), maxsplit), len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: int = -1) -> list[str]:  # type: ignore[override]
        if sep is None or self._never_hidden(sep):
            return [self._keep(part) for part in str.rsplit(self, sep, maxsplit)]
        return self._cut(self._text.rsplit(_plain(sep), maxsplit), len(sep))

    def partition(self, sep: str) -> tuple[str, str, str]:  # type: ignore[override]
        before, found, after = self._cut(self._text.partition(_plain(sep)), 0)
        return before, found, after

    def rpartition(self, sep: str) -> tuple[str, str, str]:  # type: ignore[override]
        before, found, after = self._cut(self._text.rpartition(_plain(sep)), 0)
        return before, found, after

    def replace(self, old: str, new: str, count: int = -1) -> str:  # type: ignore[override]
        if self._never_hidden(old):
            return self._keep(str.replace(self, old, new, count))
        return self._keep(str.join(new, self.split(old, count)))

    def strip(self, chars: str | None = None) -> str:  # type: ignore[override]
        return self.lstrip(chars).rstrip(_plain(chars))  # which may be on a piece without anything hidden

    def lstrip(self, chars: str | None = None) -> str:  # type: ignore[override]
        return self[len(self) - len(self._text.lstrip(_plain(chars))) :]

    def rstrip(self, chars: str | None = None) -> str:  # type: ignore[override]
        return self[: len(self._text.rstrip(_plain(chars)))]

    def removeprefix(self, prefix: str) -> str:  # type: ignore[override]
        return self[len(prefix) if self.startswith(prefix) else 0 :]

    def removesuffix(self, suffix: str) -> str:  # type: ignore[override]
        return self[: len(self) - (len(suffix) if self.endswith(suffix) else 0)]

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        """Bytes with hidden characters in them, which no narrower encoding has."""
        if codecs.lookup(encoding).name != "utf-8":
            raise ValueError(f"text of a message cannot be encoded as {encoding}")
        return str.encode(self, encoding, errors)

    def _never_hidden(self, part: str) -> bool:
        return not isinstance(part, Said) and part.translate(self._hide) == part

    def _cut(self, parts: Iterable[str], gap: int) -> list[str]:
        """Return the pieces that lie where these lie in the plain text, `gap` characters apart."""
        cut, at = [], 0
        for part in parts:
            cut.append(self[at : at + len(part)])
            at += len(part) + gap
        return cut


def _plain(value: Any) -> Any:
    """Return a value, and what it holds, without anything hidden."""
    if isinstance(value, Said):
        return value._text
    if isinstance(value, tuple | list):
        return type(value)(map(_plain, value))
    if isinstance(value, dict):
        return {_plain(key): _plain(one) for key, one in value.items()}
    return value


def _complete() -> None:
    """Give `Said` the rest of what strings can do: questions ask the plain text, changes keep what is hidden."""

    def asking(name: str) -> Callable[..., Any]:
        return lambda self, *args: getattr(self._text, name)(*map(_plain, args))

    def changing(name: str) -> Callable[..., Any]:
        def change(self: Said, *args: Any) -> Any:
            made = getattr(str, name)(self, *args)
            return [self._keep(part) for part in made] if isinstance(made, list) else self._keep(made)

        return change

    asked = ["find", "rfind", "index", "rindex", "count", "startswith", "endswith"]
    asked += [name for name in dir(str) if name.startswith("is")]
    changed = "lower upper title capitalize swapcase casefold center ljust rjust zfill expandtabs splitlines join"
    for name in asked:
        setattr(Said, name, asking(name))
    for name in [*changed.split(), "__mul__", "__rmul__", "__mod__"]:
        setattr(Said, name, changing(name))


_complete()


def hidden_by(guarded: str, used: set[str]) -> tuple[dict[int, int], dict[int, int]]:
    """Return what shows hidden characters and what hides them: code points to those that are not `used`, and back."""
    free = (code for code in range(HIDDEN_FROM, HIDDEN_TO) if chr(code) not in used)
    show = dict(zip(free, map(ord, guarded), strict=False))
    return show, {here: there for there, here in show.items()}


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(one, change) for one in value]
    if isinstance(value, dict):
        return {change(key): _mapped(one, change) for key, one in value.items()}
    return value


def _holds(value: Any) -> bool:
    """Whether anything is hidden in a value."""
    if isinstance(value, dict):
        return any(_holds(one) for pair in value.items() for one in pair)
    return any(map(_holds, value)) if isinstance(value, list | tuple) else isinstance(value, Said)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=4)
def compiled(source: str) -> Any:
    """Compile a template in the environment that the field's templates are written for (transformers')."""
    import jinja2
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator
    from jinja2.ext import Extension
    from jinja2.filters import sync_do_join as do_join
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what a model wrote, for training; here it is a block like any other."""

        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Generator(CodeGenerator):
        def visit_Concat(self, node: Any, frame: Any) -> None:  # `a ~ b`, which forgets what is hidden
            self.write("environment.concat(map(str, (")
            for one in node.nodes:
                self.visit(one, frame)
                self.write(", ")
            self.write(")))")

        def visit_Compare(self, node: Any, frame: Any) -> None:  # `a in b`, which asks b, that may be the template's
            if len(node.ops) > 1 or node.ops[0].op not in ("in", "notin"):
                super().visit_Compare(node, frame)
                return
            self.write("(environment.within(" if node.ops[0].op == "in" else "(not environment.within(")
            for one in (node.expr, node.ops[0].expr):
                self.visit(one, frame)
                self.write(", ")
            self.write("))")

    class Environment(ImmutableSandboxedEnvironment):
        code_generator_class = Generator
        said: type[Said] = Said  # of the request at hand
        within: Callable[..., bool]

        def call(self, context: Any, called: Any, /, *args: Any, **options: Any) -> Any:  # type: ignore[override]
            owner = getattr(called, "__self__", None)
            if type(owner) is str and any(
                isinstance(one, Said) for one in args
            ):  # the template's text, asked of a user's
                called = getattr(self.said(owner), called.__name__)
            return super().call(context, called, *args, **options)

    def refuse(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    @jinja2.pass_eval_context
    def join(context: Any, values: Any, d: str = "", attribute: Any = None) -> str:
        return env.said._keep(do_join(context, values, d, attribute))

    def string(value: Any) -> str:
        return value if isinstance(value, str) else env.said._keep(str(value))

    def concat(parts: Iterable[str]) -> str:  # of macros, blocks and `a ~ b`; what is hidden is easily forgotten here
        return env.said._keep("".join(parts))

    def on_plain(function: Callable[..., Any], always: bool = False) -> Callable[..., Any]:
        """Let a filter that looks at single characters have the plain text; what it makes of a user's is the user's."""

        def run(value: Any, *args: Any, **options: Any) -> Any:
            made = function(_plain(value), *map(_plain, args), **{key: _plain(one) for key, one in options.items()})
            return env.said._of(str(made)) if always or _holds(value) else made

        return run

    def within(value: Any, whole: Any) -> bool:
        return (_plain(value) if isinstance(whole, str) else value) in whole

    def in_context(function: Callable[..., Any]) -> Callable[..., Any]:
        @jinja2.pass_eval_context
        def run(context: Any, *args: Any, **options: Any) -> Any:
            return on_plain(partial(function, context))(*args, **options)

        return run

    env = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    env.concat = concat  # type: ignore[method-assign]
    env.within = within
    env.tests["in"] = within
    env.filters |= {"tojson": on_plain(_tojson), "join": join, "string": string, "safe": lambda value: value}
    for name in ("e", "escape", "forceescape", "urlencode", "pprint", "title"):
        env.filters[name] = on_plain(env.filters[name])
    env.filters |= {name: in_context(env.filters[name]) for name in ("urlize", "xmlattr")}
    env.filters["striptags"] = on_plain(env.filters["striptags"], always=True)  # it also turns `&lt;` back
    env.globals |= {"raise_exception": refuse, "strftime_now": lambda layout: datetime.now().strftime(layout)}
    return env.from_string(source)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Render one template → its text and what is hidden in it, or what went wrong."""
    import jinja2

    try:
        template = compiled(request["template"])
    except MemoryError:
        return {"memory": True}
    except BaseException as error:
        line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        return {"broken": f"{line}{_said(error)}"}
    try:
        used: set[str] = set(request["template"])
        _mapped([request["said"], request["trusted"]], lambda text: used.update(text) or text)
        show, hide = hidden_by(request["guarded"], used)
        kind = type("str", (Said,), {"_hide": hide, "_show": show})  # by that name errors call it
        template.environment.said = kind
        text = template.render(request["trusted"] | _mapped(request["said"], kind._of))
        if len(text) > request["largest"]:
            return {"refused": f"it makes {len(text):,} characters of them, expected at most {request['largest']:,}"}
        return {"text": str.__str__(text), "show": list(show.items())}
    except MemoryError:
        return {"memory": True}
    except BaseException as error:
        return {"refused": _said(error)}


def _said(error: BaseException) -> str:
    import jinja2

    try:
        text = str(_plain(error.args[0]) if error.args and isinstance(error.args[0], str) else error)[:1000]
    except BaseException:
        text = ""
    own = isinstance(error, jinja2.TemplateError) and not isinstance(error, jinja2.TemplateRuntimeError)
    return text if own and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def receive(stream: BinaryIO) -> Any:
    """Read one message, or None at the end."""
    size = int.from_bytes(stream.read(8), "little")
    return json.loads(stream.read(size)) if size else None


def send(stream: BinaryIO, message: Any) -> None:
    data = json.dumps(message).encode()
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def limit(seconds: float, memory: int) -> None:
    """Have the operating system end this process where it runs longer, or grows larger, and let it write no file."""
    import resource

    wanted = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0} | ({resource.RLIMIT_AS: memory} if memory else {})
    for what, most in wanted.items():
        try:
            resource.setrlimit(what, (most, most))
        except (OSError, ValueError):  # a lower one holds already, or the system has none: the parent looks too
            continue
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, seconds)


def main() -> None:
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    settings = receive(stdin)
    sys.path[:] = settings["path"]  # where the parent finds jinja2, this one does
    import jinja2.sandbox  # noqa: F401  # before there are limits, and while nobody waits

    send(stdout, {"ready": True})
    while (request := receive(stdin)) is not None:
        limit(settings["seconds"], settings["memory"])
        reply = answer(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(stdout, reply)


if __name__ == "__main__":
    main()
