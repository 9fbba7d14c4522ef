"""Quantized checkpoint folders in MLX's layout, ours and mlx-community's: what config.json and the headers say.

    config.json    "quantization": {"group_size": 64, "bits": 4, "mode": "affine", "<module>": {"bits": 8, …}, …}
    <module>.weight        uint32 words [..., N·bits/32]
    <module>.scales        [..., N/group_size], bf16 or f16 (affine) or bytes
    <module>.biases        as the scales: affine only, and not where the entry says "symmetric": true
    <module>.global_scale  float32, or float32 [..., 1] with one for each row: nvfp4 of ours only

A module is quantized where it has scales. The outer entry is for those without one of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..core.errors import DgemmaError, quoted
from ..core.hf_keys import QUANTIZATION, ineffective
from .quant import Format, QTensor, carry, dequantize, from_bf16, to_bf16
from .safetensors import Entry

PARTS = ("weight", "scales", "biases", "global_scale")
_SCALES = {"affine": ("BF16", "F16", "F32"), "nvfp4": ("U8", "F8_E4M3")}
_E8M0 = ("U8", "F8_E8M0")


def module_of(name: str) -> str:
    """Return the module path of a tensor name: experts are bare parameters, all others end in `.weight`."""
    return name.removesuffix(".weight")


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """The `quantization` of a config.json."""

    default: Format | None
    modules: Mapping[str, Mapping[str, Any] | Literal[False]]
    """Entries by module path, as they stand there; false for one that is kept out by name."""
    where: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Quantization | None:
        """Read config.json; None where it says nothing of MLX's layout.

        Raises:
            DgemmaError: the folder is quantized in a layout that has to be converted first, or an entry is wrong.
        """
        data, mirror = (_stated(config, key) for key in ("quantization", "quantization_config"))
        if data is None and isinstance(mirror, Mapping) and "quant_method" not in mirror:
            data = mirror
        if data is None:
            return None
        if not isinstance(data, Mapping):
            raise DgemmaError(f"{where}: quantization is {quoted(data, 40)}, expected an object")
        outer = {key: value for key, value in data.items() if not _is_entry(value) and value is not None}
        return cls(
            default=read_format(outer, f"{where}: quantization") if outer else None,
            modules={str(key): value for key, value in data.items() if _is_entry(value)},
            where=where,
        )

    def format(self, module: str) -> Format | None:
        """Return the format of a module; an entry that no module asks for is never read.

        Raises:
            DgemmaError: the module's entry is wrong.
        """
        entry = self.modules.get(module)
        if entry is None:
            return self.default
        return read_format(entry, f"{self.where}: quantization of {quoted(module)}") if entry else None


CONVERTED = ("modelopt", "compressed-tensors", "fp8", "fbgemm_fp8")
"""What `dgemma convert` reads, by the name in `quantization_config`."""


def needs_conversion(config: Mapping[str, Any]) -> str | None:
    """Return the name of a quantization that only `dgemma convert` reads, such as modelopt's."""
    mirror = config.get("quantization_config")
    if _stated(config, "quantization") is None and isinstance(mirror, Mapping) and "quant_method" in mirror:
        return str(mirror["quant_method"])
    return None


def _stated(config: Mapping[str, Any], key: str) -> Any:
    """A key's value, or None where that says that nothing is quantized: false, 0, an empty list."""
    value = config.get(key)
    return value if value or isinstance(value, Mapping) else None


def _is_entry(value: Any) -> bool:
    return isinstance(value, Mapping) or value is False


def read_format(entry: Mapping[str, Any], where: str) -> Format:
    """Read an entry as MLX writes it, or a user.

    Raises:
        DgemmaError: a value of another type, or no format; begins with `where`.
    """
    own = Format.__dataclass_fields__
    entry = {key: value for key, value in entry.items() if not _extra(key, value, own)}
    for key, kind in (("mode", str), ("bits", int), ("group_size", int), ("symmetric", bool)):
        value = entry.get(key, kind())
        if kind is int and isinstance(value, float) and value.is_integer():
            entry[key] = value = int(value)
        if type(value) is not kind:
            raise DgemmaError(f"{where}: {key} is {quoted(value, 40)}, expected {kind.__name__}")
    try:
        return Format.from_config(entry)
    except DgemmaError as error:
        raise DgemmaError(f"{where}: {error}") from None


def _extra(key: Any, value: Any, own: Container[str]) -> bool:
    return value is None or (key not in own and ineffective(str(key), value, QUANTIZATION))


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One quantized tensor of a file: its parts by their stored names, checked against each other."""

    module: str
    format: Format
    shape: tuple[int, ...]
    """Of the weight, [..., N]."""
    parts: Mapping[str, str]
    """`weight`, `scales`, … → stored name."""
    nbytes: int
    exact: bool
    """Whether scales and biases are in a width that a QTensor holds; not so where they are float32."""

    def read(self, get: Callable[[str], np.ndarray]) -> QTensor | np.ndarray:
        """Assemble it; `get` returns the array of a stored name, or of the same rows of all of them.

        Scales of float32, as MLX writes for a model in that width, fit a QTensor only where bf16 has their values; else
        the weight comes back dequantized, in float32: the same value, and none of the savings.

        Raises:
            DgemmaError: NaN or infinity among the scales.
        """
        parts: dict[str, Any] = {kind: get(name) for kind, name in self.parts.items()}
        scales, biases, factor = (parts.get(part) for part in PARTS[1:])
        assert scales is not None
        if factor is not None and factor.size == 1:
            factor = np.float32(factor.reshape(())[()])
        try:
            if self.exact:
                bias = None if biases is None else bits_of(biases)
                return carry(parts["weight"], bits_of(scales), bias, format=self.format, global_scale=factor)
            assert biases is not None  # `find` lets symmetric formats have bf16 or float16 only
            wide = [part.astype(np.float32) for part in (scales, biases)]
            narrow = [to_bf16(part) for part in wide]
            if all((from_bf16(b) == a).all() for a, b in zip(wide, narrow, strict=True)):
                return carry(parts["weight"], narrow[0], narrow[1], format=self.format)
            return _dequantize_wide(parts["weight"], wide[0], wide[1], self.format)
        except DgemmaError as error:
            raise DgemmaError(f"{quoted(self.module)}: {error}") from None


def bits_of(array: np.ndarray) -> np.ndarray:
    """View scales or biases of a file as a QTensor has them: float16 as it is, bf16 and bytes as their bits."""
    return array if array.dtype == np.float16 else array.view(f"u{array.dtype.itemsize}")


def _dequantize_wide(words: np.ndarray, scales: Any, biases: Any, kind: Format) -> np.ndarray:
    """scale·q + bias in float32, for scales that bf16 cannot hold."""
    ones = np.full(scales.shape, 0x3F80, np.uint16)  # 1 in bf16
    codes = dequantize(QTensor(words=words, scales=ones, biases=np.zeros_like(ones), format=_affine(kind)))
    groups = codes.reshape(*scales.shape, kind.group_size)
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        raise DgemmaError("the scales or biases of a quantized tensor hold NaN or infinity")
    return (groups * scales[..., None] + biases[..., None]).reshape(codes.shape)


def _affine(kind: Format) -> Format:
    return Format(bits=kind.bits, group_size=kind.group_size)


def find(entries: Mapping[str, Entry], quantization: Quantization, where: str) -> dict[str, Packed]:
    """Return the quantized tensors among the entries of a folder's files, by module path.

    Raises:
        DgemmaError: words, scales and biases that do not fit each other or the module's entry, or lack one another.
    """
    marked = {name.removesuffix(".scales") for name in entries if name.endswith(".scales")}
    marked |= {module_of(name) for name, entry in entries.items() if name.endswith(".weight") and entry.dtype == "U32"}
    result = {}
    for module in sorted(marked):
        try:
            result[module] = _packed(module, entries, quantization.format(module))
        except DgemmaError as error:
            raise DgemmaError(f"{where}: {quoted(module)}: {error}") from None
    return result


def _packed(module: str, entries: Mapping[str, Entry], kind: Format | None) -> Packed:
    parts = {part: f"{module}.{part}" for part in PARTS if f"{module}.{part}" in entries}
    if missing := [part for part in ("weight", "scales") if part not in parts]:
        other = "weight" if missing == ["scales"] else "scales"
        raise DgemmaError(f"has quantized {other} but no {missing[0]}")
    if kind is None:
        raise DgemmaError("is quantized, but config.json has no entry for it and no default")
    words, scales = entries[parts["weight"]], entries[parts["scales"]]
    if words.dtype != "U32" or not words.shape or words.shape[-1] * 32 % kind.bits:
        found = f"{words.dtype} {quoted(list(words.shape), 60)}"
        raise DgemmaError(f"weight is {found}, expected U32 [..., N·{kind.bits}/32]")
    width = words.shape[-1] * 32 // kind.bits
    leading = words.shape[:-1]
    grouped = (*leading, kind.groups_per_row(width))
    known = ("BF16", "F16") if kind.symmetric else _SCALES.get(kind.mode, _E8M0)
    wanted: dict[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]] = {"scales": (known, (grouped,))}
    if kind.mode == "affine":
        if "biases" in parts:
            wanted["biases"] = ((scales.dtype,), (grouped,))
        elif not kind.symmetric:
            raise DgemmaError(f"has no biases, which {kind.bits}-bit affine needs")
    if kind.mode == "nvfp4" and "global_scale" in parts:
        wanted["global_scale"] = (("F32",), ((), (1,), (*leading, 1)))
    if extra := [part for part in parts if part != "weight" and part not in wanted]:
        raise DgemmaError(f"has {extra[0]}, which {kind.mode} does not have")
    for part, (dtypes, shapes) in wanted.items():
        entry = entries[parts[part]]
        if entry.dtype not in dtypes or entry.shape not in shapes:
            raise DgemmaError(
                f"{part} is {entry.dtype} {quoted(list(entry.shape), 60)}, expected {' or '.join(dtypes)} "
                f"{list(shapes[-1])} for {kind.bits}-bit {kind.mode} in groups of {kind.group_size}"
            )
    return Packed(
        module=module,
        format=kind,
        shape=(*leading, width),
        parts=parts,
        nbytes=sum(entries[name].nbytes for name in parts.values()),
        exact=kind.mode != "affine" or scales.dtype in ("BF16", "F16"),
    )
