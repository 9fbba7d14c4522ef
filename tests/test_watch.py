"""Pages and notebooks: one renderer, run in headless Chromium; text from outside stays text, and nothing is loaded."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dgemma
from chromium import Chromium
from dgemma.core.events import Draft, Generation
from dgemma.show.frame import STATES, printable
from dgemma.show.html import Drawing, page, part
from recordings import Told, recorded, scripted, spelled
from said import says

HOSTILE = "</script><img src=//evil.example/x onerror=alert(1)><!-- &amp; 世界 🙂 שלום \u202e \x07 {{x}} </template>"
ROOT = "document.querySelector('[data-dgemma]').shadowRoot"


@pytest.fixture(scope="module")
def chromium(browser: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(browser, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def show(chromium: Chromium, tmp_path: Path) -> Iterator[Any]:
    """Open a page; it may complain of nothing and ask for nothing but itself."""
    chromium.events.clear()

    def open_(text: str) -> Chromium:
        (tmp_path / "page.html").write_text(text, encoding="utf-8")
        chromium.call("Page.navigate", url=(tmp_path / "page.html").as_uri())
        chromium.wait_for("document.readyState === 'complete' && !!document.querySelector('[data-dgemma=drawn]')")
        return chromium

    yield open_
    assert chromium.said() == []
    assert [url for url in chromium.requests() if not url.startswith("file://")] == []


def slide(chromium: Chromium, to: int) -> str:
    return chromium.evaluate(
        f"(() => {{ const slider = {ROOT}.querySelector('input'); slider.value = {to};"
        f"slider.dispatchEvent(new Event('input')); return {ROOT}.querySelector('pre').textContent; }})()"
    )


def text(chromium: Chromium, name: str) -> str:
    return chromium.evaluate(f"{ROOT}.querySelector('[part={name}]').textContent")


# ---- Pages ------------------------------------------------------------------------------------------------------


def test_the_slider_shows_every_pass(show: Any, tmp_path: Path) -> None:
    told = spelled("def f():\n    é世", held=4)
    chromium = show(page(recorded(told, tmp_path / "r.jsonl")))
    assert text(chromium, "canvas") == "def f():\n    é世" and text(chromium, "count") == "7 tokens in 4 passes"
    first = slide(chromium, 0)
    assert first.startswith("def f():") and "░" in first
    assert text(chromium, "count") == "step 1 of at most 4 · accepted 5 of 15 · entropy 0.733 nats · log accept -1.235"
    drafts = [event for event in told if isinstance(event, Draft)]
    frames = told.asked.frames()
    for i, draft in enumerate(drafts):
        slide(chromium, i)
        got = chromium.evaluate(
            f"Array.from({ROOT}.querySelectorAll('[data-span]'), (one) => one.className.split(' ')[0])"
        )
        assert got == [STATES[span.state] for span in frames.add(draft).spans]
    assert text(chromium, "canvas") == "def f():\n    é世∎"
    assert {"held", "settled", "accepted"} <= set(got)


def test_by_keys_alone(show: Any, tmp_path: Path) -> None:
    chromium = show(page(recorded(spelled("abcdef", held=1), tmp_path / "r.jsonl")))
    chromium.evaluate(f"{ROOT}.querySelector('input').focus()")
    chromium.press(["ArrowLeft", "ArrowLeft"])
    assert text(chromium, "count").startswith("step 1 ")
    assert chromium.evaluate(f"{ROOT}.querySelector('input').getAttribute('aria-valuetext')").startswith("pass 1 of 2")
    chromium.evaluate(f"{ROOT}.querySelector('pre').focus()")
    chromium.press(["ArrowRight"] * 3)
    assert text(chromium, "detail") == 'position 2: "c", token 99, accepted, 0.000 nats, the next pass reads "e"'
    chromium.press(["ArrowRight"] * 9)
    assert text(chromium, "detail") == 'position 6: "A", token 65, changing, 1.099 nats'
    assert chromium.evaluate(f"{ROOT}.querySelectorAll('.chosen').length") == 1


def test_it_plays_and_stops(show: Any, tmp_path: Path) -> None:
    chromium = show(page(recorded(spelled("abcdef"), tmp_path / "r.jsonl")))
    assert text(chromium, "play") == "Play", "nothing moves by itself"
    chromium.evaluate(f"{ROOT}.querySelector('button').click()")
    assert text(chromium, "play") == "Pause" and text(chromium, "count").startswith("step 1 ")
    chromium.wait_for(f"{ROOT}.querySelector('[part=count]').textContent.startsWith('step 2 ')")
    chromium.wait_for(f"{ROOT}.querySelector('button').textContent === 'Play'")
    assert "passes" in text(chromium, "count")


def test_states_differ_by_more_than_colour(show: Any, tmp_path: Path) -> None:
    chromium = show(page(recorded(spelled("abcdef", held=2), tmp_path / "r.jsonl")))
    looks = chromium.evaluate(
        f"Array.from({ROOT}.querySelectorAll('li span'), (one) => {{ const look = getComputedStyle(one);"
        "return [look.fontStyle, look.fontWeight, look.textDecorationLine, look.backgroundImage,"
        "look.backgroundColor].join(); })"
    )
    assert len(looks) == len(set(looks)) == 5


def test_hostile_text_is_text(show: Any, tmp_path: Path) -> None:
    told = spelled(HOSTILE)
    asked = dict(vars(told.asked)) | {"title": HOSTILE}
    recording = recorded(Told(told.events, type(told.asked)(**asked)), tmp_path / "r.jsonl")
    made = page(recording)
    assert "evil" not in re.sub(r"<script.*?</script>|<pre>.*?</pre>|<title>.*?</title>", "", made, flags=re.DOTALL)
    chromium = show(made)
    assert text(chromium, "canvas") == text(chromium, "title") == printable(HOSTILE, grid=True)
    assert slide(chromium, 1) == printable(HOSTILE, grid=True) + "∎"
    assert chromium.evaluate("document.title") == printable(HOSTILE, grid=True)
    inside = f"[...document.querySelectorAll('body *'), ...{ROOT}.querySelectorAll('*')].map((one) => one.localName)"
    known = "main div pre script template style figure figcaption button i input p ul li span"
    assert set(chromium.evaluate(inside)) <= set(known.split())


def test_without_scripts_the_text_is_there(tmp_path: Path) -> None:
    made = page(recorded(spelled("a < b & c"), tmp_path / "r.jsonl"))
    assert "<pre>a &lt; b &amp; c</pre>" in made
    assert "default-src 'none'" in made and "http" not in re.sub(r'http-equiv="[^"]*"', "", made)


def test_every_turn_has_its_slider(show: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    recorded(scripted(["one ", "two"], thinking="hm", title="> first"), path)
    more = recorded(scripted(["three"], title="> second"), tmp_path / "other.jsonl").path.read_text().splitlines()[1:]
    path.write_text(path.read_text() + "\n".join(more) + "\n")
    chromium = show(page(dgemma.replay(path)))
    hosts = "Array.from(document.querySelectorAll('[data-dgemma]'), "
    seen = chromium.evaluate(hosts + "(one) => one.shadowRoot.querySelector('pre').textContent)")
    assert seen == ["hm\n\none two", "three"]


# ---- Notebooks, and what is none --------------------------------------------------------------------------------


class Display:
    """What a notebook does with outputs."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.first = True

    def display(self, output: Any) -> None:
        assert self.first
        self.first = False
        self.shown.append(output.data)

    def update(self, output: Any) -> None:
        assert not self.first
        self.shown.append(output.data)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Display:
    pytest.importorskip("IPython")
    from IPython.core import getipython

    display = Display()
    monkeypatch.setattr(getipython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr("IPython.display.DisplayHandle", lambda: display)
    monkeypatch.setattr("dgemma.show.watch.FRAME_SECONDS", 0.0)
    return display


def data_of(made: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json">(.*?)</script>', made)
    assert found is not None
    return json.loads(found[1])


def test_a_notebook_draws_live_and_has_the_slider_at_the_end(notebook: Display, show: Any) -> None:
    model = dgemma.load("nano", backend="numpy")
    result = dgemma.watch(model.stream(".3.1\n.2..\n....\n...4"))
    assert isinstance(result, Generation) and result.text == model.generate(".3.1\n.2..\n....\n...4").text
    found = [data_of(made) for made in notebook.shown]
    assert [(one["live"], len(one["passes"])) for one in found[:-1]] == [(True, 1)] * result.stats.steps
    assert all('data-lm-suppress-shortcuts="true"' in made for made in notebook.shown), "JupyterLab takes arrow keys"
    assert not found[-1]["live"] and len(found[-1]["passes"]) == result.stats.steps
    assert [one["passes"][0] for one in found[:-1]] == found[-1]["passes"]
    chromium = show(f"<!doctype html><title>x</title><body>{notebook.shown[0]}")
    assert chromium.evaluate(f"getComputedStyle({ROOT}.querySelector('[part=controls]')).display") == "none"
    assert text(chromium, "count").startswith("step 1 ")
    chromium = show(f"<!doctype html><title>x</title><body>{notebook.shown[-1] * 2}")
    assert text(chromium, "canvas") == result.text


def test_an_interrupted_cell_keeps_what_came(notebook: Display) -> None:
    told = scripted(["one ", "two ", "three"])

    class Interrupted(Told):
        def __iter__(self) -> Iterator[Any]:
            yield from self.events[:4]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dgemma.watch(Interrupted(told.events, told.asked))
    last = data_of(notebook.shown[-1])
    assert not last["live"] and len(last["passes"]) == 2 and last["figures"] is None


def test_elsewhere_it_returns_what_was_generated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording = recorded(scripted(["one ", "two"]), tmp_path / "r.jsonl")
    result = dgemma.watch(recording)
    assert isinstance(result, Generation) and result.text == "one two" and capsys.readouterr().out == ""
    assert dgemma.watch(dgemma.record(recording.turns[0], tmp_path / "again.jsonl")) is not None
    recording.turns[0].events.pop()
    assert dgemma.watch(recording) is None
    with says("watch got a generator", "model.stream"):
        dgemma.watch(event for event in recording)


def test_on_a_terminal_it_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    dgemma.watch(scripted(["one ", "\x1b[31m", "two"], title="$ x"))
    said = screen.getvalue()
    assert "step 1/4" in said and "settled" in said and "\x1b[31m" not in said
    assert said.endswith("one ␛[31mtwo\n") and said.count("\x1b[?25l") == said.count("\x1b[?25h")


def test_ipython_is_imported_only_where_it_runs() -> None:
    code = """
import sys
sys.path.insert(0, "tests")
import dgemma
from recordings import scripted
assert dgemma.watch(scripted(["a"])) is not None
print({"IPython", "PIL", "torch"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1]
    )
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


def test_drawings_take_every_event() -> None:
    told = scripted(["a", "b"], canvas=1)
    drawing = Drawing(told.asked)
    assert data_of(part(drawing))["passes"] == []
    for event in told:
        drawing.add(event)
        json.dumps(drawing.data(live=True), allow_nan=False)
    assert [kind for kind, _ in drawing.data()["said"]] == ["answer", "answer"]
