"""A GGUF file as a source: llama.cpp's names of tensors and settings, and ours.

The names are those that llama.cpp's open pull requests for this model write and read (ggml-org/llama.cpp 24423 and
24427), and the published files made with the first: architecture `diffusion-gemma`, a Gemma 4 of which the tensors
`self_cond_*` and `enc_layer_output_scale` and the setting `diffusion.canvas_length` are new. Spellings that their
drafts and readers have had are accepted too.

Values are as they are in the original. Gemma 2 and 3 have 1 added to the weights of their norms on the way into GGUF;
Gemma 4's converter, which this model's is derived from, adds nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints import gguf, weights
from ..checkpoints.gguf import GgufFile, Tensor
from ..core.config import ModelConfig
from ..core.errors import DgemmaError, quoted, shown
from .gguf_blocks import GgufPart, Run, form_of, part_of
from .gguf_config import make_config
from .gguf_tokenizer import companions, copied
from .layouts import Source, check
from .stored import SourceWeight, Stored

OUTER: dict[str, tuple[str, ...]] = {
    "embed_tokens.weight": ("token_embd",),
    "norm.weight": ("output_norm",),
    "self_conditioning.pre_norm.weight": ("self_cond_pre_norm", "self_cond_norm", "sc_pre_norm"),
    "self_conditioning.gate_proj.weight": ("self_cond_gate", "sc_gate"),
    "self_conditioning.up_proj.weight": ("self_cond_up", "sc_up"),
    "self_conditioning.down_proj.weight": ("self_cond_down", "sc_down"),
}
LAYER: dict[str, tuple[str, ...]] = {
    "input_layernorm.weight": ("attn_norm",),
    "self_attn.q_proj.weight": ("attn_q",),
    "self_attn.k_proj.weight": ("attn_k",),
    "self_attn.v_proj.weight": ("attn_v",),
    "self_attn.o_proj.weight": ("attn_output",),
    "self_attn.q_norm.weight": ("attn_q_norm",),
    "self_attn.k_norm.weight": ("attn_k_norm",),
    "post_attention_layernorm.weight": ("post_attention_norm", "attn_post_norm"),
    "pre_feedforward_layernorm.weight": ("ffn_norm",),
    "mlp.gate_proj.weight": ("ffn_gate",),
    "mlp.up_proj.weight": ("ffn_up",),
    "mlp.down_proj.weight": ("ffn_down",),
    "post_feedforward_layernorm_1.weight": ("post_ffw_norm_1", "ffn_post_norm_1"),
    "pre_feedforward_layernorm_2.weight": ("pre_ffw_norm_2", "ffn_pre_norm_2"),
    "post_feedforward_layernorm_2.weight": ("post_ffw_norm_2", "ffn_post_norm_2"),
    "post_feedforward_layernorm.weight": ("post_ffw_norm", "ffn_post_norm"),
    "router.proj.weight": ("ffn_gate_inp",),
    "router.scale": ("ffn_gate_inp.scale",),
    "router.per_expert_scale": ("ffn_down_exps.scale",),
    "experts.gate_up_proj": ("ffn_gate_up_exps",),
    "experts.down_proj": ("ffn_down_exps",),
    "layer_scalar": ("layer_output_scale", "layer_out_scale"),
}
ENCODER_SCALAR = ("enc_layer_output_scale", "enc_layer_out_scale")
GATE, UP = "ffn_gate_exps", "ffn_up_exps"
"""Experts' halves, where a file has them apart."""
HEAD, ROPE = "output.weight", "rope_freqs.weight"


@dataclass(frozen=True, kw_only=True)
class GgufSource:
    """A GGUF model, split or not, opened and understood."""

    path: Path
    files: tuple[GgufFile, ...]
    tokenizer: Path | None
    """A folder to take the tokenizer from, in place of the file's own."""
    data: dict[str, Any]
    """A config.json for it."""
    config: ModelConfig
    source: Source

    @cached_property
    def companions(self) -> dict[str, bytes]:
        """What stands beside the weights: the tokenizer, the chat template and generation_config.json, by name.

        Raises:
            DgemmaError: a tokenizer that cannot be rebuilt.
        """
        return companions(self.files[0], self.config, self.tokenizer)

    @cached_property
    def tokenizer_hash(self) -> str | None:
        """SHA-256 of what another folder gives; the file's own tokenizer stands in its header."""
        if self.tokenizer is None:
            return None
        digest = hashlib.sha256()
        for name, data in copied(self.tokenizer, self.config).items():
            digest.update(f"{name} {len(data)}\n".encode() + data)
        return digest.hexdigest()


def open_source(path: Path, tokenizer: Path | None = None) -> GgufSource:
    """Read a GGUF file's headers, and see it as a source.

    Raises:
        DgemmaError: damaged, of another model, or with tensors that are missing, unknown, misshapen or unreadable.
    """
    files = gguf.open_all(path)
    stored = {name: (file.path, one) for file in files for name, one in file.tensors.items()}
    data = make_config(files[0], {name: one for name, (_, one) in stored.items()}, _turning(stored))
    where = shown(path)
    config = ModelConfig.from_hf(data, where=f"{where}: its settings")
    return GgufSource(
        path=path, files=files, tokenizer=tokenizer, data=data, config=config, source=_weights(stored, config, where)
    )


def _turning(stored: Mapping[str, tuple[Path, Tensor]]) -> tuple[int, int] | None:
    """Return how many of the pairs of a full layer's head turn, of how many, or None where the file does not say.

    "Proportional" RoPE is written as divisors of the frequencies: 1 for a pair that turns, 1e30 for one that does not.
    """
    if ROPE not in stored:
        return None
    path, tensor = stored[ROPE]
    if tensor.kind != "F32" or len(tensor.shape) != 1 or tensor.nbytes > 1 << 20:
        raise DgemmaError(f"{shown(path)}: {ROPE} is {tensor.kind} {list(tensor.shape)}, expected a row of F32")
    part = part_of(path, ROPE, tensor)
    assert isinstance(part, Stored)
    factors = part.read(0, 1)[0]
    turn = int((factors == 1).sum())
    if not ((factors[:turn] == 1).all() and (factors[turn:] >= 1e20).all()):
        raise DgemmaError(f"{shown(path)}: {ROPE} divides frequencies by other numbers than 1 and 1e30; this runtime "
                          "has no such RoPE")  # fmt: skip
    return turn, len(factors)


def _spellings(name: str) -> list[str]:
    """Return what a weight may be called in a GGUF file, most likely first."""
    if name.startswith(f"{weights.ENCODER}.layers."):
        number = name.removeprefix(f"{weights.ENCODER}.layers.").partition(".")[0]
        bare = [f"blk.{number}.{one}" for one in ENCODER_SCALAR]
    elif name.startswith(f"{weights.DECODER}.layers."):
        number, _, rest = name.removeprefix(f"{weights.DECODER}.layers.").partition(".")
        bare = [f"blk.{number}.{one}" for one in LAYER[rest]]
    else:
        bare = list(OUTER[name.removeprefix(f"{weights.DECODER}.")])
    return [one if one.endswith(".scale") else f"{one}.weight" for one in bare] + bare


def _weights(stored: Mapping[str, tuple[Path, Tensor]], config: ModelConfig, where: str) -> Source:
    needed = weights.shapes(config)
    found: dict[str, SourceWeight] = {}
    used = {ROPE}
    for name in needed:
        spelled = next((one for one in _spellings(name) if one in stored), None)
        if spelled is None:
            if name.endswith(".experts.gate_up_proj") and (one := _halves(name, stored, used, where)):
                found[name] = one
            continue
        used.add(spelled)
        path, tensor = stored[spelled]
        part = part_of(path, spelled, tensor)
        found[name] = SourceWeight(name=name, shape=tensor.shape, parts=(part,), **form_of(part))
    if HEAD in stored:
        _check_tied(*stored[HEAD], found.get(f"{weights.DECODER}.embed_tokens.weight"))
        used.add(HEAD)
    if strays := [name for name in stored if name not in used]:
        many = f"{len(strays)} tensors" if len(strays) > 1 else "a tensor"
        raise DgemmaError(f"{where}: {many} that this model does not have: {', '.join(map(quoted, strays[:3]))}")
    absent = {name: _spellings(name)[0] for name in needed if name not in found}
    if absent:
        names = ", ".join(list(absent.values())[:3])
        raise DgemmaError(f"{where}: {len(absent)} tensors missing: {names}{', ...' if len(absent) > 3 else ''}")
    check(found, (), needed, where)
    return Source(
        layout="gguf", text=tuple(found[name] for name in needed), image=(), copies=(), dropped=tuple(used & {HEAD})
    )


def _halves(
    name: str, stored: Mapping[str, tuple[Path, Tensor]], used: set[str], where: str
) -> SourceWeight | None:  # fmt: skip
    """Join gate and up of all experts where they stand apart: expert by expert, gate rows first."""
    prefix = _spellings(name)[0].rpartition(".ffn_")[0]
    names = [f"{prefix}.{half}.weight" for half in (GATE, UP)]
    if not all(one in stored for one in names):
        return None
    used.update(names)
    tensors = [stored[one][1] for one in names]
    first = tensors[0]
    if len(first.shape) != 3 or (tensors[1].shape, tensors[1].kind) != (first.shape, first.kind):
        raise DgemmaError(f"{where}: {names[0]} and {names[1]} differ in type or shape, or are no stacks of experts")
    experts, rows, width = first.shape
    whole = [part_of(*_pair(stored, one)) for one in names]
    parts = tuple(Run(part=part, first=i * rows, rows=rows) for i in range(experts) for part in whole)
    return SourceWeight(name=name, shape=(experts, 2 * rows, width), parts=parts, **form_of(whole[0]))


def _pair(stored: Mapping[str, tuple[Path, Tensor]], name: str) -> tuple[Path, str, Tensor]:
    path, tensor = stored[name]
    return path, name, tensor


def _check_tied(path: Path, head: Tensor, embedding: SourceWeight | None) -> None:
    """Compare an output matrix with the embedding, which it has to be."""
    if embedding is not None and head.shape == embedding.shape:
        one, other = part_of(path, HEAD, head), embedding.parts[0]
        step = max(1, (1 << 22) // max(head.shape[-1], 1))
        same = isinstance(other, Stored | GgufPart) and one.nbytes == other.nbytes
        for start in range(0, head.shape[0] if same else 0, step):
            stop = min(start + step, head.shape[0])
            a, b = (_raw(part).read(start, stop) for part in (one, other) if isinstance(part, Stored | GgufPart))
            same = same and np.array_equal(a, b)
        if same:
            return
    raise DgemmaError(f"{shown(path)}: {HEAD} is not the embedding; this model's head is tied to it")


def _raw(part: Stored | GgufPart) -> Stored:
    from ..checkpoints.safetensors import Entry

    rows = part.rows
    start = part.tensor.start if isinstance(part, GgufPart) else part.entry.start
    entry = Entry(dtype="U8", shape=(rows, part.nbytes // rows), start=start, nbytes=part.nbytes)
    return Stored(path=part.path, entry=entry)
