"""The page of examples/web, built as its README says and run in headless Chromium: the tokens are Python's.

It needs Node.js with npm (the machine's, or the one that pyright[nodejs] brings from PyPI), the npm registry, and a
Chromium: the machine's, or on x86-64 Linux one from npm, kept in the user's cache folder.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dgemma
from chromium import WEB, Chromium
from dgemma import DiffusionGemma
from dgemma.core.random import step_noise
from dgemma.core.row import Request
from dgemma.core.sampler import settings
from law import assert_close_f32

ROOT = Path(__file__).parents[1]

BOARDS = (
    ".3.1.2.........4",
    "3..2..2..5..5.216...1.5....63..6.425",
    ".5..3.2.3.......6.1......2.5....4..3",
)
UNSOLVED = ".1...5.3.......5....26.4421........."  # nano runs to the cap of passes on it
STATES = ("changing", "guess", "accepted", "settled")
FREE = -1
SUDOKU = SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "sudoku" / "boards.py")))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The built page, served on localhost from a folder below the root."""
    root = tmp_path_factory.mktemp("site")
    build = [sys.executable, str(WEB / "build.py"), "--out", str(root / "some where" / "nano")]
    run = subprocess.run(build, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/some%20where/nano/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def loaded(browser: str, site: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(browser, tmp_path_factory.mktemp("profile")) as chromium:
        reduced = {"name": "prefers-reduced-motion", "value": "reduce"}
        chromium.call("Emulation.setEmulatedMedia", features=[reduced])
        chromium.call("Page.navigate", url=f"{site}index.html")
        assert chromium.wait_for(f"{text('#status')}.match(/^(Ready|It failed).*/)?.[0]") == "Ready."
        yield chromium


@pytest.fixture
def page(loaded: Chromium, site: str) -> Iterator[Chromium]:
    """The page; every test holds it to no complaint, and to no request but to its own folder."""
    yield loaded
    assert loaded.said() == []
    asked = loaded.requests()
    assert len(asked) > 10 and [url for url in asked if not url.startswith(site)] == []


@pytest.fixture(scope="module")
def nano() -> DiffusionGemma:
    return dgemma.load("nano", backend="torch")


def text(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)})?.textContent"


def put(page: Chromium, selector: str, value: str) -> None:
    page.evaluate(f"""{{
        const field = document.querySelector({json.dumps(selector)});
        field.value = {json.dumps(value)};
        for (const kind of ["input", "change"]) field.dispatchEvent(new Event(kind, {{ bubbles: true }}));
    }}""")


def write(page: Chromium, board: str) -> None:
    """Write a board as a user without a mouse would: from the first cell on, dots for blanks."""
    put(page, "#example", "." * len(board))
    page.evaluate("document.querySelector('#board input').focus()")
    page.press(board)


def solve(page: Chromium, board: str, seed: int = 0, steps: int = 48) -> dict[str, Any]:
    write(page, board)
    put(page, "#seed", str(seed))
    put(page, "#steps", str(steps))
    page.press(["Enter"])
    status = page.wait_for(f"{text('#status')}.match(/^(Solved|Not solved|It failed).*/)?.[0]")
    numbers = {name: [int(one) for one in page.evaluate(text(f"#{name}")).split()] for name in ("prompt", "answer")}
    passes = int(page.evaluate(text("#count")).split(" of ")[1])
    return {**numbers, "status": status, "passes": passes}


def generate(page: Chromium, prompt: list[int], *, seed: int, **options: Any) -> tuple[list[dict[str, Any]], str]:
    """Run loop.js in the page, apart from what app.js makes of it → its events, and what it returns."""
    return page.evaluate(f"""(async () => {{
        globalThis.model ??= await (async () => {{
            const ort = await import("./ort/ort.wasm.bundle.min.mjs");
            const get = async (name) => new Uint8Array(await (await fetch("nano/" + name)).arrayBuffer());
            const about = JSON.parse(new TextDecoder().decode(await get("dgemma-onnx.json")));
            const externalData = [];
            for (const path of about.weights) externalData.push({{ path, data: await get(path) }});
            const open = async (name) => ort.InferenceSession.create(await get(about.graphs[name]), {{ externalData }});
            return {{ ort, about, encode: await open("encode"), denoise: await open("denoise") }};
        }})();
        const {{ generate }} = await import("./loop.js");
        const options = {{ maxNewTokens: 48, ...{json.dumps(options)}, seed: {seed}n }};
        const found = [], events = generate(model, {json.dumps(prompt)}, options);
        for (;;) {{
            const {{ value, done }} = await events.next();
            if (done) return [found, value];
            found.push(value);
        }}
    }})()""")


def rows(board: str) -> str:
    side = int(len(board) ** 0.5)
    return "\n".join(board[i : i + side] for i in range(0, len(board), side))


def known(nano: DiffusionGemma, board: str) -> list[int]:
    """What the page holds of an answer: the givens, the line breaks, the end of the turn."""
    (end,) = nano.tokenizer.encode("<turn|>")
    return [FREE if one == "." else nano.tokenizer.encode(one)[0] for one in rows(board)] + [end]


def written(
    nano: DiffusionGemma, board: str, held: list[int], *, seed: int = 0, budget: int | None = None, steps: int = 48,
    eos: list[int] | None = None,
) -> tuple[list[int], list[dgemma.Draft], Any]:  # fmt: skip
    """Python's answer with some positions held → its tokens, its drafts, and how it ended."""
    ends = nano.generation.eos_token_ids if eos is None else eos
    request = Request(
        prompt=tuple(nano.prompt_ids(rows(board))), max_new_tokens=budget or nano.config.canvas_length, seed=seed,
        sampler=settings(nano.generation.sampler, steps=steps), eos_token_ids=tuple(ends), held=tuple(held),
    )  # fmt: skip
    events = list(nano.engine.add(request).events())
    tokens = [token for event in events if isinstance(event, dgemma.Commit) for token in event.tokens]
    (done,) = [event for event in events if isinstance(event, dgemma.Done)]
    return tokens, [event for event in events if isinstance(event, dgemma.Draft)], done


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_random_numbers_are_pythons(page: Chromium, seed: int) -> None:
    places = [(0, 0), (3, 47), (2**20, 1)]
    asked = [{"canvas": canvas, "step": step, "length": 47, "vocabSize": 262_144} for canvas, step in places]
    got = page.evaluate(f"""import("./random.js").then(({{ stepNoise }}) => {json.dumps(asked)}.map((one) => {{
        const {{ uniforms, tokens }} = stepNoise({{ seed: {seed}n, ...one }});
        return [Array.from(uniforms), Array.from(tokens, Number)];
    }}))""")
    for (canvas, step), (uniforms, tokens) in zip(places, got, strict=True):
        want = step_noise(seed=seed, canvas=canvas, step=step, length=47, vocab_size=262_144)
        np.testing.assert_array_equal(np.asarray(uniforms, np.float32), want[0])
        np.testing.assert_array_equal(tokens, want[1])


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("board", BOARDS)
def test_a_board_is_solved_with_the_tokens_of_python(
    page: Chromium, nano: DiffusionGemma, board: str, seed: int
) -> None:
    want, drafts, _ = written(nano, board, known(nano, board), seed=seed)
    got = solve(page, board, seed)
    assert got["prompt"] == nano.prompt_ids(board)  # in one line: the template lays it out
    assert (got["answer"], got["passes"]) == (want, len(drafts))
    assert got["status"].startswith("Solved.")
    text = "".join("<fill:1>" if one == "." else one for one in rows(board))
    assert nano.fill(text, prompt=rows(board), seed=seed).text == nano.tokenizer.decode(want)


def test_givens_are_in_every_pass_and_shown_as_held(page: Chromium, nano: DiffusionGemma) -> None:
    board = BOARDS[2]
    got = solve(page, board)
    looks = """Array.from(document.querySelectorAll("#canvas .cell"), (cell) => [cell.textContent, cell.className])"""
    for number in range(1, got["passes"] + 1):
        put(page, "#pass", str(number))
        for given, (shown, look) in zip(board, page.evaluate(looks), strict=True):
            assert ("held" in look.split()) == (given != ".") and (given in (".", shown))
    held = np.asarray(known(nano, board))
    events, _ = generate(page, nano.prompt_ids(board), seed=0, held=held.tolist())
    for event in events[1:-1]:
        assert event["held"] == [*(held != FREE).tolist(), *[False] * (48 - len(held))]
        assert (np.asarray(event["tokens"])[: len(held)][held != FREE] == held[held != FREE]).all()
        assert not np.asarray(event["entropy"])[event["held"]].any() and all(
            np.asarray(event["accepted"])[event["held"]]
        )


def test_a_wrong_answer_is_called_wrong(page: Chromium, nano: DiffusionGemma) -> None:
    want, drafts, _ = written(nano, UNSOLVED, known(nano, UNSOLVED), steps=2)
    got = solve(page, UNSOLVED, steps=2)
    assert (got["answer"], got["passes"]) == (want, 2)
    looks = page.evaluate("Array.from(document.querySelectorAll('#canvas .cell'), (cell) => cell.className)")
    for place, look in zip([i for i in range(41) if i % 7 < 6], looks, strict=True):
        same = drafts[0].tokens[place] == drafts[1].tokens[place]
        state = "held" if drafts[1].held[place] else STATES[2 * drafts[1].accepted[place] + same]
        assert state in look.split()
    marked = page.evaluate("document.querySelectorAll('#canvas .wrong').length")
    assert marked and got["status"].startswith(f"Not solved: {marked} cell")


def test_text_is_read_and_written_as_in_python(page: Chromium, nano: DiffusionGemma) -> None:
    said = "".join(map(chr, range(0x180))) + "€🙂"
    ids, back = page.evaluate(f"""(async () => {{
        const {{ Tokenizer }} = await import("./tokenizer.js");
        const tokenizer = new Tokenizer(await (await fetch("nano/tokenizer.json")).json());
        const ids = tokenizer.encode({json.dumps(said)});
        return [ids, tokenizer.decode([2, ...ids, 5])];
    }})()""")
    assert ids == nano.tokenizer.encode(said) and back == said


def test_passes_are_pythons(page: Chromium, nano: DiffusionGemma) -> None:
    """On a board whose canvas never settles, where every random number and temperature shows."""
    events = nano.stream(rows(UNSOLVED), seed=1, steps=12)
    want = [event for event in events if isinstance(event, dgemma.Draft)]
    got, _ = generate(page, nano.prompt_ids(UNSOLVED), seed=1, steps=12)
    drafts = [event for event in got if event["kind"] == "draft"]
    assert len(drafts) == len(want) == 12
    for mine, other in zip(drafts, want, strict=True):
        assert mine["tokens"] == other.tokens.tolist() and mine["accepted"] == other.accepted.tolist()
        assert_close_f32(np.asarray(mine["entropy"]), other.entropy, f"entropy of pass {other.step}")


@pytest.mark.parametrize(("board", "budget", "eos"), [
    (BOARDS[1], 110, []),  # three canvases: the loop reads its own text back, past the window
    (BOARDS[0], 10, None), (BOARDS[0], 19, None), (BOARDS[0], 20, None),  # the answer has 19 tokens
    (BOARDS[0], 48, []),
])  # fmt: skip
def test_budgets_are_pythons(page: Chromium, nano: DiffusionGemma, board: str, budget: int, eos: list[int]) -> None:
    want = nano.generate(rows(board), max_new_tokens=budget, seed=3, steps=5, eos=eos)
    ends = {} if eos is None else {"eos": eos}
    events, reason = generate(page, nano.prompt_ids(board), maxNewTokens=budget, seed=3, steps=5, **ends)
    tokens = [token for event in events if event["kind"] == "commit" for token in event["tokens"]]
    passes = sum(event["kind"] == "draft" for event in events)
    assert (tokens, passes, reason) == (list(want.token_ids), want.stats.steps, want.finish_reason)
    assert want.stats.canvases == (3 if budget > 48 else 1)


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_held_tokens_are_pythons(page: Chromium, nano: DiffusionGemma, share: float) -> None:
    """Over three canvases, the second of which is all held and takes no pass; the stop test leaves them out."""
    draw = np.random.default_rng(3)
    held = np.where(draw.random(120) < share, draw.integers(16, 60, 120), FREE)
    held[48:96] = draw.integers(16, 60, 48)
    for seed in range(3):
        tokens, drafts, done = written(nano, BOARDS[1], held.tolist(), seed=seed, budget=120, steps=8, eos=[])
        prompt = nano.prompt_ids(BOARDS[1])
        got, reason = generate(page, prompt, seed=seed, maxNewTokens=120, steps=8, eos=[], held=held.tolist())
        assert [token for event in got if event["kind"] == "commit" for token in event["tokens"]] == tokens
        mine = [event for event in got if event["kind"] == "draft"]
        assert [event["tokens"] for event in mine] == [event.tokens.tolist() for event in drafts]
        assert (reason, {event["canvas"] for event in mine}) == (done.finish_reason, {0, 2})


def test_graphs_of_another_version_are_refused(page: Chromium, nano: DiffusionGemma) -> None:
    said = page.evaluate("""import("./loop.js").then(({ generate }) =>
        generate({ about: { version: 2 } }, [], {}).next().then(() => "", (error) => error.message))""")
    assert said == "dgemma-onnx.json is of version 2, this loop reads 3: export again"


def test_answers_are_checked(page: Chromium) -> None:
    board, solution = ".3.1.2.........4", "4321124334122134"
    assert SUDOKU.check(SUDOKU.parse(board), SUDOKU.parse(solution))
    broken = {
        solution: [],
        solution[:-1] + "3": [14, 15],  # a given, and twice in its row
        solution.translate(str.maketrans("1234", "2143")): [1, 3, 5, 15],  # a solved board, but of another puzzle
        solution[:3] + "x": [3],
        solution[:15]: [15],
    }
    call = "Array.from(sudoku.mistakes({}, {}, sudoku.SIZES[4])).sort((a, b) => a - b)"
    for answer, cells in broken.items():
        expression = call.format(json.dumps(board), json.dumps(answer))
        found = page.evaluate(f"import('./sudoku.js').then((sudoku) => {expression})")
        assert set(cells) <= set(found) and bool(cells) == bool(found), answer


def test_the_keyboard_moves_in_the_board(page: Chromium) -> None:
    write(page, BOARDS[1])
    assert page.evaluate("document.querySelectorAll('#board input[tabindex=\"0\"]').length") == 1
    page.evaluate("document.querySelector('#board input').focus()")
    page.press(["ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "1"])  # blank, in the row of nothing but 3 and 2
    cells = "Array.from(document.querySelectorAll('#board input'), (one) => one.value || '.').join('')"
    assert page.evaluate(cells) == BOARDS[1][:2] + "1" + BOARDS[1][3:]
    page.press(["ArrowLeft", "3"])  # there is one in the row
    assert page.evaluate("document.querySelectorAll('#board .conflict').length") == 2
    assert "twice" in page.evaluate(text("#advice"))
    page.press(["ArrowLeft", "Backspace"])
    assert page.evaluate("document.querySelectorAll('#board .conflict').length") == 0


def test_states_differ_by_more_than_colour(page: Chromium) -> None:
    looks = page.evaluate("""Array.from(document.querySelectorAll(".legend .cell"), (cell) => {
        const { fontStyle, fontWeight, textDecorationLine, backgroundImage } = getComputedStyle(cell);
        const { content } = getComputedStyle(cell, "::before");
        return [fontStyle, fontWeight, textDecorationLine, backgroundImage, content].join();
    })""")
    assert len(looks) == len(set(looks)) == 5


def test_motion_is_reduced_where_that_is_asked_for(page: Chromium) -> None:
    assert page.evaluate("document.querySelector('#pause').value") == "0"
    assert page.evaluate("getComputedStyle(document.querySelector('#canvas .cell')).transitionDuration") == "0s"


def test_the_browser_refuses_other_servers(browser: str, site: str, tmp_path: Path) -> None:
    """And what the other tests read would show a request to one."""
    ask = "fetch('http://127.0.0.1:9/').then(() => 'answered', () => 'refused')"
    with Chromium(browser, tmp_path) as chromium:
        for allowed in (False, True):
            chromium.call("Page.setBypassCSP", enabled=allowed)
            chromium.call("Page.navigate", url=f"{site}index.html?{allowed}")
            chromium.wait_for(f"location.search === '?{allowed}' && {text('h1')}")
            assert chromium.evaluate(ask) == "refused"
            assert ("http://127.0.0.1:9/" in chromium.requests()) is allowed
            assert any("Content Security Policy" in one for one in chromium.said()) is not allowed
            chromium.events.clear()
