"""GGUF files that are damaged, hostile or of another model: one line each, before the work, in little memory."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma
from dgemma.checkpoints import gguf
from dgemma.core.errors import DgemmaError
from gguf_files import SIZES, TOKENS, gguf_file
from said import check_line, says
from test_cli import run

Table = dict[str, tuple[np.ndarray, str]]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path, _ = gguf_file(tmp_path_factory.mktemp("sound"))
    return path.read_bytes()


def refused(path: Path, data: bytes, *words: str) -> None:
    """Expect one line, and no more memory than the file has."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with says(*words):
            gguf.GgufFile.open(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def at(data: bytes, where: int, code: str, value: Any) -> bytes:
    return data[:where] + struct.pack(code, value) + data[where + struct.calcsize(code) :]


def behind(data: bytes, name: bytes) -> int:
    """Where a name ends."""
    return data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


def test_a_file_that_ends_anywhere_is_said_to(tmp_path: Path, sound: bytes) -> None:
    header = gguf.GgufFile.open(write(tmp_path, sound)).header
    for size in [*range(0, 60), *range(60, header, 997), header, len(sound) - 1]:
        path = write(tmp_path, sound[:size])
        with pytest.raises(DgemmaError) as caught:
            dgemma.convert(path, tmp_path / "out")
        check_line(caught.value, "x.gguf")
    assert not (tmp_path / "out.partial").exists()


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return path


def test_counts_and_lengths_are_not_believed(tmp_path: Path, sound: bytes) -> None:
    path, huge = tmp_path / "x.gguf", (1 << 64) - 1
    tokens, tensor = behind(sound, b"tokenizer.ggml.tokens"), behind(sound, b"token_embd.weight")
    scores = behind(sound, b"tokenizer.ggml.scores")
    refused(path, b"", "not a GGUF file")
    refused(path, b"PK\3\4" + sound[4:], "not a GGUF file")
    refused(path, at(sound, 4, "<I", 1), "version 1")
    refused(path, at(sound, 4, ">I", 3), "big-endian")
    for count in (huge, 1 << 40, 1 << 20):
        refused(path, at(sound, 8, "<Q", count), "tensors")
        refused(path, at(sound, 16, "<Q", count), "settings")
        refused(path, at(sound, 24, "<Q", count), "name of a setting")  # the length of the first key
        refused(path, at(sound, tokens + 8, "<Q", count), "tokenizer.ggml.tokens")
        refused(path, at(sound, tokens + 16, "<Q", count), "tokenizer.ggml.tokens")
        refused(path, at(sound, scores + 8, "<Q", count), "tokenizer.ggml.scores")
        refused(path, at(sound, tensor + 4, "<Q", min(count, 1 << 59) << 4), "the tensor")
        refused(path, at(sound, tensor + 24, "<Q", count), "the tensor")
    refused(path, at(sound, tokens, "<I", 99), "unknown type 99")
    refused(path, at(sound, tokens + 4, "<I", 9), "array of type 9")
    refused(path, at(sound, tensor, "<I", 5), "5 dimensions")
    refused(path, at(sound, tensor, "<I", 0), "0 dimensions")
    refused(path, at(sound, tensor + 4, "<Q", 0), "dimensions")
    refused(path, at(sound, tensor + 4, "<Q", 63), "blocks of 32")
    refused(path, at(sound, tensor + 20, "<I", 4), "type 4", "pip install -U gguf")  # Q4_2, which is no more
    refused(path, at(sound, tensor + 24, "<Q", 7), "offset 7")
    other = behind(sound, b"output_norm.weight")
    offset = struct.unpack_from("<Q", sound, other + 16)[0]
    refused(path, at(sound, tensor + 24, "<Q", offset), "overlaps")
    twice = sound.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight")
    refused(path, twice, "blk.0.attn_q.weight", "twice")
    refused(path, sound.replace(b"diffusion.eb_t_min", b"diffusion.eb_t_max"), "diffusion.eb_t_max", "twice")
    refused(path, sound.replace(b"output_norm.weight", b"output_norm.\xff\xfeight"), "UTF-8")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_damage_is_one_line_or_another_sound_header(
    tmp_path_factory: pytest.TempPathFactory, sound: bytes, data: st.DataObject
) -> None:
    where = data.draw(st.integers(0, 24_000))
    value = data.draw(st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x01", b"\xff\xff\xff\x7f", b"\x80"]))
    path = tmp_path_factory.mktemp("damage") / "x.gguf"
    path.write_bytes(sound[:where] + value + sound[where + len(value) :])
    try:
        dgemma.convert(path, path.parent / "out", requantize=True)
    except DgemmaError as error:
        check_line(error)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_K", "F32", "BF16"])
def test_scales_and_values_that_are_no_numbers_are_found(tmp_path: Path, kind: str, bad: float) -> None:
    def spoil(table: Table) -> None:
        stored, _ = table["blk.1.ffn_up.weight"]
        if kind == "F32":
            stored[3, 1] = bad
        elif kind == "BF16":
            stored[3, :2] = [0x80, 0x7F]
        else:
            stored[3, :2] = np.array([bad], np.float16).view(np.uint8)

    path, _ = gguf_file(
        tmp_path, kind, tensors=spoil, **({"hidden_size": 256} if kind == "Q4_K" else {}), **fitting(kind)
    )
    with says("NaN or infinity"):
        dgemma.convert(path, tmp_path / "out", requantize=True)


def fitting(kind: str) -> dict[str, Any]:
    return (
        dict(intermediate_size=256, moe_intermediate_size=256, head_dim=64, global_head_dim=64)
        if kind == "Q4_K"
        else {}
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.architecture": "llama"}, ("architecture 'llama'", "diffusion-gemma")),
        ({"general.architecture": "gemma3"}, ("architecture 'gemma3'",)),
        ({"general.architecture": "clip"}, ("image projector",)),
        ({"block_count": None}, ("diffusion-gemma.block_count", "missing")),
        ({"block_count": 4}, ("sliding_window_pattern", "4 layers")),
        ({"block_count": 2**31 - 1}, ("block_count",)),
        ({"embedding_length": 32}, ("misshapen",)),
        ({"embedding_length": "64"}, ("embedding_length", "expected one number")),
        ({"attention.head_count_kv": [2, 1, 1]}, ("head_count_kv",)),
        ({"attention.head_count_kv": [2, 2]}, ("head_count_kv",)),
        ({"attention.head_count_kv": [0, 0, 0]}, ("head_count_kv",)),
        ({"attention.value_length": 16}, ("value_length",)),
        ({"attention.shared_kv_layers": 2}, ("shared_kv_layers", "does not have")),
        ({"embedding_length_per_layer_input": 256}, ("per_layer_input",)),
        ({"attention.sliding_window_pattern": [True, True, True], "attention.head_count_kv": 2}, ("misshapen",)),
        ({"rope.scaling.type": "yarn"}, ("rope.scaling.type", "yarn")),
        ({"rope.dimension_count": 8}, ("rope.dimension_count",)),
        ({"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping",)),
        ({"nobody.knows": 3}, ("nobody.knows",)),
        ({"nobody.knows": [3]}, ("nobody.knows", "a list")),
        ({"expert_used_count": 9}, ("top_k_experts",)),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, ("rms_norm_eps",)),
        ({"diffusion.canvas_length": None}, ("diffusion.canvas_length",)),
        ({"diffusion.canvas_length": 0}, ("canvas_length",)),
        ({"tokenizer.ggml.eos_token_id": 1 << 20}, ("eos_token_id",)),
        ({"diffusion.eb_t_min": float("nan")}, ("its settings", "t_min")),
        ({"diffusion.eb_t_min": 9.0}, ("its settings", "t_min")),
        ({"diffusion.eb_max_steps": 0}, ("its settings", "max_denoising_steps")),
        ({"rope.freq_base": float("inf")}, ("its settings", "rope_theta")),
        ({"tokenizer.ggml.tokens": None}, ("its tokenizer is missing", "--tokenizer")),
        ({"tokenizer.ggml.tokens": list(TOKENS[:-1])}, ("token_type", "values")),
        ({"tokenizer.ggml.tokens": [*TOKENS, "more"]}, ("tokens, and the model",)),
        ({"tokenizer.ggml.merges": None}, ("no merges",)),
        ({"tokenizer.ggml.merges": ["i n", "x"]}, ("merge 1",)),
        ({"tokenizer.ggml.merges": ["i zz"]}, ("merge 0",)),
        ({"tokenizer.ggml.model": "bert"}, ("kind 'bert'",)),
    ],
)  # fmt: skip
def test_another_model_and_odd_settings_are_named(
    tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    path, _ = gguf_file(tmp_path, settings=change)
    with says(*words):
        dgemma.convert(path, tmp_path / "out")
    assert {one.name for one in tmp_path.iterdir()} == {"float", "model.gguf"}


def test_neutral_settings_are_no_obstacle(tmp_path: Path) -> None:
    neutral = {
        "expert_shared_count": 0, "nextn_predict_layers": 0, "rope.scaling.type": "none", "attention.scale": 1.0,
        "vocab_size": SIZES["vocab_size"], "general.author": "nobody \u2713", "attention.head_count": 4,
        "attention.sliding_window_pattern": 3, "tokenizer.chat_template": None,
    }  # fmt: skip
    path, _ = gguf_file(tmp_path, settings=neutral)
    dgemma.convert(path, tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("blk.0.attn_q.weight"), ("missing", "blk.0.attn_q.weight")),
        (lambda t: t.pop("self_cond_gate.weight"), ("missing", "self_cond_gate.weight")),
        (lambda t: t.pop("rope_freqs.weight"), ("rope_freqs.weight",)),
        (lambda t: t.pop("token_embd.weight"), ("token_embd.weight",)),
        (
            lambda t: t.update({"blk.2.attn_v.weight": t["blk.2.attn_k.weight"]}),
            ("does not have", "blk.2.attn_v.weight"),
        ),
        (lambda t: t.update({"blk.0.mystery": t["blk.0.attn_norm.weight"]}), ("does not have", "blk.0.mystery")),
        (lambda t: t.update({"blk.0.attn_q.weight": t["blk.0.attn_k.weight"]}), ("misshapen", "q_proj")),
        (lambda t: t.update({"blk.0.attn_q.weight": t["output_norm.weight"]}), ("misshapen", "q_proj")),
        (lambda t: t.update({"output_norm.weight": (np.ones(64, np.int32), "I32")}), ("I32", "cannot be read")),
        (lambda t: t.update({"output_norm.weight": (np.ones(64, np.float64), "F64")}), ("F64", "cannot be read")),
        (lambda t: t.update({"rope_freqs.weight": (np.full(16, 2, np.float32), "F32")}), ("rope_freqs.weight", "1e30")),
        (
            lambda t: t.update({"rope_freqs.weight": (np.ones(9, np.float32), "F32")}),
            ("rope_freqs.weight", "heads of 18"),
        ),
        (lambda t: t.update({"rope_freqs.weight": (np.ones((2, 8), np.float32), "F32")}), ("rope_freqs.weight",)),
        (
            lambda t: t.update({"blk.0.attn_q.weight": (np.zeros((64, 80), np.uint8), "Q8_1")}),
            ("Q8_1", "cannot be read"),
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[Table], Any], words: tuple[str, ...]
) -> None:
    path, _ = gguf_file(tmp_path, tensors=change)
    with says(*words):
        dgemma.convert(path, tmp_path / "out")
    assert {one.name for one in tmp_path.iterdir()} == {"float", "model.gguf"}


def test_a_plain_gemma_4_is_no_diffusion_model(tmp_path: Path) -> None:
    def without(table: Table) -> None:
        for name in [one for one in table if one.startswith("self_cond")]:
            del table[name]

    path, _ = gguf_file(tmp_path, settings={"general.architecture": "gemma4"}, tensors=without)
    with says("Gemma 4", "DiffusionGemma"):
        dgemma.convert(path, tmp_path / "out")


def test_a_folder_with_several_models_and_a_pipe(tmp_path: Path, sound: bytes) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(sound)
    with says("2 GGUF models", "give one of them"):
        dgemma.convert(tmp_path, tmp_path / "out")
    import os

    os.mkfifo(tmp_path / "c.gguf")
    with says("not a regular file"):
        dgemma.convert(tmp_path / "c.gguf", tmp_path / "out")


def test_on_the_command_line(tmp_path: Path) -> None:
    path, _ = gguf_file(tmp_path, "Q4_0")
    result = run("inspect", path)
    assert result.exit_code == 0 and "gguf checkpoint" in result.output and "symmetric4-g32" in result.output
    assert "`dgemma convert` makes a folder that does" in result.output
    result = run("convert", path, "--out", tmp_path / "out", "--verify")
    assert result.exit_code == 0 and "recipe keep, source layout gguf" in result.output, result.output
    result = run("inspect", tmp_path / "out")
    assert result.exit_code == 0 and "mlx checkpoint" in result.output and "symmetric4-g32" in result.output
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:5000])
    for args in (("convert", tmp_path / "cut.gguf", "--out", tmp_path / "b"), ("inspect", tmp_path / "cut.gguf")):
        result = run(*args)
        assert result.exit_code == 1 and result.output.startswith("dgemma: error: ") and "truncated" in result.output


@pytest.mark.parametrize(
    ("kind", "key", "value", "words"),
    [
        ("llama", "scores", [float("nan")] * len(TOKENS), "the score of token 0 is NaN"),
        ("llama", "tokens", [*TOKENS[:-1], TOKENS[7]], "token 7, "),
        ("gemma4", "tokens", [*TOKENS[:-1], TOKENS[7]], "stands twice"),
        ("llama", "tokens", [*TOKENS[:-1], "x" * 1_000_000], "has 1,000,000 bytes, expected at most 4,096"),
        ("gemma4", "chat_template", "x" * 1_100_000, "its chat template has 1,100,000 bytes, expected at most"),
    ],
)
def test_tokenizers_that_would_answer_otherwise_or_take_for_ever(
    tmp_path: Path, kind: str, key: str, value: Any, words: str
) -> None:
    name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
    path, _ = gguf_file(tmp_path, tokenizer=kind, settings={name: value})
    with says(words, "--tokenizer DIR"):
        dgemma.convert(path, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
