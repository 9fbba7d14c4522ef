"""What a text_config says of its layers in more than one spelling: the full layers' shape, and RoPE."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import DgemmaError
from .reader import Reader, show


def read_full_shape(text: Reader, kinds: Sequence[str], head_dim: int, kv_heads: int) -> tuple[int, int]:
    """Head size and key-value heads of the full-attention layers, from either spelling."""
    dim = text.take("global_head_dim", None)
    kv = text.take("num_global_key_value_heads", None)
    text.only("attention_k_eq_v", True)
    given = Reader({"global_head_dim": dim, "num_global_key_value_heads": kv}, text.where)
    if "per_layer_config" not in text.data:
        return (
            given.integer("global_head_dim", 512, high=1 << 16),
            given.integer("num_global_key_value_heads", kv_heads, high=1 << 16),
        )
    # What an entry leaves out is as in the sliding layers: transformers writes only what differs, and nothing where all
    # layers are alike.
    written = text.take("per_layer_config")
    table = text.child("per_layer_config", {} if written is None else written)
    full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    entries = {str(key): value for key, value in table.data.items() if value not in (None, {})}
    if entries and entries.keys() != set(map(str, full)):
        raise DgemmaError(f"{table.where}: expected entries for exactly the full-attention layers {show(full)}")
    shapes = {(head_dim, kv_heads)} if not entries else set()
    for key, value in entries.items():
        entry = table.child(key, value)
        one = entry.integer("head_dim", head_dim, high=1 << 16)
        shapes.add((one, entry.integer("num_key_value_heads", kv_heads, high=1 << 16)))
        entry.finish()
    if len(shapes) > 1:
        raise DgemmaError(f"{table.where}: the full-attention layers differ in shape; they must be alike")
    shape = shapes.pop()
    if not all(old in (None, new) for old, new in zip((dim, kv), shape, strict=True)):
        raise DgemmaError(f"{table.where}: says {shape}, but global_head_dim and num_global_key_value_heads say "
                          f"{show([dim, kv])}; remove one spelling")  # fmt: skip
    return shape


def read_ropes(text: Reader) -> dict[str, tuple[float, float]]:
    """Base and rotating share of each layer kind's RoPE."""
    default = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    }
    given = text.take("rope_parameters", None)
    table = text.child("rope_parameters", default if given is None else given)
    result = {}
    for kind, usual in default.items():
        entry = table.child(kind, table.take(kind))
        entry.only("rope_type", usual["rope_type"])
        theta = entry.number("rope_theta", usual["rope_theta"], low=1.0, above=True)
        # "default" RoPE with a share would rotate a shorter head: a different formula, never published.
        if kind == "sliding_attention":
            entry.only("partial_rotary_factor", 1.0, 1)
            share = 1.0
        else:
            share = entry.number("partial_rotary_factor", 0.25, low=0.0)
            if share > 1:
                raise DgemmaError(f"{entry.where}: partial_rotary_factor is {share}, expected at most 1")
        entry.finish()
        result[kind] = (theta, share)
    table.finish()
    return result
