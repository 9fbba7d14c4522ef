"""Published checkpoint layouts, each seen as the same thing: named weights that are read by rows.

    float               <name>                          BF16, F16, F32, as Hugging Face folders have them
    mlx                 see quantized.py                 mlx-community's, and ours
    modelopt            <module>.weight                  U8 [F, N/2], two E2M1 codes a byte, the first in the low half
                        <module>.weight_scale            F8_E4M3 [F, N/16], row-major: the file has no swizzle
                        <module>.weight_scale_2          F32 [], a factor on all scales
    compressed-tensors  <module>.weight_packed           as modelopt's weight
                        <module>.weight_scale            as modelopt's
                        <module>.weight_global_scale     F32 [1], a divisor of all scales: the reciprocal of the above
        integers        <module>.weight_packed           I32 [F, N·bits/32], 2, 4 or 8 bits; or weight, I8 [F, N]
                        <module>.weight_scale            BF16, F16 or F32 [F, groups], [F, 1] or [F]
                        <module>.weight_zero_point       I32, packed along F, or I8 [F, groups]; absent where symmetric
    float8, in both     <module>.weight                  F8_E4M3 [F, N]
                        <module>.weight_scale            BF16, F16 or F32: [F, 1], [F], or one number
    fp8                 <module>.weight                  F8_E4M3 [F, N]
                        <module>.weight_scale_inv        F32 [⌈F/128⌉, ⌈N/128⌉], or one number; multiplies as well

Experts may stand one by one, `…experts.7.gate_proj`, with gate and up apart; here they are one weight again. They may
be stacked as well, [E, 2F, D]: `…experts.gate_up_proj`, and `…experts.gate_up_proj_scale_inv` beside it.
Scales of activations, static ones too, are left out: what they stand for is arithmetic in 8 bits, and activations are
floats here. A g_idx, columns in another order than the groups, is refused by name.
Sources: NVIDIA's modelopt export, vllm-project/compressed-tensors (nvfp4, pack_quantized and
naive_quantized compressors), transformers' FineGrainedFP8Config, and what others read of the headers of
nvidia/diffusiongemma-26B-A4B-it-NVFP4 and RedHatAI/diffusiongemma-26B-A4B-it-FP8-dynamic.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints import foreign, names, quantized, ties, weights
from ..checkpoints.quantized import Packed, Quantization, module_of
from ..checkpoints.safetensors import SafetensorsFile
from ..core.config import ModelConfig
from ..core.errors import DgemmaError, quoted, shown
from . import declared
from .declared import Declared
from .integers import FLOATS, float8_block_part, integer_part
from .stored import NVFP4, Float8Part, MlxPart, Nvfp4Part, SourcePart, SourceWeight, Stored

METHODS = quantized.CONVERTED

_LEFT_OUT = (
    "input_scale", "input_zero_point", "input_global_scale", "input_scale_ub", "activation_scale", "output_scale",
    "output_zero_point", "k_scale", "v_scale", "q_scale", "weight_shape",
)  # fmt: skip
_QUANTIZED = (
    "weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_scale_inv", "weight_zero_point",
    "weight_g_idx",
)  # fmt: skip
_EXPERT = re.compile(r"(.+)\.(?:moe\.)?experts\.(\d{1,6})\.(gate_proj|up_proj|down_proj)", re.ASCII)
_STACK = re.compile(r"(.+\.experts\.(?:gate_up_proj|down_proj))(?:[._](.+))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint folder in any known layout."""

    layout: str
    """float, mlx, gguf, or what quantized it: modelopt, compressed-tensors, fp8."""
    text: tuple[SourceWeight, ...]
    """Exactly the tensors of `weights.shapes`, in its order."""
    image: tuple[SourceWeight, ...]
    copies: tuple[tuple[SourceWeight, SourceWeight], ...]
    """Copies of tied weights and what each is a copy of: the same numbers, as far as a sample shows."""
    dropped: tuple[str, ...]
    """Stored names that are not carried: tied copies, constants, and scales of activations."""


def read_source(
    files: Sequence[SafetensorsFile], data: Mapping[str, Any], config: ModelConfig, folder: Path, *, hinted: bool
) -> Source:
    """Find every weight among the tensors of a folder, whatever the layout.

    Args:
        files: the opened weight files.
        data: config.json.
        config: the same, read.
        folder: for messages.
        hinted: whether a `hf_quant_config.json` says that the folder is modelopt's.

    Raises:
        DgemmaError: tensors that are missing, unknown, misshapen, or that do not make up a quantized weight.
    """
    where = shown(folder)
    stored = {name: Stored(path=file.path, entry=file.entries[name]) for file in files for name in file.entries}
    entries = {name: one.entry for name, one in stored.items()}
    undeclared = all(not data.get(key) for key in ("quantization", "quantization_config"))
    method = quantized.needs_conversion(data) or ("modelopt" if hinted and undeclared else None)
    if method is not None and method not in METHODS:
        raise DgemmaError(f"{where}: quantized by {quoted(method, 40)}, which is not read; take {foreign.READABLE}")
    scheme = None if method else Quantization.from_config(data, shown(folder / "config.json"))
    needed = weights.shapes(config)
    found: dict[str, SourceWeight] = {}
    dropped: list[str] = []
    if scheme is not None:
        packed = quantized.find(entries, scheme, where)
        parts = {name for one in packed.values() for name in one.parts.values()}
        found |= {f"{module}.weight": _mlx_weight(f"{module}.weight", one, stored) for module, one in packed.items()}
        plain = [name for name in entries if name not in parts]
    else:
        plain, modules = [], {}
        for name in entries:
            module, kind = _split(name) if method else name.rpartition(".")[::2]
            if method and kind in _LEFT_OUT:
                dropped.append(name)
            elif (method and kind in (*_QUANTIZED, "weight")) or (kind == "weight" and _EXPERT.fullmatch(module)):
                modules.setdefault(module, {})[kind] = stored[name]
            else:
                plain.append(name)
        found |= _by_module(modules, where, config, data)
    found |= {name: _plain_weight(name, stored[name]) for name in plain}
    return _sort_out(found, needed, dropped, layout=method or ("mlx" if scheme else "float"), folder=folder)


def _sort_out(
    found: Mapping[str, SourceWeight], needed: Mapping[str, tuple[int, ...]], dropped: Sequence[str], *, layout: str,
    folder: Path,
) -> Source:  # fmt: skip
    """Say which of a folder's weights is what; `found` has them by the names they have there."""
    roles = names.assign(found, needed)
    text = {name: replace(found[own], name=name) for name, own in roles.weights.items()}
    check(text, roles.unknown, needed, shown(folder))
    copies = tuple((found[copy], text[name]) for name, several in roles.copies.items() for copy in several)
    for copy, one in copies:
        ties.check(copy, one, copy.name, one.name, folder, sample=True)
    return Source(
        layout=layout,
        text=tuple(text[name] for name in needed),
        image=tuple(found[name] for name in roles.image),
        copies=copies,
        dropped=tuple(sorted((*dropped, *roles.constants, *(copy.name for copy, _ in copies)))),
    )


def _plain_weight(name: str, stored: Stored) -> SourceWeight:
    entry = stored.entry
    if not entry.shape and name.endswith(".layer_scalar"):  # which some write without a dimension
        stored = Stored(path=stored.path, entry=replace(entry, shape=(1,)))
    return SourceWeight(name=name, shape=stored.entry.shape, dtype=entry.dtype, format=None, parts=(stored,))


def _mlx_weight(name: str, packed: Packed, stored: Mapping[str, Stored]) -> SourceWeight:
    factor = packed.parts.get("global_scale")
    rows = factor is not None and math.prod(stored[factor].entry.shape) > 1
    return SourceWeight(
        name=name,
        shape=packed.shape,
        dtype="quantized",
        format=packed.format if packed.exact else None,
        parts=(MlxPart(packed=packed, stored={one: stored[one] for one in packed.parts.values()}),),
        factor="none" if factor is None else "rows" if rows else "one",
        scales="F16" if packed.exact and stored[packed.parts["scales"]].entry.dtype == "F16" else "BF16",
    )


def _split(name: str) -> tuple[str, str]:
    """Return the module and the kind of a tensor's name; those of stacked experts are spelled with underscores."""
    if not (match := _STACK.fullmatch(name)):
        module, _, kind = name.rpartition(".")
        return module, kind
    module, kind = match.groups()
    kind = kind or "weight"
    plain = kind == "weight" or kind.startswith("weight_") or kind in _LEFT_OUT
    return module, kind if plain else f"weight_{kind}"


def _by_module(
    modules: Mapping[str, dict[str, Stored]], where: str, config: ModelConfig, data: Mapping[str, Any]
) -> dict[str, SourceWeight]:
    """Put together what quantizers keep apart, and experts that stand one by one."""
    found: dict[str, SourceWeight] = {}
    said = declared.read(data)
    widths = {module_of(name): shape[-1] for name, shape in weights.shapes(config).items()}
    experts: dict[str, dict[tuple[int, str], SourceWeight]] = {}
    for module, parts in modules.items():
        try:
            one = _module_weight(module, parts, said, _width(module, widths, config))
        except DgemmaError as error:
            raise DgemmaError(f"{where}: {quoted(module)}: {error}") from None
        if match := _EXPERT.fullmatch(module):
            layer, index, kind = match.groups()
            experts.setdefault(f"{layer}.experts", {})[int(index), kind] = one
        else:
            found[one.name] = one
    for name, table in experts.items():
        for fused, kinds in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            found[f"{name}.{fused}"] = _fused(f"{name}.{fused}", table, kinds, config.experts, where)
    return found


def _fused(
    name: str, table: Mapping[tuple[int, str], SourceWeight], kinds: tuple[str, ...], experts: int, where: str
) -> SourceWeight:
    """Join experts, gate rows before up rows: [E, 2F, D] or [E, D, F]."""
    pieces = []
    for index in range(experts):
        for kind in kinds:
            if (index, kind) not in table:
                raise DgemmaError(f"{where}: {quoted(name)}: the {kind} of expert {index} of {experts} is missing")
            pieces.append(table[index, kind])
    if over := [index for index, _ in table if index >= experts]:
        raise DgemmaError(f"{where}: {quoted(name)}: there is an expert {max(over)}, but config.json has {experts}")
    first = pieces[0]
    for one in pieces:
        if (one.shape, one.dtype, one.format, one.scales) != (first.shape, first.dtype, first.format, first.scales):
            raise DgemmaError(f"{where}: {quoted(name)}: {quoted(one.name)} differs in shape or format from its like")
    return SourceWeight(
        name=name,
        shape=(experts, len(kinds) * first.shape[0], first.width),
        dtype=first.dtype,
        format=first.format,
        parts=tuple(part for one in pieces for part in one.parts),
        factor="none" if first.factor == "none" else "rows",
        scales=first.scales,
    )


def _width(module: str, widths: Mapping[str, int], config: ModelConfig) -> int:
    """Return the length that a module's rows should have; 0 where the model has no such module."""
    if match := _EXPERT.fullmatch(module):
        return config.expert_size if match[3] == "down_proj" else config.hidden_size
    return widths.get(module) or widths.get(module_of(names.tied_to(f"{module}.weight")), 0)


def _module_weight(module: str, parts: Mapping[str, Stored], said: Declared, width: int) -> SourceWeight:
    name = module if _STACK.fullmatch(module) else f"{module}.weight"
    if "weight_g_idx" in parts:
        raise DgemmaError(
            "has weight_g_idx, an order of columns (activation ordering) that no format here has; "
            "convert the bf16 original, or a copy quantized without it"
        )
    packed = "weight_packed" in parts
    codes = parts.get("weight_packed" if packed else "weight")
    if codes is None:
        raise DgemmaError(f"has {sorted(parts)[0]} but no weight")
    if packed and "weight" in parts:
        raise DgemmaError("has both weight and weight_packed")
    dtype, shape = codes.entry.dtype, codes.entry.shape
    extra = set(parts) - {"weight", "weight_packed"}
    if not extra:
        if dtype in ("F8_E4M3", "I8") or packed:
            raise DgemmaError("has no weight_scale")
        return SourceWeight(name=name, shape=shape, dtype=dtype, format=None, parts=(codes,))
    factor = "weight_global_scale" if packed else "weight_scale_2"
    if dtype == "F8_E4M3" and not packed:
        return _float8_weight(name, codes, parts, extra, said.block)
    if factor not in extra and (dtype in ("I32", "I8") or (packed and dtype != "U8")):
        _only(extra - {"weight_zero_point"}, {"weight_scale"})
        scale = parts["weight_scale"]
        made, shape = integer_part(module, codes, scale, parts.get("weight_zero_point"), width)
        if made.zeros is None and made.bits in said.asymmetric:
            raise DgemmaError("has no weight_zero_point, and config.json says that it is asymmetric")
        scales = "F16" if scale.entry.dtype == "F16" else "BF16"
        return SourceWeight(name=name, shape=shape, dtype="quantized", format=made.format, parts=(made,), scales=scales)
    if dtype == "U8":
        _only(extra, {"weight_scale", factor})
    if dtype != "U8" or len(shape) != 2 or shape[-1] % 8:
        raise DgemmaError(f"weight is {dtype} {quoted(list(shape), 60)}, expected U8 [F, N/2], N a multiple of 16")
    scale, wanted = parts["weight_scale"].entry, (shape[0], shape[1] // 8)
    if scale.dtype != "F8_E4M3" or scale.shape != wanted:
        found = f"{scale.dtype} {quoted(list(scale.shape), 60)}"
        raise DgemmaError(f"weight_scale is {found}, expected F8_E4M3 {list(wanted)}")
    if parts[factor].entry.dtype != "F32" or math.prod(parts[factor].entry.shape) != 1:
        raise DgemmaError(f"{factor} should be one F32")
    part = Nvfp4Part(module=module, codes=codes, scales=parts["weight_scale"], factor=parts[factor], divides=packed)
    return SourceWeight(
        name=name, shape=(shape[0], 2 * shape[1]), dtype="quantized", format=NVFP4, parts=(part,), factor="one"
    )


def _float8_weight(
    name: str, codes: Stored, parts: Mapping[str, Stored], extra: set[str], block: tuple[int, int]
) -> SourceWeight:
    kind = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    _only(extra, {kind})
    shape, scales = codes.entry.shape, parts[kind]
    rows = scales.entry.shape in ((), (1,), shape[:1], (*shape[:1], 1)) and scales.entry.dtype in FLOATS
    if len(shape) == 2 and rows and 0 not in shape:
        part: SourcePart = Float8Part(codes=codes, scales=scales)
    else:
        part = float8_block_part(codes, scales, block)
    return SourceWeight(name=name, shape=shape, dtype="quantized", format=None, parts=(part,))


def _only(extra: set[str], wanted: set[str]) -> None:
    if missing := sorted(wanted - extra):
        raise DgemmaError(f"has no {missing[0]}")
    if unknown := sorted(extra - wanted):
        raise DgemmaError(f"has {unknown[0]}, which does not belong to its format")


def check(
    found: Mapping[str, SourceWeight], unknown: Sequence[str], needed: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Refuse weights that are missing, unknown, misshapen or of no readable type, by name."""
    missing = [name for name in needed if name not in found]
    shape = [f"{name} is {list(found[name].shape)}, expected {list(want)}"
             for name, want in needed.items() if name in found and found[name].shape != want]  # fmt: skip
    width = [f"{name} is {found[name].dtype}" for name in needed
             if name in found and found[name].dtype not in (*FLOATS, "quantized")]  # fmt: skip
    faults = (("missing", missing), ("unknown", unknown), ("misshapen", shape), ("of no readable type", width))
    for what, which in faults:
        if which:
            raise DgemmaError(f"{where}: {len(which)} tensors {what}: {_few(which)}{foreign.hint(unknown)}")


def _few(which: Sequence[str]) -> str:
    said = ", ".join(quoted(name, 90) for name in which[:2])
    return f"{said}, ..." if len(which) > 2 else said
