"""Draw README's picture: every pass of one real generation, as an SVG that plays by itself.

    python docs/make_canvas.py                     # nano solves a board → docs/canvas.svg
    python docs/make_canvas.py --model PATH --prompt TEXT --out FILE

What is drawn is what `dgemma generate` draws on a terminal, by the same code. Where motion is unwelcome
(prefers-reduced-motion), or style sheets are not read at all, the last frame stands still: looks are attributes of the
elements, and the style sheet holds nothing but the motion.
"""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path
from xml.sax.saxutils import escape

import click
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

import dgemma
from dgemma.show.frame import Pieces
from dgemma.show.terminal import FAINT, CanvasView

BOARD = "..4.2. .6...4 2..... .....5 5...1. .1.3.."
COLUMNS = 72
SECONDS = 0.45
"""How long one pass is shown; the first and the last stay longer."""
HOLD = 6
CHARACTER, LINE, MARGIN = 12.2, 24.4, 18  # as rich's SVG export measures them
THEME = TerminalTheme(
    (22, 27, 34), (201, 209, 217),
    [(72, 79, 88), (255, 123, 114), (86, 211, 100), (227, 179, 65), (88, 166, 255), (188, 140, 255), (57, 197, 207),
     (177, 186, 196)],
)  # fmt: skip
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def frames(model: dgemma.DiffusionGemma, prompt: str, seed: int) -> list[list[Text]]:
    """The lines of the terminal: one frame per pass, and a last one with the text alone."""
    console = Console(file=io.StringIO(), width=COLUMNS, height=40)
    ends = model.generation.eos_token_ids or model.config.eos_token_ids
    view = CanvasView(Pieces(model.tokenizer), ends, 256)
    head = [Text.assemble(("$ ", FAINT), f"dgemma generate {shlex.quote(prompt)}")]
    result, text = [], ""
    for event in model.stream(prompt, seed=seed):
        if isinstance(event, dgemma.Draft):
            view.update(event)
            result.append(head + view.lines(console, COLUMNS, 40))
        elif isinstance(event, dgemma.Commit):
            text += event.text
        elif isinstance(event, dgemma.Done):
            # No rates: they would be those of the machine that drew the picture.
            count = f"{event.stats.emitted_tokens} tokens in {event.stats.steps} passes"
            result.append([*head, *(Text(line) for line in text.splitlines()), Text(count, FAINT)])
    return result


def body(lines: list[Text], name: str) -> str:
    """One frame → SVG elements, by rich's own export, with its classes written out as attributes."""
    console = Console(file=io.StringIO(), width=COLUMNS, record=True, force_terminal=True, color_system="standard")
    for line in lines:
        console.print(line, soft_wrap=True)
    svg = console.export_svg(code_format="{styles}\x00{backgrounds}{matrix}", theme=THEME, unique_id=name)
    styles, elements = svg.split("\x00")
    looks = {
        kind: " ".join(f'{key}="{value}"' for key, value in re.findall(r"([\w-]+): ?([^;}]+?) ?(?:;|$)", rules))
        for kind, rules in re.findall(r"\.(\S+) \{ ?(.*?) ?\}", styles)
    }
    elements = re.sub(r'class="(.*?)"', lambda found: looks[found[1]], elements)
    return re.sub(r' clip-path="url\(.*?\)"', "", elements)


def animate(drawn: list[list[Text]], title: str) -> str:
    """Put frames over one another and show them in turn, by CSS alone; without it the last one is seen."""
    beats = [1.0] * len(drawn)
    beats[0], beats[-1] = 2.0, float(HOLD)
    total, start = sum(beats), 0.0
    width = COLUMNS * CHARACTER + 2 * MARGIN
    height = max(map(len, drawn)) * LINE + 2 * MARGIN
    rules = [f".frame {{ animation: {total * SECONDS:.2f}s step-end infinite }}"]
    groups = []
    for i, (lines, beat) in enumerate(zip(drawn, beats, strict=True)):
        last = i == len(drawn) - 1
        begin, end = 100 * start / total, 100 * (start + beat) / total
        before = "0% { opacity: 0 } " if start else ""
        after = "" if last else f"{end:.3f}% {{ opacity: 0 }}"
        rules.append(f"@keyframes k{i} {{ {before}{begin:.3f}% {{ opacity: 1 }} {after} }}")
        rules.append(f"#g{i} {{ animation-name: k{i} }}")
        hidden = "" if last else ' opacity="0"'
        groups.append(f'<g class="frame" id="g{i}"{hidden}>{body(lines, f"f{i}")}</g>')
        start += beat
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img">\n'
        f"<title>{escape(title)}</title>\n"
        "<style>\n@media (prefers-reduced-motion: no-preference) {\n" + "\n".join(rules) + "\n}\n</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="{THEME.background_color.hex}"/>\n'
        f'<g transform="translate({MARGIN}, {MARGIN})" font-family="{FONT}" font-size="20" xml:space="preserve">\n'
        + "\n".join(groups)
        + "\n</g>\n</svg>\n"
    )


@click.command()
@click.option("--model", default="nano", show_default=True)
@click.option("--backend", default="auto", show_default=True)
@click.option("--prompt", default=BOARD, help="Text to answer; by default a 6x6 Sudoku board.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).with_name("canvas.svg"))
def main(model: str, backend: str, prompt: str, seed: int, out: Path) -> None:
    """Generate once and draw every pass."""
    drawn = frames(dgemma.load(model, backend=backend), prompt, seed)
    out.write_text(animate(drawn, "A Sudoku board being denoised, pass by pass"))
    click.echo(f"{out}: {len(drawn)} frames, {out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
