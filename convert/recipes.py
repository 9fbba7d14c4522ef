"""Which weight is stored in which format: recipes are data.

A recipe is an ordered list of rules, a glob over module paths and what it gets; the first that matches decides.

                embedding   attention   dense MLP   self-cond.  experts     router
    bf16        bf16        bf16        bf16        bf16        bf16        bf16
    8bit        8 g32       8 g32       8 g32       8 g32       8 g32       stored
    4bit        8 g32       8 g32       8 g32       8 g32       4 g32       stored
    4bit-mlx    8 g64 +b    8 g64 +b    8 g64 +b    4 g64 +b    4 g64 +b    8 g64 +b
    nvfp4       8 g32       8 g32       8 g32       8 g32       nvfp4       stored
    mxfp8       mxfp8       mxfp8       mxfp8       mxfp8       mxfp8       stored
    keep        as the source has it; of what no format here holds, and with --requantize only, 8bit

8 g32 are symmetric codes of 8 bits, one bf16 scale for 32 weights; +b is MLX's affine, with a bias beside each scale.
`stored` leaves a tensor as the source has it, and so are norms, scales and scalars, and the image tower, in every
recipe (bf16 alone narrows the text model's). 4bit-mlx is what mlx-vlm's converter makes.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from ..checkpoints.files import read_json, read_text
from ..checkpoints.quant import FLOAT_MODES, Format
from ..checkpoints.quantized import read_format
from ..core.errors import DgemmaError, quoted, shown
from ..core.given import check_path

Target = Format | Literal["bf16", "stored"]
"""What becomes of a weight."""

_EITHER = "stored, bf16, symmetric4-g32, affine8-g64 (bits 2, 3, 4, 5, 6, 8; groups 32, 64, 128), mxfp4, mxfp8, nvfp4"
_MAX_RULES_FILE = 1 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    rules: tuple[tuple[str, Target], ...]
    """Globs over module paths, such as `model.decoder.layers.3.mlp.up_proj`; * crosses dots. No match: stored."""
    otherwise: Literal["bf16", "stored"] = "stored"
    """What a matrix gets whose rows the groups of its format do not divide. Such tensors are always named."""
    keep: bool = False
    """Whether the rules are only for weights that are quantized in what no format here holds."""

    def target(self, module: str) -> Target:
        for glob, target in self.rules:
            if fnmatchcase(module, glob):
                return target
        return "stored"

    def unused(self, modules: list[str]) -> list[str]:
        """Return the globs that decide nothing, which in a file of rules is a slip of the pen."""
        decided = {next((glob for glob, _ in self.rules if fnmatchcase(module, glob)), None) for module in modules}
        return [glob for glob, _ in self.rules if glob not in decided]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_json`."""
        rules: list[tuple[str, Target]] = [(glob, parse(target)) for glob, target in data["rules"]]
        return cls(name=data["name"], rules=tuple(rules), otherwise=data["otherwise"], keep="keep" in data)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "rules": [[glob, spell(target)] for glob, target in self.rules],
            "otherwise": self.otherwise,
        } | ({"keep": True} if self.keep else {})


def parse(text: str) -> Target:
    """Read a format's short name: `stored`, `bf16`, `symmetric4-g32`, `affine8-g64`, `mxfp4`, `mxfp8`, `nvfp4`."""
    if text == "stored":
        return "stored"
    if text == "bf16":
        return "bf16"
    if text in FLOAT_MODES:
        bits, size = FLOAT_MODES[text]
        return Format(mode=text, bits=bits, group_size=size)
    found = re.fullmatch(r"(affine|symmetric)(\d)-g(\d{1,3})", text, re.ASCII)
    if not found:
        raise DgemmaError(f"no format {quoted(text, 40)}; known: {_EITHER}")
    kind, bits, size = found.groups()
    return Format(bits=int(bits), group_size=int(size), symmetric=kind == "symmetric")


def spell(target: Target) -> str:
    """Return the short name of a format."""
    if not isinstance(target, Format):
        return target
    if target.mode != "affine":
        return target.mode
    return f"{'symmetric' if target.symmetric else 'affine'}{target.bits}-g{target.group_size}"


_GLOBS = (
    "*.embed_tokens", "*.self_attn.*_proj", "*.layers.*.mlp.*_proj", "*.self_conditioning.*_proj", "*.experts.*_proj",
    "*.router.proj",
)  # fmt: skip


def _table(*rows: str) -> dict[str, Recipe]:
    """One recipe a line: its name, and what each part of the model gets."""
    recipes = {}
    for row in rows:
        name, *cells = row.split()
        rules: list[tuple[str, Target]] = [(glob, parse(cell)) for glob, cell in zip(_GLOBS, cells, strict=True)]
        recipes[name] = Recipe(name=name, rules=tuple(rules))
    return recipes


RECIPES: dict[str, Recipe] = {
    "bf16": Recipe(name="bf16", rules=(("*", "bf16"),), otherwise="bf16"),
    **_table(
        #          embedding      attention      dense MLP      self-cond.     experts        router
        "8bit      symmetric8-g32 symmetric8-g32 symmetric8-g32 symmetric8-g32 symmetric8-g32 stored",
        "4bit      symmetric8-g32 symmetric8-g32 symmetric8-g32 symmetric8-g32 symmetric4-g32 stored",
        "4bit-mlx  affine8-g64    affine8-g64    affine8-g64    affine4-g64    affine4-g64    affine8-g64",
        "nvfp4     symmetric8-g32 symmetric8-g32 symmetric8-g32 symmetric8-g32 nvfp4          stored",
        "mxfp8     mxfp8          mxfp8          mxfp8          mxfp8          mxfp8          stored",
    ),
}
DEFAULT = "4bit"
"""Of a float checkpoint."""
KEEP = replace(RECIPES["8bit"], name="keep", keep=True)
"""The default of one that is quantized already."""


def find(name: str) -> Recipe:
    table = RECIPES | {KEEP.name: KEEP}
    if not isinstance(name, str) or name not in table:
        raise DgemmaError(f"no recipe {quoted(name, 40)}; known: {', '.join(table)}, or give a file of rules")
    return table[name]


def read_rules(path: str | Path) -> Recipe:
    """Read one's own recipe: an ordered JSON or TOML table of globs over module paths, and formats.

        otherwise = "stored"                   # optional; where groups do not divide a row: stored or bf16
        "*.layers.0.*" = "symmetric8-g32"
        "*.experts.*" = { mode = "affine", bits = 3, group_size = 64 }

    Raises:
        DgemmaError: not readable, or a rule that means nothing; names the line or the key.
    """
    check_path(path, "rules")
    path = Path(path)
    where = shown(path)
    if path.suffix not in (".json", ".toml"):
        raise DgemmaError(f"{where}: a file of rules ends in .toml or .json")
    table = read_json(path) if path.suffix == ".json" else _read_toml(path, where)
    otherwise = table.pop("otherwise", "stored")
    if otherwise not in ("stored", "bf16"):
        raise DgemmaError(f"{where}: otherwise is {quoted(otherwise, 40)}, expected 'stored' or 'bf16'")
    if not table:
        raise DgemmaError(f'{where}: no rules in it; a rule is a glob and a format, as "*.experts.*" = "nvfp4"')
    rules = []
    for glob, value in table.items():
        if not glob.strip():
            raise DgemmaError(f"{where}: a rule with an empty glob")
        rules.append((glob, _target(value, f"{where}: {quoted(glob, 60)}")))
    return Recipe(name=path.stem, rules=tuple(rules), otherwise=otherwise)


def _target(value: Any, where: str) -> Target:
    if isinstance(value, Mapping):
        return read_format(value, where)
    if not isinstance(value, str):
        raise DgemmaError(f"{where}: {quoted(json.dumps(value, default=str), 40)} is no format; known: {_EITHER}")
    try:
        return parse(value)
    except DgemmaError as error:
        raise DgemmaError(f"{where}: {error}") from None


def _read_toml(path: Path, where: str) -> dict[str, Any]:
    text = read_text(path, _MAX_RULES_FILE)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # which says the line
        raise DgemmaError(f"{where}: not readable as TOML: {quoted(str(error), 160)}") from None
