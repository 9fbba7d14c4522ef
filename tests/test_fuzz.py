"""Whatever a file holds, the outcome is success or one line: no trace, no hang, no great allocation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors as library
from hypothesis import given
from hypothesis import strategies as st

import tiny
from dgemma.checkpoints import safetensors, weights
from dgemma.checkpoints.checkpoint import Checkpoint, resolve
from dgemma.checkpoints.files import read_json
from dgemma.core.config import GenerationConfig, ModelConfig, SamplerConfig
from dgemma.text.tokens import Tokenizer
from fuzzing import JSON, TEXT, attempt, damaged, many, mutated, some

DATA = Path(__file__).parent / "data"
CONFIGS = [
    json.loads((DATA / "config_26b.json").read_text()),
    {"model_type": "diffusion_gemma", "text_config": tiny.TEXT_CONFIG},
    {"model_type": "diffusion_gemma", "text_config": {
        **{key: value for key, value in tiny.TEXT_CONFIG.items() if "global" not in key},
        "per_layer_config": {"2": {"head_dim": 16, "num_key_value_heads": 1}},
    }},
]  # fmt: skip
GENERATION = json.loads((DATA / "generation_config_26b.json").read_text())


@pytest.fixture
def frugal() -> Iterator[None]:
    """Fail a test in which the process grows by more than 100 MB, where Linux can tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # lowers the high-water mark to what is held now
        before = high_water()
    except OSError:
        yield
        return
    yield
    assert high_water() - before < 100e6


def high_water() -> int:
    """Most bytes that this process has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# ---- Settings -------------------------------------------------------------------------------------------------


@many
@given(data=st.one_of(mutated(CONFIGS), JSON))
@pytest.mark.usefixtures("frugal")
def test_configs(data: Any) -> None:
    config = attempt(lambda: ModelConfig.from_hf(data))
    if config is not None:
        assert len(weights.shapes(config)) > 6
        assert all(len(layer.inverse_frequencies()) * 2 == layer.head_dim for layer in set(config.layers))


@many
@given(data=st.one_of(mutated([GENERATION]), JSON))
@pytest.mark.usefixtures("frugal")
def test_generation_configs(data: Any) -> None:
    made = attempt(lambda: GenerationConfig.from_hf(data))
    if made is not None:
        assert all(1e-3 <= made.sampler.temperature(i) < 1e4 for i in (0, 1, made.sampler.steps))


FIELDS = list(SamplerConfig.__dataclass_fields__)


@many
@given(options=st.dictionaries(st.sampled_from(FIELDS), st.one_of(JSON, st.binary(), st.complex_numbers())))
def test_sampler_options(options: dict[str, Any]) -> None:
    made = attempt(lambda: SamplerConfig(**options))
    if made is not None:
        assert all(1e-3 <= made.temperature(i) <= 100 for i in (0, 1, made.steps))


@many
@given(data=st.one_of(st.binary(max_size=40), damaged(json.dumps(CONFIGS[1]).encode())))
@pytest.mark.usefixtures("frugal")
def test_json_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_bytes(data)
    attempt(lambda: ModelConfig.from_hf(read_json(tmp_path / "config.json")))


@many
@given(name=st.one_of(TEXT, st.text("./\\~a-\0", max_size=12)))
def test_names_of_models(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: "/")
        attempt(lambda: resolve(name))


# ---- Weights --------------------------------------------------------------------------------------------------

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "U8", "shape": [], "data_offsets": [32, 33]},
}
NEAR = st.one_of(JSON, st.sampled_from([0, 1, 2, 24, 32, 33, "F32", "BF16", "I8", "F64", [0, 24], [24, 33], [], [33]]))


def framed(header: Any, data: bytes = bytes(range(33))) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def open_file(path: Path, content: bytes) -> None:
    """Open a file; where it is accepted, the format's own library must accept it, and see the same bytes."""
    path.write_bytes(content)
    file = attempt(lambda: safetensors.SafetensorsFile.open(path))
    if file is not None:
        theirs = dict(library.deserialize(content))
        assert theirs.keys() == file.entries.keys()
        for name, entry in file.entries.items():
            assert (entry.dtype, list(entry.shape)) == (theirs[name]["dtype"], theirs[name]["shape"])
            assert file.tensor(name).tobytes() == bytes(theirs[name]["data"])


@many
@given(content=damaged(framed(HEADER)))
@pytest.mark.usefixtures("frugal")
def test_damaged_weight_files(tmp_path: Path, content: bytes) -> None:
    open_file(tmp_path / "x.safetensors", content)


@many
@given(header=mutated([HEADER], NEAR))
@pytest.mark.usefixtures("frugal")
def test_weight_files_with_strange_headers(tmp_path: Path, header: Any) -> None:
    open_file(tmp_path / "x.safetensors", framed(header))


def test_the_unharmed_file_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(framed(HEADER))
    assert set(safetensors.SafetensorsFile.open(tmp_path / "x").entries) == {"a", "b", "c"}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shard(tiny.tiny_checkpoint(tmp_path_factory.mktemp("fuzz"), name="sharded"))


@st.composite
def indexes(draw: st.DrawFn) -> tuple[list[str], Any]:
    """Changes for an index: which entries, and to what."""
    names = draw(st.lists(st.sampled_from(["router", "norm", "scalar", "experts", "mlp"]), max_size=2))
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3, 4)]
    values = [*shards, "config.json", "../x", "model.safetensors", "/dev/zero", "/dev/zero/x.safetensors"]
    return names, draw(st.one_of(st.sampled_from(values), JSON))


@some
@given(change=indexes(), more=st.one_of(st.just({}), st.dictionaries(TEXT, JSON, max_size=2)), where=st.booleans())
@pytest.mark.usefixtures("frugal")
def test_indexes(sharded: Path, change: tuple[list[str], Any], more: dict[str, Any], where: bool) -> None:
    path = sharded / tiny.INDEX
    original = path.read_text()
    data = json.loads(original)
    (data if where else data["weight_map"]).update(more)
    for part in change[0]:
        data["weight_map"] |= {name: change[1] for name in data["weight_map"] if part in name}
    try:
        path.write_text(json.dumps(data))
        attempt(lambda: Checkpoint.open(sharded).check())
    finally:
        path.write_text(original)


QUANTIZATION = {
    "quantization": {"group_size": 64, "bits": 4, "mode": "affine", "model.decoder.embed_tokens": {"bits": 8}},
    "quantization_config": {"group_size": 32, "bits": 4, "mode": "mxfp4", "model.decoder.norm": False},
}


@some
@given(more=mutated([QUANTIZATION, {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}]))
def test_quantization_entries(sharded: Path, more: dict[str, Any]) -> None:
    path = sharded / "config.json"
    original = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(original) | more))
        attempt(lambda: Checkpoint.open(sharded).check())
    finally:
        path.write_text(original)


@some
@given(data=st.data(), name=st.sampled_from(["config.json", "generation_config.json", tiny.INDEX]))
def test_whole_folders(sharded: Path, data: st.DataObject, name: str) -> None:
    path = sharded / name
    original = path.read_bytes()
    try:
        path.write_bytes(data.draw(damaged(original)))
        attempt(lambda: Checkpoint.open(sharded).check())
    finally:
        path.write_bytes(original)


# ---- Tokenizer and template -----------------------------------------------------------------------------------


@some
@given(data=st.data(), name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]))
def test_tokenizer_files(sharded: Path, tmp_path: Path, data: st.DataObject, name: str) -> None:
    folder = tmp_path / "files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for one in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(sharded / one, folder / one)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(data.draw(st.one_of(damaged(content), st.binary(max_size=20))))
    tokenizer = attempt(lambda: Tokenizer(folder, vocab_size=tiny.VOCAB, bos_token_id=2))
    if tokenizer is not None:
        ids = attempt(lambda: tokenizer.render([{"role": "user", "content": "hi"}]))
        assert ids is None or all(0 <= i < tiny.VOCAB for i in ids)
