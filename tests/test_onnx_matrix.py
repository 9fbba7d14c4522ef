"""Exported graphs of nano in other versions of ONNX Runtime, installed into folders, against the torch backend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma.core import model as definition
from dgemma.core import sampler
from onnx_primitives import draws_of

VERSIONS = ("1.24.1", "1.28.0", "1.30.0", "newest")
TOO_OLD = "1.20.1"  # without the operators of opset 23
BOARD = "3..2..\n2..5..\n5.216.\n..1.5.\n...63.\n.6.425"
HEAT, BOUND = 1.2, 0.1

ASKED = """
import sys; sys.path.insert(0, sys.argv[1])
import json; from pathlib import Path; import numpy as np; import onnxruntime as ort
options = ort.SessionOptions(); options.intra_op_num_threads = 1; options.log_severity_level = 3
worst = {"version": ort.__version__}
for folder in map(Path, sys.argv[2:]):
    for name in ("encode", "denoise"):
        session = ort.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
        stored = dict(np.load(folder / f"{name}.npz"))
        feeds = {one.name: stored[one.name] for one in session.get_inputs()}
        names = [key.removeprefix("want ") for key in stored if key.startswith("want ")]
        for out, made in zip(names, session.run(names, feeds)):
            want = stored["want " + out]
            if out == "entropy":
                key, error = "entropy", float(np.abs(made - want).max())
            elif made.dtype == np.float32:
                key, error = "nmse", float(np.square(made - want).sum() / np.square(want).sum())
            else:
                key, error = "tokens", float((made != want).mean())
            worst[key] = max(worst.get(key, 0.0), error)
print(json.dumps(worst))
"""

LOADED = """
import sys; sys.path.insert(0, sys.argv[1])
import dgemma
try:
    dgemma.load("nano", backend="onnx")
except dgemma.DgemmaError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders with inputs for their graphs, and what torch makes of them, which the other runtimes cannot ask."""
    root = tmp_path_factory.mktemp("nano")
    folders = [root / "float", root / "4bit", root / "8bit-cpu"]
    dgemma.export("nano", folders[0], standalone=True)
    for folder in folders[1:]:
        dgemma.convert("nano", folder, recipe=folder.name[:4], workers=1)
        dgemma.export(folder, cpu=folder.name.endswith("cpu"))
    for folder in folders:
        _ask_torch(folder)
    return folders


def _ask_torch(folder: Path) -> None:
    loaded = dgemma.load(folder, backend="torch", device="cpu", dtype="float32")
    ops, model, config = loaded.engine.passes.ops, loaded.engine.passes.model, loaded.config
    draw, length = np.random.default_rng(0), config.canvas_length
    ids = np.asarray([loaded.tokenizer.render([{"role": "user", "content": BOARD}])])
    size = ids.shape[1]
    feeds: dict[str, Any] = {"input_ids": ids, "position_ids": np.arange(size)[None]}
    cache = definition.new_cache(ops, config, slots=1, capacity=size + length, scratch=max(size, length))
    cache = definition.encode(ops, model, cache, ops.asarray(ids, "int32"))
    past, want = {}, {}
    for i, (layer, one) in enumerate(zip(config.layers, cache.layers, strict=True)):
        rows = size if layer.window is None else min(size, layer.window - 1)
        for part, array in zip(("key", "value"), one, strict=True):
            past[f"past_key_values.{i}.{part}"] = want[f"want present.{i}.{part}"] = ops.to_numpy(array)[:, :, :rows]
    np.savez(folder / "encode.npz", **feeds, **want, **{name: one[:, :, :0] for name, one in past.items()})
    canvas, noise = (draw.integers(16, 200, (1, length)) for _ in range(2))
    uniform = draw.random((1, length)).astype(np.float32)
    soft = (0.3 * draw.normal(size=(1, length, config.hidden_size))).astype(np.float32)
    state = sampler.start(ops, ops.asarray(canvas, "int32"), config.hidden_size)._replace(soft=ops.asarray(soft))
    held = np.where(draw.random((1, length)) < 0.2, draw.integers(16, 200, (1, length)), -1)
    given = draws_of(ops, np.float32([[HEAT]]), uniform, noise, BOUND, held)
    state = definition.step(ops, model, cache, state, given)
    want = {"argmax": state.argmax, "entropy": state.entropy, "accepted": state.accepted, "next_canvas": state.canvas,
            "next_soft_embedding": state.soft}  # fmt: skip
    np.savez(
        folder / "denoise.npz", **past, **{f"want {name}": ops.to_numpy(one) for name, one in want.items()},
        input_ids=canvas, position_ids=size + np.arange(length)[None], soft_embedding=soft, noise=noise,
        temperature=np.float32([[HEAT]]), uniform=uniform, entropy_bound=np.float32([BOUND]), held=held,
    )  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runtimes, side by side in folders; `pip` fetches them at once."""
    root = tmp_path_factory.mktemp("runtimes")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target"]
    runs = {}
    for version in (*VERSIONS, TOO_OLD):
        package = "onnxruntime" if version == "newest" else f"onnxruntime=={version}"
        runs[version] = subprocess.Popen([*pip, str(root / version), package], stderr=subprocess.PIPE, text=True)
    for version, run in runs.items():
        _, said = run.communicate()
        assert run.returncode == 0, f"onnxruntime {version} could not be installed from the package index: {said}"
    return {version: root / version for version in runs}


@pytest.mark.parametrize("version", VERSIONS)
def test_other_runtimes_agree(version: str, installed: dict[str, Path], questions: list[Path]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", ASKED, str(installed[version]), *map(str, questions)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    print(json.dumps(found))  # pytest -s shows it: the table of docs/onnx.md
    assert version in ("newest", found["version"])
    assert found["nmse"] <= 1e-10 and found["entropy"] <= 1e-4 and found["tokens"] == 0.0, found


def test_an_older_runtime_is_refused_by_what_it_lacks(installed: dict[str, Path]) -> None:
    run = subprocess.run([sys.executable, "-c", LOADED, str(installed[TOO_OLD])], capture_output=True, text=True)
    line = run.stdout.strip()
    assert f"onnxruntime {TOO_OLD} has no kernel for ai.onnx::Attention-23, " in line, run.stderr[-2000:]
    assert line.endswith("install 1.24 or newer") and len(line.splitlines()) == 1
