"""The drawing: states told apart without colour, nothing wider or taller than the terminal, nothing that steers it."""

from __future__ import annotations

import io
import re
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from dgemma.cli.output import Wait, significant, size, summary
from dgemma.cli.sinks import LiveSink, PlainSink
from dgemma.core.events import Commit, Done, Draft, Prefill
from dgemma.show.frame import ACCEPTED, CHANGING, GUESS, HELD, SETTLED, Pieces, printable
from dgemma.show.terminal import STYLES, CanvasLive, CanvasView
from scripted import EOS, STATS, ScriptedModel, Words, draft

LINES = 24
CSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def terminal(width: int = 80, height: int = LINES, **options: object) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, color_system="standard",
        highlight=False, legacy_windows=False, _environ={}, **options,
    )  # type: ignore[arg-type]  # fmt: skip


def view_of(words: list[str], *, budget: int = 1000, encoding: str = "utf-8") -> CanvasView:
    return CanvasView(Pieces(Words(words)), [EOS], budget, encoding)


def make_draft(tokens: list[int], accepted: list[bool], *, canvas: int = 0, step: int = 0) -> Draft:
    return Draft(
        canvas=canvas, step=step, steps=48, tokens=np.asarray(tokens, np.int32), accepted=np.asarray(accepted),
        entropy=np.ones(len(tokens), np.float32),
    )  # fmt: skip


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shown(view: CanvasView, width: int = 80, height: int = LINES) -> list[Text]:
    return view.lines(terminal(width, height), width, height)


def test_four_states_by_acceptance_and_change() -> None:
    view = view_of(["aa", "bb", "cc", "dd"])
    view.update(make_draft([1, 2, 3, 4], [False, False, True, True]))
    view.update(make_draft([2, 2, 4, 4], [False, False, True, True], step=1))
    row = shown(view)[0]
    assert row.plain == "░░bbdddd"
    styles = [row.get_style_at_offset(terminal(), at) for at in range(0, 8, 2)]
    assert styles == [STYLES[state] for state in (CHANGING, GUESS, ACCEPTED, SETTLED)]


def test_states_differ_without_colour() -> None:
    attributes = [(style.bold, style.dim, style.italic, style.underline) for style in STYLES]
    assert len(set(attributes)) == len(STYLES)
    view = view_of(["aa", "bb"])
    view.update(make_draft([1, 2], [False, True]))
    console = terminal(no_color=True)
    console.print(view)
    said = written(console)
    assert "\x1b[4m" in said and "\x1b[1m" in said and "░" in said
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", said), "colour in spite of NO_COLOR"


def test_held_tokens_are_drawn_apart_and_do_not_count() -> None:
    view = view_of(["aa", "bb"])
    held = np.asarray([True, False, False])
    view.update(replace(make_draft([1, 2, 2], [True, True, False]), held=held, entropy=np.asarray([9, 1, 2], "f4")))
    row, status, legend = shown(view)
    assert row.plain == "aabb░░" and row.get_style_at_offset(terminal(), 0) == STYLES[HELD]
    assert "accepted 1/2" in status.plain and "entropy 1.500 nats" in status.plain
    assert legend.plain.endswith("settled  held")
    view.update(replace(make_draft([1, 2, 2], [True, True, False], step=1), held=held, log_accept=-2.5))
    assert shown(view, 120)[1].plain.endswith("nats · log accept -2.500")


def test_a_new_canvas_forgets_the_one_before() -> None:
    view = view_of(["aa"])
    view.update(make_draft([1], [False]))
    view.update(make_draft([1], [False], canvas=1))
    assert shown(view)[0].plain == "░░"
    assert "canvas 2" in shown(view)[1].plain


def test_nothing_is_shown_behind_an_accepted_end_or_the_budget() -> None:
    view = view_of(["aa", "bb"])
    view.update(make_draft([1, EOS, 2, 2], [True] * 4))
    assert shown(view)[0].plain == "aa∎··"
    view.update(make_draft([1, EOS, 2, 2], [True, False, False, False], step=1))
    assert shown(view)[0].plain == "aa<eos>bbbb"
    held = np.asarray([False, False, True, False])
    view.update(replace(make_draft([1, EOS, 2, EOS], [True] * 4, step=2), held=held))
    assert shown(view)[0].plain == "aa<eos>bb∎", "what a held token follows is no end"
    view = view_of(["aa", "bb"], budget=3)
    view.update(make_draft([1, 2, 1, 2, 1], [True] * 5))
    assert shown(view)[0].plain == "aabbaa··"


def test_ascii_terminal_gets_ascii() -> None:
    view = view_of(["aa", "bb"], encoding="ascii")
    view.update(make_draft([1, EOS, 1], [False, True, True]))
    for row in shown(view):
        assert row.plain.isascii(), row.plain


@given(
    words=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=8), data=st.data(),
    width=st.integers(1, 100), height=st.integers(2, 30),
)  # fmt: skip
def test_never_wider_taller_or_steered(words: list[str], data: st.DataObject, width: int, height: int) -> None:
    size = data.draw(st.integers(1, 60))
    view = view_of(words, encoding=data.draw(st.sampled_from(["utf-8", "ascii"])))
    for step in range(3):
        tokens = data.draw(st.lists(st.integers(0, len(words)), min_size=size, max_size=size))
        accepted = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
        view.update(make_draft(tokens, accepted, step=step))
        console = terminal(width, height)
        lines = view.lines(console, width, height)
        assert len(lines) <= height - 1
        # A wide character has no place on a terminal of one column.
        assert all(line.cell_len <= max(width, 2) for line in lines)
        console.print(view)
        assert printable(left := CSI.sub("", written(console)), grid=True) == left


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"), ("a\nb\tc", "a\nb\tc"), ("\x1b[2Jx", "␛[2Jx"), ("a\rb", "a␍b"), ("a\r\nb", "a\nb"),
        ("\x07\x7f\x9b31m", "␇␡�31m"), ("héllo 世界 🙂", "héllo 世界 🙂"), ("\x1b]0;t\x07", "␛]0;t␇"),
    ],
)  # fmt: skip
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_characters_of_several_tokens_are_joined() -> None:
    class Bytes(Words):
        def decode(self, ids, *, special=False):  # type: ignore[no-untyped-def]
            return bytes(ids).decode("utf-8", "replace")

    tokens = list("aé世🙂b".encode())
    spans = list(Pieces(Bytes([])).spans(tokens))
    assert "".join(text for _, _, text in spans) == "aé世🙂b"
    assert spans[0][:2] == (0, 1) and spans[-1][1] == len(tokens)
    assert all(a[1] == b[0] for a, b in pairwise(spans))


def test_tall_canvases_show_where_it_is_open() -> None:
    view = view_of([f"line {i}\n" for i in range(40)])
    tokens = list(range(1, 41))
    for step in range(2):
        view.update(make_draft(tokens, [i < 30 for i in range(40)], step=step))
    lines = [line.plain.strip() for line in shown(view, 40, 14)]
    assert len(lines) == 13
    assert lines[0] == "... 30 more lines" and "line 30" in lines and lines[10] == "... 2 more lines"
    assert "step 2/48" in lines[11]


def test_status_line_keeps_its_place_while_a_canvas_shrinks() -> None:
    view = view_of(["x\n", "y"])
    view.update(make_draft([1, 1, 1, 1], [True] * 4))
    before = len(shown(view))
    view.update(make_draft([2, 2, 2, 2], [True] * 4, step=1))
    assert len(shown(view)) == before


def run(model: ScriptedModel, console: Console) -> str:
    view = CanvasView(Pieces(model.tokenizer), [EOS], 1000, "utf-8")
    with LiveSink(console, terminal(), view) as sink:
        for event in model.stream("x"):
            sink.feed(event)
    return written(console)


def test_live_ends_with_the_text_alone() -> None:
    said = run(ScriptedModel(["one ", "two\n", "three ", "\x1b[31m", "four"], canvas=3), terminal())
    assert "░" in said and "settled" in said
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h") == 1, "the cursor comes back"
    assert "\x1b[31m" not in said, "the model's own escape reached the terminal"
    # The complete line went up above the drawing; the rest is printed once that has been wiped away.
    assert said.index("one two\n") < said.rindex("settled")
    assert CSI.sub("", said[said.rindex("\x1b[2K") :]) == "three ␛[31mfour\n"


def test_live_shows_thinking_apart() -> None:
    said = CSI.sub("", run(ScriptedModel(["yes"], thinking="hm.\nso"), terminal()))
    assert re.search(r"thinking:\n.*hm\.\n.*so\n\nanswer:\n", said, re.DOTALL), said
    assert said.endswith("yes\n")


def test_a_narrowed_terminal_is_wiped_over_the_rows_it_wrapped() -> None:
    view = view_of(["word "] * 30)
    console = terminal(60)
    live = CanvasLive(view, console, redirect_stderr=False)
    view.update(make_draft([1] * 30, [True] * 30))
    with live:
        live.draw(now=True)
        widths = view.widths
        console.width = 30
        mark = len(written(console))
        live.draw(now=True)
        again = written(console)[mark:]
    wrapped = sum(-(-cells // 30) for cells in widths)
    assert again.count("\x1b[1A") == wrapped - 1 > len(widths) - 1


def test_what_is_drawn_does_not_wrap() -> None:
    """A terminal that is narrower already and has not said so clips it: every frame has the rows that are counted."""
    view = view_of(["word "] * 30)
    console = terminal(60)
    view.update(make_draft([1] * 30, [True] * 30))
    with CanvasLive(view, console, redirect_stderr=False) as live:
        live.draw(now=True)
        console.print("a line that goes above, and wraps as any other")
    parts = re.split(r"\x1b\[\?7([lh])", written(console))
    wraps, drawn = True, 0
    for text in parts:
        if text in ("l", "h"):
            wraps = text == "h"
        elif "settled" in text:
            assert not wraps
            drawn += 1
        elif "goes above" in text:
            assert wraps
    assert drawn >= 2 and wraps


def test_draws_at_most_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(["a"])
    live = CanvasLive(view, terminal(), redirect_stderr=False)
    drawn: list[int] = []
    monkeypatch.setattr(live, "refresh", lambda: drawn.append(1))
    for _ in range(100):
        live.draw()
    assert len(drawn) == 1
    live.draw(now=True)
    assert len(drawn) == 2


def test_plain_sink_on_a_terminal_does_not_move(capsys: pytest.CaptureFixture[str]) -> None:
    console, errors = terminal(), terminal()
    with PlainSink(console, errors) as sink:
        for event in ScriptedModel(["a\x1b[2J", "b\n"], thinking="t").stream("x"):
            sink.feed(event)
    assert CSI.sub("", written(console)) == "thinking:\nt\n\nanswer:\na␛[2Jb\n"
    assert written(errors) == "" and capsys.readouterr().out == ""


def test_the_summary_names_its_figures() -> None:
    assert summary(Done(finish_reason="length", stats=STATS)) == (
        "prompt 5 tokens at 50.0/s, wrote 7 at 17.5/s, 4.00 steps/canvas, 1.75 tokens/forward, first draft 0.200 s, "
        "peak 3.0 MiB, cut at the token budget"
    )


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.00123, "0.00123"), (12.345, "12.3"), (12345.6, "12,300")])
def test_significant(value: float, text: str) -> None:
    assert significant(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (3 << 19, "1.5 MiB"), (99 << 20, "99 MiB"), (3 << 29, "1.5 GiB")]
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


def test_sinks_take_every_event() -> None:
    console = terminal()
    view = view_of(["a"])
    with LiveSink(console, terminal(), view) as sink:
        sink.feed(Prefill(done=0, total=9))
        sink.feed(draft(np.asarray([1, EOS], np.int32), 2))
        sink.feed(Commit(canvas=0, tokens=(1,), text="a", thinking=""))
        sink.feed(Done(finish_reason="stop", stats=STATS))
    assert sink.answer == "a"


def test_progress_appears_only_if_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal()
    monkeypatch.setattr("dgemma.cli.output.PATIENCE", 1000.0)
    with Wait(console, "loading") as wait:
        wait.update(1, 2)
    assert written(console) == ""
    monkeypatch.setattr("dgemma.cli.output.PATIENCE", 0.0)
    with Wait(console, "loading \x1b[31m") as wait:
        wait.update(1, 2, "1 of 2")
        deadline = time.monotonic() + 60
        while "1 of 2" not in written(console) and time.monotonic() < deadline:
            time.sleep(0.01)
    said = written(console)
    assert "loading ␛[31m" in CSI.sub("", said) and "1 of 2" in said
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h") == 1
