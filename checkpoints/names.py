"""What the names in a weight file stand for: the one table of who may be in a checkpoint besides `weights.shapes`.

    model.decoder.*                            the text model
    model.encoder.language_model.layers.N.layer_scalar   the encoder's own scalars
    …experts.gate_up_proj.weight               the same as without `.weight`: MLX's layers give every parameter one
    model.encoder.language_model.*             copies of the decoder's, tied in the model
    lm_head.weight                             a copy of the embedding, tied too
    model.encoder.vision_tower.*, …embed_vision.*        the image tower
    *.inv_freq, *.embed_scale, …               constants, which config.json says again

A weight may be stored under a copy's name alone. Where both are there, they have to be the same numbers: a model that
was trained with the ties undone is another model (see `ties.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .weights import DECODER, ENCODER

HEAD, EMBEDDING = "lm_head.weight", f"{DECODER}.embed_tokens.weight"
_IMAGE = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
# Buffers that some libraries write down; every one is computed from config.json.
_CONSTANT = re.compile(r"(.*\.)?(\w*inv_freq|embed_scale|rotary_emb\.\w+)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The names of a checkpoint's tensors, by what they are."""

    weights: Mapping[str, str]
    """Name in `weights.shapes` → name in the file."""
    copies: Mapping[str, tuple[str, ...]]
    """Name in `weights.shapes` → further names in the file that are tied to it."""
    image: tuple[str, ...]
    constants: tuple[str, ...]
    unknown: tuple[str, ...]


def assign(stored: Iterable[str], needed: Iterable[str]) -> Roles:
    """Say what every stored tensor is.

    Args:
        stored: names in the files; of a quantized tensor, which is several there, the one that ends in `.weight`.
        needed: the names of `weights.shapes`.
    """
    known = set(needed)
    found: dict[str, str] = {}
    copies: dict[str, list[str]] = {}
    other: dict[str, list[str]] = {"image": [], "constants": [], "unknown": []}
    for name in sorted(stored):  # `x` comes before `x.weight`, so the plain spelling is the weight
        if (own := _spelled(name, known)) and own not in found:
            found[own] = name
        elif not own and (twin := _spelled(tied_to(name), known)):
            copies.setdefault(twin, []).append(name)
        else:
            other[kind_of(name) if not own else "unknown"].append(name)
    for twin, names in copies.items():
        if twin not in found:
            found[twin] = names.pop(0)
    return Roles(
        weights=found,
        copies={twin: tuple(names) for twin, names in copies.items() if names},
        **{kind: tuple(names) for kind, names in other.items()},
    )


def kind_of(name: str) -> str:
    """Return "image", "constants", or "unknown", which a weight is too as long as no config is at hand."""
    return "image" if name.startswith(_IMAGE) else "constants" if _CONSTANT.fullmatch(name) else "unknown"


def tied_to(name: str) -> str:
    """Return the decoder's name for a copy, or nothing; whether the decoder has such a tensor is another question."""
    if name == HEAD:
        return EMBEDDING
    return f"{DECODER}.{name.removeprefix(f'{ENCODER}.')}" if name.startswith(f"{ENCODER}.") else ""


def dispensable(name: str) -> bool:
    """Whether the text model can do without a tensor of that name, or may have it under another."""
    return kind_of(name) != "unknown" or (tied_to(name) != "" and not name.endswith(".layer_scalar"))


def _spelled(name: str, known: set[str]) -> str:
    """Return the known name that this is a spelling of, or nothing."""
    bare = name.removesuffix(".weight") if ".experts." in name else name
    return name if name in known else bare if bare in known else ""
