"""Pictures of recordings: the same each time, whole without style sheets, and nothing in them but what was drawn."""

from __future__ import annotations

import builtins
import io
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.cells import cell_len

import dgemma
from dgemma.cli import main
from dgemma.core.events import Draft
from dgemma.show import gif, svg
from dgemma.show.picture import FIRST, LAST, MOST, PACE, Shot, characters, shots
from recordings import Told, recorded, scripted, spelled
from said import says

ROOT = Path(__file__).parents[1]
SPACE = "{http://www.w3.org/2000/svg}"
HOSTILE = "</script><b>&amp;]]>\n\x1b[31m\x00\ufffe\ud800 世界 🙂 שלום \u202e e\u0301 <!--"


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], prog_name="dgemma")


def seen(element: ElementTree.Element) -> str:
    return "".join(element.itertext()).replace("\u00a0", " ")


def test_readmes_picture_is_made_of_its_recording() -> None:
    recording = dgemma.replay(ROOT / "docs" / "canvas.jsonl")
    drawn = svg.draw(shots(recording, columns=76), columns=76, title=recording.turns[0].asked.title)
    assert drawn == (ROOT / "docs" / "canvas.svg").read_text(encoding="utf-8"), "run `make picture`"
    assert len(drawn) < 20_000
    assert "docs/canvas.svg" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_stands_still_where_styles_are_not_read() -> None:
    """Image proxies and converters to PNG run no animation, and some read no style sheet."""
    root = ElementTree.parse(ROOT / "docs" / "canvas.svg").getroot()
    groups = [group for group in root.iter(f"{SPACE}g") if group.get("transform") is None]
    still = "".join(seen(group) for group in groups if group.get("opacity") is None)
    assert "$ dgemma fill" in still and "354621" in still and "tokens in 6 passes" in still
    assert "settled" not in still and any("settled" in seen(group) and "held" in seen(group) for group in groups)
    assert all(text.get("fill") and text.get("class") is None for text in root.iter(f"{SPACE}text"))
    style = root.find(f"{SPACE}style")
    assert style is not None and style.text is not None
    assert style.text.strip().startswith("@media (prefers-reduced-motion: no-preference) {")


def test_every_moment_shows_its_frame(tmp_path: Path) -> None:
    """What is visible between two moments of the animation is what the frame has."""
    told = scripted(["one ", "two ", "three\n", "four"], canvas=2, title="$ x")
    found = shots(recorded(told, tmp_path / "r.jsonl"))
    root = ElementTree.fromstring(svg.draw(found, columns=72, title="t"))
    for i, shot in enumerate(found):
        visible = ""
        for group in root.iter(f"{SPACE}g"):
            begin, end = map(int, (group.get("id") or f"f0-{len(found)}")[1:].split("-"))
            if group.get("transform") is None and begin <= i < end:
                visible += seen(group)
        wanted = "".join(
            text for row in shot.rows for one in row for _, _, text in characters(one) if text[0] not in "░▁▂▃▄▅▆▇█∎"
        )
        assert sorted(visible.replace(" ", "")) == sorted(wanted.replace(" ", "")), i


def test_pace(tmp_path: Path) -> None:
    recording = recorded(scripted(["a", "b", "c"]), tmp_path / "r.jsonl")  # four passes, and the text
    assert [shot.seconds for shot in shots(recording)] == [PACE * FIRST, PACE, PACE, PACE, PACE * LAST]
    assert [shot.seconds for shot in shots(recording, pace=0.1)][1:4] == [0.1] * 3
    (turn,) = recording.turns
    turn.times[:] = [0, 1, 2, 3, 5, 6, 6.5, 7]
    assert [shot.seconds for shot in shots(recording, speed=2)] == [0.5, 1.0, 0.5, 0.5, PACE * LAST]


def test_long_recordings_are_thinned_out(tmp_path: Path) -> None:
    tokens = np.ones(1, np.int32)
    draft = Draft(
        canvas=0, step=0, steps=900, tokens=tokens, accepted=tokens > 1, entropy=np.ones(1, np.float32)
    )  # fmt: skip
    told = scripted(["a"])
    told.events[:] = [told.events[0], *[draft] * 900, *told.events[-2:]]
    found = shots(recorded(told, tmp_path / "r.jsonl"), pace=0.1)
    assert len(found) == MOST and sum(shot.seconds for shot in found) == pytest.approx(
        90.7
    )  # the first is shown twice as long, the text six times
    assert "tokens in" in "".join(one.text for row in found[-1].rows for one in row)


def test_held_tokens_are_drawn_apart(tmp_path: Path) -> None:
    found = shots(recorded(spelled("given, written", held=6), tmp_path / "r.jsonl"))
    looks = {one.text: one.look for row in found[1].rows for one in row}
    held, settled = looks["given,"], looks[" "]
    assert held.ground is not None and settled.ground is None and held.ink != settled.ink
    assert "held" in looks


@settings(max_examples=25)
@given(text=st.text(min_size=1, max_size=60) | st.just(HOSTILE))
def test_hostile_text_is_drawn_and_no_more(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    text = text.encode(errors="replace").decode()  # a tokenizer gives no halves of characters
    if not text.strip("\x00"):
        return
    found = shots(recorded(spelled(text), tmp_path_factory.mktemp("h") / "r.jsonl"), columns=40)
    assert all(sum(one.cells for one in row) <= 40 for shot in found for row in shot.rows)
    for shot in found:
        for one in (one for row in shot.rows for one in row):
            assert "".join(part for _, _, part in characters(one)) == one.text
            assert sum(cells for _, cells, _ in characters(one)) == one.cells == cell_len(one.text)
    root = ElementTree.fromstring(svg.draw(found, columns=40, title=text).encode())
    kinds = {element.tag.removeprefix(SPACE) for element in root.iter()}
    assert kinds <= {"svg", "title", "style", "defs", "pattern", "path", "rect", "g", "text"}
    with Image.open(io.BytesIO(gif.draw(found, columns=40))) as image:
        assert getattr(image, "n_frames", 1) == len({shot.rows for shot in found})


def test_gif(tmp_path: Path) -> None:
    recording = recorded(scripted(["one ", "two\n", "three"], title="$ x"), tmp_path / "r.jsonl")
    found = shots(recording)
    data = gif.draw(found, columns=72)
    assert data == gif.draw(found, columns=72) and data.startswith(b"GIF89a") and len(data) < 40_000
    with Image.open(io.BytesIO(data)) as image:
        assert image.size[0] == 72 * gif.WIDTH + 2 * gif.MARGIN and image.info["loop"] == 0
        lasts = []
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            lasts.append(image.info["duration"])
    assert lasts == [round(1000 * shot.seconds) for shot in found]
    with says("test_pictures.py", "not a font"):
        gif.draw(found, columns=72, font=Path(__file__))


def test_a_gif_without_pillow_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "PIL":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with says("Pillow", "dgemma[gif]"):
        gif.draw([Shot((), 1.0)], columns=72)


def test_files_are_written_and_not_over(tmp_path: Path) -> None:
    recorded(scripted(["one ", "two"], title="$ x"), record := tmp_path / "r.jsonl")
    outs = [f"--{kind}={tmp_path / f'o.{kind}'}" for kind in ("svg", "gif", "html")]
    result = run("replay", record, *outs)
    assert result.exit_code == 0 and result.stdout == "" and result.stderr.count("\n") == 3
    first = {kind: (tmp_path / f"o.{kind}").read_bytes() for kind in ("svg", "gif", "html")}
    assert b"$ x" in first["html"]
    for out in outs:
        refused = run("replay", record, out)
        assert refused.exit_code == 1 and "is there already" in refused.stderr and refused.stderr.count("\n") == 1
    assert run("replay", record, *outs, "--force", "-q").stderr == ""
    assert first == {kind: (tmp_path / f"o.{kind}").read_bytes() for kind in first}, "not the same again"
    named = run("replay", record, outs[2], "--force", "--title", "<b>mine</b>", "-q")
    assert named.exit_code == 0 and "&lt;b&gt;mine&lt;/b&gt;" in (tmp_path / "o.html").read_text()
    assert "the recording itself" in run("replay", record, f"--svg={record}", "--force").stderr
    assert "no folder" in run("replay", record, f"--svg={tmp_path / 'none' / 'x.svg'}").stderr
    assert run("replay", record, outs[0], "--step").exit_code == 2


def test_a_recording_without_a_pass(tmp_path: Path) -> None:
    told = scripted(["a"])
    recorded(Told(told.events[:2], told.asked), tmp_path / "r.jsonl")
    result = run("replay", tmp_path / "r.jsonl", f"--gif={tmp_path / 'o.gif'}")
    assert result.exit_code == 1 and "not one pass" in result.stderr and not (tmp_path / "o.gif").exists()
    recorded(Told([*told.events[:2], *told.events[-2:]], told.asked), tmp_path / "held.jsonl")  # every token was given
    result = run("replay", tmp_path / "held.jsonl", f"--svg={tmp_path / 'o.svg'}", f"--html={tmp_path / 'o.html'}")
    assert result.exit_code == 0, result.output
