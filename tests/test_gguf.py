"""GGUF files convert to what the gguf library says they mean, codes and scales to the bit where a format has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma.checkpoints import gguf, weights
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.checkpoints.loading import dense
from dgemma.checkpoints.quant import QTensor
from dgemma.convert.gguf_blocks import FORMATS
from dgemma.core.config import ModelConfig
from dgemma.text.tokens import Tokenizer
from dgemma.tools.inspect import inspect_folder
from gguf_files import MERGES, TOKENS, WIDE, gguf_file, is_matrix
from law import assert_close_f32
from published import MANIFEST, SHARD
from said import says
from test_layouts import logits
from tiny import edit_json

K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


@pytest.mark.parametrize("kind", FORMATS)
def test_plain_blocks_are_carried_to_the_bit(tmp_path: Path, kind: str) -> None:
    path, meant = gguf_file(tmp_path, kind)
    report = dgemma.convert(path, tmp_path / "out", verify=True)
    assert (report.recipe, report.layout) == ("keep", "gguf") and report.counts.keys() == {"carried", "stored"}
    share = sum(value.size for name, value in meant.items() if is_matrix(name)) / sum(map(np.size, meant.values()))
    assert report.quantized_share == pytest.approx(share) == pytest.approx(report.wanted_share)
    checkpoint = Checkpoint.open(tmp_path / "out")
    checkpoint.check()
    for name, want in meant.items():
        stored = checkpoint.tensor(name)
        assert isinstance(stored, QTensor) == is_matrix(name), name
        if isinstance(stored, QTensor):
            assert stored.format == FORMATS[kind] and stored.scales.dtype == (
                np.uint8 if kind == "MXFP4" else np.float16
            )
        np.testing.assert_array_equal(dense(stored, "float32").astype(np.float32), want, err_msg=name)
    config = ModelConfig.from_hf(json.loads((tmp_path / "float" / "config.json").read_text()))
    assert checkpoint.config == replace(config, eos_token_ids=checkpoint.config.eos_token_ids)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_its_logits_are_the_dequantized_models(tmp_path: Path, kind: str) -> None:
    path, meant = gguf_file(tmp_path, kind)
    dgemma.convert(path, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    want = logits(checkpoint.config, lambda name: meant[name], "numpy")
    for backend in ("numpy", "inference", "mlx"):
        assert_close_f32(logits(checkpoint.config, checkpoint.tensor, backend), want, backend)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_float16_scales_run_in_onnx_runtime(tmp_path: Path, kind: str) -> None:
    """Which fuses casts of float16 initializers, and fails at it where experts were inlined, unless told not to."""
    path, _ = gguf_file(tmp_path, kind)
    dgemma.convert(path, tmp_path / "out")
    prompt, canvas = list(range(20, 33)), list(range(40, 56))
    want = dgemma.load(tmp_path / "out", backend="numpy").logits(prompt, canvas)
    assert_close_f32(dgemma.load(tmp_path / "out", backend="onnx").logits(prompt, canvas), want)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_are_stored_as_they_are(tmp_path: Path, kind: str) -> None:
    path, meant = gguf_file(tmp_path, kind)
    report = dgemma.convert(path, tmp_path / "out", "bf16" if kind == "BF16" else None, rules=None)
    assert report.recipe == ("bf16" if kind == "BF16" else "4bit")
    (tmp_path / "rules.toml").write_text('"*" = "stored"\n')
    dgemma.convert(path, tmp_path / "as-is", rules=tmp_path / "rules.toml", verify=True)
    checkpoint = Checkpoint.open(tmp_path / "as-is")
    for name, want in meant.items():
        np.testing.assert_array_equal(np.asarray(checkpoint.tensor(name)).astype(np.float32), want, err_msg=name)


@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants_are_rounded_again_when_asked(tmp_path: Path, kind: str) -> None:
    path, meant = gguf_file(
        tmp_path, lambda name: kind if "layers.1.mlp" in name or "experts" in name else "Q8_0", **WIDE
    )
    with says("quantized already", kind, "--requantize"):
        dgemma.convert(path, tmp_path / "out")
    report = dgemma.convert(path, tmp_path / "out", requantize=True)
    assert report.counts["requantized"] == 7 and report.counts["carried"] > 0 and not report.fallbacks
    checkpoint = Checkpoint.open(tmp_path / "out")
    for name, want in meant.items():
        got = dense(checkpoint.tensor(name), "float32").astype(np.float32)
        assert np.linalg.norm(got - want) <= 0.008 * np.linalg.norm(want), name
    report = dgemma.convert(path, tmp_path / "bf16", "bf16", requantize=True, verify=True)
    assert report.worst[1] < 0.004


def test_a_mixture_keeps_what_it_can(tmp_path: Path) -> None:
    """As llama-quantize writes Q4_K_M: rows that 256 does not divide are of plainer types."""
    kinds: Callable[[str], str] = lambda name: (  # noqa: E731
        "Q5_0" if "down_proj" in name else "Q6_K" if "embed" in name else "Q4_K" if "self_attn" in name else "Q8_0"
    )
    path, meant = gguf_file(tmp_path, kinds, **WIDE)
    found = inspect_folder(path)
    assert {part.name: part.formats for part in found.parts} == {
        "embedding": ("q6_k",), "attention": ("q4_k",), "dense MLP": ("symmetric8-g32", "symmetric5-g32"),
        "self-conditioning": ("symmetric8-g32", "symmetric5-g32"), "experts": ("symmetric8-g32", "symmetric5-g32"),
        "router": ("f32",), "norms, scalars": ("f32",),
    }  # fmt: skip
    report = dgemma.convert(path, tmp_path / "out", requantize=True, verify=True)
    attention = sum("self_attn" in name and is_matrix(name) for name in meant)
    assert report.counts["requantized"] == attention + 1
    with says("quantized already"):
        dgemma.convert(path, tmp_path / "other", "4bit")


def test_a_split_file_and_experts_in_halves_are_the_same_model(tmp_path: Path) -> None:
    def halve(table: dict[str, tuple[np.ndarray, str]]) -> None:
        for layer in range(3):
            fused, kind = table.pop(f"blk.{layer}.ffn_gate_up_exps.weight")
            for half, part in zip(("gate", "up"), np.split(fused, 2, 1), strict=True):
                table[f"blk.{layer}.ffn_{half}_exps.weight"] = np.ascontiguousarray(part), kind

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, _ = gguf_file(tmp_path / "a", "Q4_0")
    split, _ = gguf_file(tmp_path / "b", "Q4_0", tensors=halve, split=17)
    assert len(list(split.parent.glob("*.gguf"))) > 3
    for path, out in ((whole, "one"), (split, "many")):
        dgemma.convert(path, tmp_path / out)
    assert (tmp_path / "one" / SHARD).read_bytes() == (tmp_path / "many" / SHARD).read_bytes()
    (split.parent / "mmproj-model.gguf").write_bytes(b"an image projector beside it")
    (split.parent / "config.json").write_text("{}")  # as some publish it beside their files
    assert dgemma.convert(split.parent, tmp_path / "many").fresh is False  # the folder means its first part
    second = split.with_name(split.name.replace("00001", "00002"))
    with says("part 2 of", "give the first"):
        dgemma.convert(second, tmp_path / "out")
    second.unlink()
    with says("no such file", "all", "parts"):
        dgemma.convert(split, tmp_path / "out")


def test_spellings_of_the_drafts_are_understood(tmp_path: Path) -> None:
    def respell(table: dict[str, tuple[np.ndarray, str]]) -> None:
        new = {"enc_layer_output_scale": "enc_layer_out_scale", "self_cond_pre_norm": "self_cond_norm"}
        for name in list(table):
            other = name
            for a, b in new.items():
                other = other.replace(a, b)
            table[other.removesuffix(".weight") if "layer_output_scale" in other else other] = table.pop(name)

    path, meant = gguf_file(tmp_path, tensors=respell)
    dgemma.convert(path, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert all(np.array_equal(dense(checkpoint.tensor(name), "float32"), want) for name, want in meant.items())


def test_a_head_that_is_the_embedding_is_left_out_and_another_refused(tmp_path: Path) -> None:
    path, _ = gguf_file(tmp_path, tensors=lambda table: table.update({"output.weight": table["token_embd.weight"]}))
    assert dgemma.convert(path, tmp_path / "out").dropped == 1

    def untie(table: dict[str, tuple[np.ndarray, str]]) -> None:
        stored, kind = table["token_embd.weight"]
        other = stored.copy()
        other[-1, -1] ^= 1
        table["output.weight"] = other, kind

    (tmp_path / "b").mkdir()
    path, _ = gguf_file(tmp_path / "b", tensors=untie)
    with says("output.weight", "tied"):
        dgemma.convert(path, tmp_path / "other")


# ---- What stands beside the weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gemma4", "llama"])
def test_the_tokenizer_is_rebuilt(tmp_path: Path, kind: str) -> None:
    path, _ = gguf_file(tmp_path, tokenizer=kind)
    dgemma.convert(path, tmp_path / "out")
    made = Tokenizer(tmp_path / "out", vocab_size=len(TOKENS), bos_token_id=2)
    for text, want in {
        "the thing": ["the", "▁th", "ing"], " the": ["▁the"], "in\n\n\n": ["in", "\n\n", "\n"],
        "é": ["<0xC3>", "<0xA9>"],
    }.items():  # fmt: skip
        ids = made.encode(text)
        assert [TOKENS[i] for i in ids] == want
        assert made.decode(ids) == text
    chat = made.render([{"role": "user", "content": "the"}])
    assert [TOKENS[i] for i in chat][:2] == ["<bos>", "<|turn>"] and made.decode(chat).startswith("user\nthe")
    assert made.id_of("<|channel>") == TOKENS.index("<|channel>") and made.decode([made.id_of("<|channel>") or 0]) == ""
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [TOKENS.index(one) for one in ("<eos>", "<turn|>", "<|tool_response>")]
    assert (settings["t_min"], settings["t_max"], settings["max_denoising_steps"]) == (0.4, 0.8, 6)
    model = dgemma.load(tmp_path / "out", backend="numpy")
    answer = model.generate("the", max_new_tokens=4, seed=1)
    assert len(answer.token_ids) <= 4


def test_the_tokenizer_of_a_folder_is_taken_instead(tmp_path: Path) -> None:
    path, _ = gguf_file(tmp_path, tokenizer="gpt2", vocab_size=272 + 50)
    with says("kind 'gpt2'", "--tokenizer DIR"):
        dgemma.convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    dgemma.convert(path, tmp_path / "out", tokenizer=tmp_path / "float")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "float" / name).read_bytes()
    with says("no such folder", "--tokenizer"):
        dgemma.convert(path, tmp_path / "other", tokenizer=tmp_path / "nowhere")
    with says("--tokenizer is for GGUF"):
        dgemma.convert(tmp_path / "float", tmp_path / "other", tokenizer=tmp_path / "float")
    (tmp_path / "empty").mkdir()
    with says("tokenizer.json", "no such file"):
        dgemma.convert(path, tmp_path / "other", tokenizer=tmp_path / "empty")
    assert dgemma.convert(path, tmp_path / "out", tokenizer=tmp_path / "out").fresh is False
    edit_json(tmp_path / "float" / "tokenizer_config.json", bos_token="<pad>")
    with says("exists"):  # another tokenizer makes another folder
        dgemma.convert(path, tmp_path / "out", tokenizer=tmp_path / "float")


# ---- The work ---------------------------------------------------------------------------------------------------


def test_an_interrupted_conversion_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = gguf_file(tmp_path, "Q5_1")
    dgemma.convert(path, tmp_path / "whole")
    from dgemma.convert import crew

    original, count = crew.Here.encode, [0]

    def fail(self: Any, *args: Any) -> Any:
        count[0] += 1
        if count[0] == 25:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(crew.Here, "encode", fail)
        with pytest.raises(KeyboardInterrupt):
            dgemma.convert(path, tmp_path / "out", workers=1)
    assert (tmp_path / "out.partial").exists()
    dgemma.convert(path, tmp_path / "out", workers=1)
    for name in (SHARD, MANIFEST, "tokenizer.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert dgemma.convert(path, tmp_path / "out").fresh is False


def test_workers_and_small_blocks_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = gguf_file(tmp_path, lambda name: "Q4_K" if "experts" in name else "Q4_0", **WIDE)
    dgemma.convert(path, tmp_path / "one", requantize=True)
    from dgemma.convert import crew, gguf_blocks

    monkeypatch.setattr(crew, "SMALL", 0)
    monkeypatch.setattr(gguf_blocks, "_PIECE", 1000)
    dgemma.convert(path, tmp_path / "two", requantize=True, workers=2)
    assert (tmp_path / "one" / SHARD).read_bytes() == (tmp_path / "two" / SHARD).read_bytes()


def test_the_target_may_lie_beside_the_file_but_not_around_it(tmp_path: Path) -> None:
    path, _ = gguf_file(tmp_path)
    dgemma.convert(path, path.with_suffix(""))
    with says("may not be the source"):
        dgemma.convert(path, path.parent, force=True)
    assert path.exists()


def test_the_table_of_names_is_complete() -> None:
    from dgemma.convert import gguf_source

    config = ModelConfig.from_hf(json.loads((Path(__file__).parent / "data" / "config_26b.json").read_text()))
    names = [spelling for name in weights.shapes(config) for spelling in gguf_source._spellings(name)[:1]]
    assert len(set(names)) == len(names) == 691  # and rope_freqs: the published file has 692 tensors
    assert len(MERGES) == 10 and gguf.MAGIC == b"GGUF"
