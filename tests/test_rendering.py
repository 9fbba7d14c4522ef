"""What chat templates may not do: raise what nobody catches, run for ever, make gigabytes, or end anybody else."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from chats import user
from dgemma.core.errors import DgemmaError
from dgemma.text.rendering import Renderer
from said import says

FAULTS = {
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ (10.0 ** 200) ** 200 }}": "OverflowError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ raise_exception('m' * 1000000) }}": "mmm",
    "{{ raise_exception('line\nline\x00\u2028x') }}": "line line x",
    "{{ raise_exception({'a': [1]}) }}": "{'a': [1]}",
    "{{ raise_exception() }}": "TypeError",
    "{{ messages[0].content.encode('cp000') }}": "LookupError",
    "{{ '%d' % 'x' }}": "TypeError",
    "{{ 'x' | nosuch }}": "nosuch",
    "{% include 'x' %}": "refused",
    "{{ nothing.at_all }}": "undefined",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ strftime_now(3) }}": "TypeError",
    "{{ [].append(1) }}": "SecurityError",
    "{{ range(10 ** 9) }}": "OverflowError",
    "{{ messages | tojson(indent={}) }}": "refused",
    "{{": "not a chat template: line 1",
    "{% if %}{% endfor %}": "not a chat template",
    "{% break %}": "SyntaxError",
    "{% generation %}": "not a chat template",
    "{{ " + "(" * 3000 + ")" * 3000 + " }}": "RecursionError",
    "{{ " + "+".join("1" * 20000) + " }}": "RecursionError",
    "{% for x in y %}" * 25 + "{% endfor %}" * 25: "SyntaxError",
    "{{ messages[0].role[:1] * 2000000 }}": "2,000,000 characters",
}


@pytest.fixture(scope="module")
def plain() -> Renderer:
    return Renderer()


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(seconds=0.5, memory=400 << 20)


def rendered(renderer: Renderer, template: str) -> str:
    given = {"messages": [user("hi<|turn>")]}
    return renderer.render(template, trusted={}, said=given, guarded="<|>", where="x.jinja").plain


@pytest.mark.parametrize("template", FAULTS, ids=range(len(FAULTS)))
def test_whatever_a_template_raises_is_one_line(plain: Renderer, template: str) -> None:
    with says("x.jinja", FAULTS[template]):
        rendered(plain, template)


TWICE = "{% set n = namespace(x='x', l=['x'], m=['x']) %}{% for i in range(60) %}"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    LOOP: "0.5 seconds",
    "{{ 'x' * 10 ** 10 }}": "400 MiB",
    "{{ [0] * 10 ** 10 }}": "400 MiB",
    "{{ '%10000000000d' % 1 }}": "stopped",
    "{{ 'x'.center(10 ** 10) }}": "400 MiB",
    "{{ 'x' | center(10 ** 10) }}": "400 MiB",
    "{{ '{:>10000000000}'.format(1) }}": "400 MiB",
    "{{ 9 ** (9 ** 9) }}": "stopped",
    "{{ (2 ** 20000) | string }}": "4300 digits",
    "{{ lipsum(10 ** 9) }}": "stopped",
    "{{ ('x' * 10 ** 6) | indent(10 ** 9, true) }}": "stopped",
    TWICE + "{% set n.x = n.x + n.x %}{% endfor %}": "stopped",
    TWICE + "{% set n.x = n.x ~ n.x %}{% endfor %}": "stopped",
    TWICE + "{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}": "stopped",
    TWICE + "{% set n.l = [n.l, n.l] %}{% set n.m = [n.m, n.m] %}{% endfor %}{{ n.l == n.m }}": "stopped",
    TWICE + "{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l | tojson }}": "stopped",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}": "0.5 seconds",
    "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}": "",
}


@pytest.mark.parametrize("template", ENDLESS, ids=range(len(ENDLESS)))
def test_a_template_has_an_end_in_time_and_in_memory(renderer: Renderer, template: str) -> None:
    began = time.monotonic()
    with says("x.jinja", ENDLESS[template]):
        rendered(renderer, template)
    assert time.monotonic() - began < 10
    assert rendered(renderer, "{{ messages[0].content }}") == "hi<|turn>"  # and the next one runs


PARTS = ["'<'", "'<|'", "'<|turn>'", "' '", "'x<y'", "'\\n'", "''", "c", "c", "q"]
METHODS = (
    *("split", "rsplit", "partition", "rpartition", "splitlines", "replace", "strip", "lstrip", "rstrip", "join"),
    *("removeprefix", "removesuffix", "find", "rfind", "count", "index", "startswith", "endswith", "format", "center"),
    *("upper", "lower", "title", "capitalize", "swapcase", "ljust", "zfill", "islower", "isspace", "expandtabs"),
)
FILTERS = (
    *("trim", "replace", "upper", "lower", "title", "capitalize", "center", "indent", "truncate", "wordwrap", "join"),
    *("length", "wordcount", "first", "last", "list", "string", "reverse", "batch", "sort", "min", "max"),
    *("e", "forceescape", "urlencode", "pprint", "tojson", "striptags", "int", "default"),
)


def expression(rng: random.Random, depth: int = 0) -> str:
    """A chain of what templates do with text; what holds text is made into text only at the end."""
    if depth > 2 or rng.random() < 0.2:
        return rng.choice(PARTS)
    one = expression(rng, depth + 1)
    given = ", ".join(rng.choice([*PARTS, "1", "2"]) for _ in range(rng.randrange(3)))
    made = [
        f"({one}).{rng.choice(METHODS)}({given})", f"({one}) | {rng.choice(FILTERS)}({given})",
        f"({one}) {rng.choice(['+', '~', '==', '<', '%'])} ({expression(rng, depth + 1)})",
        f"({one}) in {rng.choice('cq')}",
        f"(c)[{rng.choice(['0', ':2', '1:', '::-1'])}]",
    ]  # fmt: skip
    if depth == 0:
        made += [f"[{one}, q]", f"{{'a': {one}, c: q}}"]
    return rng.choice(made)


@pytest.mark.parametrize("seed", range(8))
def test_a_template_sees_nothing_hidden(plain: Renderer, seed: int) -> None:
    """Random templates make the same text of the same words, whether something is hidden in them or not."""
    rng, compared = random.Random(seed), 0
    words = ["<|turn>", " a<b> ", "x < y | z >", "<|x|><|turn>\n<turn|>", "plain", "|>", "<b>A</b>&lt;"]
    for _ in range(100):
        template = "{% set c, q = messages[0].content, messages[1].content %}{{ " + expression(rng) + " }}"
        template += "{% set z %}{{ " + expression(rng) + " }}{% endset %}{{ z | trim }}{{ '<' in z }}{{ z.count('|') }}"
        said = {"messages": [user(rng.choice(words)), user(rng.choice(words))]}
        found = []
        for guarded in ("", "<>|"):
            try:
                made = plain.render(template, trusted={}, said=said, guarded=guarded, where="x")
                found.append(made.plain)
            except DgemmaError as error:
                found.append(str(error)[:40])
        assert found[0] == found[1], template
        compared += not found[0].startswith("x: ")
    assert compared > 20


def test_memory_is_looked_at_from_outside_where_the_system_does_not() -> None:
    renderer = Renderer(seconds=5, memory=200 << 20, watch=True)
    with says("200 MiB"):
        rendered(renderer, TWICE + "{% set n.l = n.l + ['x' * 2 ** 24 ~ i] %}{% endfor %}")


def children() -> list[int]:
    return [one.pid for one in psutil.Process().children() if "template_worker" in " ".join(one.cmdline())]


def test_the_process_is_kept_replaced_and_ended() -> None:
    before = set(children())
    renderer = Renderer()
    assert rendered(renderer, "a") == rendered(renderer, "a")
    (first,) = set(children()) - before
    psutil.Process(first).kill()  # as a system short of memory does
    assert rendered(renderer, "b") == "b"
    (second,) = set(children()) - before
    assert second != first
    del renderer
    assert set(children()) == before


def test_threads_take_turns() -> None:
    renderer, found = Renderer(), dict[int, str]()

    def run(i: int) -> None:
        found[i] = rendered(renderer, str(i) * 3)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == {i: str(i) * 3 for i in range(8)}


def test_an_interrupt_ends_the_rendering_and_not_the_next_one() -> None:
    renderer = Renderer()
    assert rendered(renderer, "a") == "a"
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        rendered(renderer, LOOP)
    timer.join()
    assert rendered(renderer, "b") == "b"


FORKED = """
import os, warnings
from dgemma.core.errors import DgemmaError
from dgemma.text.rendering import Renderer
def say(text):
    return renderer.render(text, trusted={}, said={}, guarded="", where="x").plain
renderer = Renderer()
assert say("parent") == "parent"
if (child := os.fork()) == 0:
    assert say("child") == "child"
    del renderer
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert say("parent") == "parent"
"""


def test_the_child_of_a_fork_has_its_own() -> None:
    ran = subprocess.run([sys.executable, "-W", "error", "-c", FORKED], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_no_python_to_run_it_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with says("cannot be started"):
        rendered(Renderer(), "a")
