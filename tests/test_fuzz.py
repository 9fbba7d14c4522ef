"""Whatever comes in from outside, the outcome is success or one line: no trace, no hang, no great allocation."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors as library
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from dgemma.core import safetensors, weights
from dgemma.core.checkpoint import Checkpoint, resolve
from dgemma.core.config import GenerationConfig, ModelConfig, SamplerConfig, read_json
from dgemma.core.errors import DgemmaError
from dgemma.core.tokens import Tokenizer
from said import check_line

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

# A hang must fail, a slow machine must not: an example takes milliseconds.
many = settings(max_examples=120, deadline=timedelta(seconds=10))
some = settings(max_examples=40, deadline=timedelta(seconds=10))

TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # lone surrogates and line separators included
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 10**400, -(2**63)]),
    st.floats(),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT)
JSON = st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)), max_leaves=8
)


def attempt(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or None where it raised the one error in the one form that is allowed."""
    try:
        return call()
    except DgemmaError as error:
        check_line(error)
        return None


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


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key of a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from places(value[key])


@st.composite
def mutated(draw: st.DrawFn, originals: list[Any], junk: st.SearchStrategy[Any] = JSON) -> Any:
    """A JSON value with some places changed, removed, doubled or added."""
    value = copy.deepcopy(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 3))):
        if not (found := list(places(value))):
            break
        holder, key = draw(st.sampled_from(found))
        match draw(st.sampled_from(["replace", "replace", "delete", "add", "swap"])):
            case "replace":
                holder[key] = copy.deepcopy(draw(junk))
            case "delete":
                del holder[key]
            case "add" if isinstance(holder, dict):
                holder[draw(TEXT)] = copy.deepcopy(draw(junk))
            case "add":
                holder.insert(0, copy.deepcopy(draw(junk)))
            case "swap":
                other, name = draw(st.sampled_from(found))
                if name in other if isinstance(other, dict) else name < len(other):
                    holder[key] = copy.deepcopy(other[name])
    return value


@st.composite
def damaged(draw: st.DrawFn, original: bytes) -> bytes:
    """Bytes with some flipped, cut, doubled or overwritten."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "cut", "insert", "write", "length"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + draw(st.sampled_from([1, 8, 1 << 20]))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=9))
            case "write":
                new = draw(st.binary(min_size=1, max_size=8))
                data[at : at + len(new)] = new
            case "length":
                lengths = [0, 1, 2**31, 2**63, 2**64 - 1, 10**8, 10**8 + 1, len(data), len(data) - 8]
                data[:8] = (draw(st.sampled_from(lengths)) % 2**64).to_bytes(8, "little")
    return bytes(data)


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


# ---- Prompts and options --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import dgemma

    folder = tiny.tiny_checkpoint(tmp_path_factory.mktemp("prompts"), canvas_length=8, max_position_embeddings=64)
    return dgemma.load(str(folder), backend="torch", device="cpu")


IDS = st.one_of(st.integers(-2, tiny.VOCAB + 2), st.sampled_from([2**31, 2**63, 2**64, 10**30, -(2**63) - 1]))
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": TEXT}),
        st.dictionaries(st.sampled_from(["role", "content", "x"]), JSON),
    ),
    max_size=3,
)
PROMPTS = st.one_of(
    TEXT,
    st.text(max_size=200),
    st.lists(st.sampled_from(tiny.SPECIAL), max_size=6).map("".join),
    st.lists(IDS, max_size=80),
    st.lists(IDS, max_size=4).map(tuple),
    MESSAGES,
    JSON,
    st.binary(max_size=4),
    st.lists(st.one_of(LEAVES, st.lists(IDS, max_size=2)), max_size=3),
    st.sampled_from(
        [np.arange(3), np.zeros((2, 2), int), np.array([1.5]), np.array([], int), {1, 2}, iter([1]), object()]
    ),
)
PLAIN = {
    "max_new_tokens": st.integers(1, 40), "seed": st.integers(0, 2**64 - 1), "steps": st.integers(1, 3),
    "schedule_steps": st.integers(1, 50), "entropy_bound": st.floats(0, 10), "t_min": st.floats(0, 0.5),
    "t_max": st.floats(0.5, 2), "confidence": st.floats(0, 1), "stability": st.integers(0, 3),
    "stop": st.one_of(st.text(min_size=1, max_size=2), st.lists(st.text(min_size=1, max_size=2), max_size=2)),
    "eos": st.lists(st.integers(0, tiny.VOCAB - 1), max_size=3), "thinking": st.booleans(), "raw": st.booleans(),
}  # fmt: skip


def check_generation(made: Any, options: dict[str, Any]) -> None:
    assert len(made.token_ids) <= options.get("max_new_tokens", 256) and made.finish_reason in ("stop", "length")
    assert all(0 <= token < tiny.VOCAB for token in made.token_ids)
    ends = options.get("eos", ())
    assert not set(made.token_ids) & set([ends] if isinstance(ends, int) else ends or ())
    stops = options.get("stop", ())
    assert not any(stop in made.text for stop in ([stops] if isinstance(stops, str) else stops))


@settings(some, max_examples=40)
@given(prompt=PROMPTS, options=st.fixed_dictionaries({}, optional=PLAIN))
def test_prompts(model: Any, prompt: Any, options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 12, "steps": 2} | options
    made = attempt(lambda: model.generate(prompt, **options))
    if made is not None:
        check_generation(made, options)


STRANGE = st.one_of(JSON, IDS, st.lists(IDS, max_size=2), st.binary(), st.just(object()), st.just(np.int64(3)))


@many
@given(options=st.dictionaries(st.sampled_from(sorted(PLAIN)), STRANGE, min_size=1, max_size=3))
def test_options(model: Any, options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 8, "steps": 1} | options
    if type(options["steps"]) is int:
        options["steps"] = min(options["steps"], 3)  # more are right, and slow
    made = attempt(lambda: model.generate([5, 6, 7], **options))
    if made is not None:
        check_generation(made, options)


@settings(some, max_examples=40)
@given(prompt=PROMPTS, canvas=PROMPTS, previous=st.sampled_from(["none", "right", "wrong", "junk"]))
def test_logits(model: Any, prompt: Any, canvas: Any, previous: str) -> None:
    length = len(canvas) if isinstance(canvas, list | tuple) else 3
    given_logits = {
        "none": None, "right": np.zeros((length, tiny.VOCAB), np.float32), "wrong": np.zeros((length, 7)), "junk": "x",
    }[previous]  # fmt: skip
    made = attempt(lambda: model.logits(prompt, canvas, given_logits))
    assert made is None or (made.ndim == 2 and made.shape[1] == tiny.VOCAB and made.dtype == np.float32)


NAMES = [
    "auto",
    "torch",
    "numpy",
    "cpu",
    "cpu:",
    "cpu:1",
    "cuda:",
    "cuda:\u00b2",
    "cuda:-1",
    "gpu",
    "float64",
    "float16",
]
WAYS = st.one_of(st.sampled_from(NAMES), TEXT, LEAVES)


@some
@given(options=st.dictionaries(st.sampled_from(["backend", "device", "dtype"]), WAYS, min_size=1))
def test_ways_to_load(sharded: Path, options: dict[str, Any]) -> None:
    import dgemma

    attempt(lambda: dgemma.load(str(sharded), **options))
