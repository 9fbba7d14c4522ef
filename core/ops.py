"""The contract between the graph and a backend.

`ops` is the first argument of everything in the graph. A backend subclasses `Ops`, supplies the primitives (one to
three lines each) and can then run the whole model; it gets fast by overriding fused ops, whose default bodies, in
`reference.py`, are written in primitives and are both their documentation and the oracle they are tested against.

Arrays are whatever the backend's framework has. The graph uses Python's arithmetic and comparison operators on them
and the primitives below, nothing else. Three rules keep the frameworks from disagreeing: constants are Python floats,
indices are int32, and every change of width is an `ops.cast`.

Shape letters, here and in every docstring:
    B batch    L canvas or query length    S context length    D hidden width    V vocabulary
    H query heads    K key-value heads    A width of one head    E experts    F an MLP's or expert's inner width
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

import ml_dtypes
import numpy as np

from ..checkpoints.quant import QTensor, dequantize
from . import reference
from . import sampler as sampling
from .config import SamplerConfig

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint
    from .config import ModelConfig
    from .model import Attention, Cache, Experts, Layer, Mlp, Router
    from .sampler import Sampling, StepState

Part = TypeVar("Part", bound="Attention | Mlp")
Result = TypeVar("Result")
Array = Any
DType = Literal["float64", "float32", "bfloat16", "float16", "int32", "bool"]
Reduction = Literal["sum", "max", "min", "mean", "any", "all", "argmax"]
Unary = Literal["exp", "log", "tanh", "rsqrt", "cos", "sin"]

NUMPY_DTYPES: dict[str, Any] = {
    "float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16,
    "int32": np.int32, "bool": np.bool_,
}  # fmt: skip


def dense(weight: Any, dtype: DType) -> np.ndarray:
    """Return a stored weight as an array: as it is or, where quantized, its values, rounded once to the dtype."""
    if not isinstance(weight, QTensor):
        return np.asarray(weight)
    if dtype == "bfloat16":
        return dequantize(weight, dtype).view(ml_dtypes.bfloat16)
    return dequantize(weight, "float16" if dtype == "float16" else "float32")


class KV(NamedTuple):
    """One layer's cache. Rows beyond the span's `rows` are a backend's scratch and mean nothing."""

    keys: Array  # [B, K, S, A]
    values: Array  # [B, K, S, A]


class Rope(NamedTuple):
    """Rotary position embedding of one run of consecutive positions, for one layer kind."""

    cos: Array  # [B or 1, 1, L, A/2], compute dtype
    sin: Array  # [B or 1, 1, L, A/2]
    offset: int | Array  # the first position: int, or int32 [B]
    frequencies: tuple[float, ...]  # A/2 radians per position


@dataclass(frozen=True, kw_only=True)
class Span:
    """What a query sees of the cache: a description, so that no backend has to build a mask it does not need.

    The cache holds the `rows` newest tokens before the query's first position. With causal rows c, none, all L or, in
    a joined pass, those before the canvas, and `p = min(i, c)`: query i sees row j of the cache if
    `p + rows − j < window`, and query-side key j' if `p − j' < window` and either `j' ≤ i` or `i ≥ c`.
    """

    rows: int | Array
    """Valid rows of the cache: int, or int32 [B] where the batch is ragged or the graph is compiled for a bucket."""
    window: int | None
    causal: bool
    canvas: int = 0
    """With `causal`: so many of the last rows are a canvas behind the causal ones, as if those were cached already."""

    def causal_rows(self, length: int) -> int:
        """Return how many of so many query rows are causal."""
        return length - self.canvas if self.causal else 0


class Ops(ABC):
    """What a backend must supply, and what it may."""

    name: ClassVar[str]
    device: Any = "cpu"
    dtype: DType
    """Width of weights and activations."""
    wide: DType
    """Width of norms, softmax and sampling: float32, and float64 in the oracle."""
    prefill_chunk: int = 512
    """Prompt tokens per encode pass: bounds the memory that attention scores take."""
    encode_sizes: tuple[int, ...] = ()
    """Lengths, ascending, that encode passes are compiled for, a shorter one padded; none: they run as they are."""
    lookahead: int = 0
    """Denoising passes that the engine starts before it reads what the one before them came to."""
    joined: bool = False
    """Whether a canvas is read in the next one's first pass, `model.encode_and_step`, not in a pass of its own."""
    reserves_cache: bool = False
    """Whether `new_cache` takes all of a cache's bytes at once from the host's memory."""
    maps_weights: bool = False
    """Whether weights stay views of the files that they came from."""
    survives_fork: ClassVar[bool] = False
    """Whether a forked child can go on with a model that its parent loaded: not where the runtime keeps threads."""

    # ---- Primitives -------------------------------------------------------------------------------------------

    @abstractmethod
    def asarray(self, x: Any, dtype: DType | None = None) -> Array:
        """Bring a NumPy array or Python numbers to the device, as `dtype` or in their own width."""

    @abstractmethod
    def to_numpy(self, x: Array) -> np.ndarray:
        """Bring an array to the host; bfloat16 arrives as float32."""

    @abstractmethod
    def cast(self, x: Array, dtype: DType) -> Array: ...

    @abstractmethod
    def reshape(self, x: Array, shape: Sequence[int]) -> Array: ...

    @abstractmethod
    def transpose(self, x: Array, axes: Sequence[int]) -> Array: ...

    @abstractmethod
    def concat(self, xs: Sequence[Array], axis: int) -> Array: ...

    @abstractmethod
    def split(self, x: Array, parts: int, axis: int) -> Sequence[Array]:
        """Cut into equal parts."""

    @abstractmethod
    def where(self, condition: Array, a: Array | float, b: Array | float) -> Array: ...

    @abstractmethod
    def take(self, x: Array, index: Array, axis: int) -> Array:
        """Pick along one axis with an index of any shape (`np.take`)."""

    @abstractmethod
    def take_along(self, x: Array, index: Array, axis: int) -> Array:
        """Pick along one axis, row by row; all other axes broadcast (`np.take_along_axis`)."""

    @abstractmethod
    def arange(self, n: int) -> Array:
        """Return int32 [n]."""

    @abstractmethod
    def matmul(self, a: Array, b: Array) -> Array: ...

    @abstractmethod
    def grouped_matmul(self, x: Array, w: Array, counts: Array) -> Array:
        """Multiply runs of rows by their own matrices.

        x [N, D] sorted by group, w [E, F, D], counts int32 [E] rows of each group, summing to N → [N, F] = x · wᵀ.
        """

    @abstractmethod
    def reduce(self, x: Array, how: Reduction, axis: int, keepdims: bool = False) -> Array:
        """Fold one axis; `argmax` gives int32 and the first of equals."""

    @abstractmethod
    def unary(self, x: Array, how: Unary) -> Array: ...

    @abstractmethod
    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        """Return the k largest along the last axis and their int32 indices, in any order."""

    @abstractmethod
    def argsort(self, x: Array) -> Array:
        """Return int32 indices that sort the last axis, stable."""

    @abstractmethod
    def cumsum(self, x: Array, axis: int) -> Array: ...

    # ---- Fused ops: the default bodies are in reference.py ----------------------------------------------------

    def embed(self, table: Array, tokens: Array, scale: float) -> Array:
        """Look up rows: table [V, D], tokens int32 [B, L] → [B, L, D], times `scale` rounded to the compute dtype."""
        return reference.embed(self, table, tokens, scale)

    def linear(self, x: Array, weight: Array) -> Array:
        """Return x [..., D] · weightᵀ, weight [F, D] as checkpoints store it."""
        return reference.linear(self, x, weight)

    def rms_norm(self, x: Array, weight: Array | None, eps: float) -> Array:
        """Root-mean-square norm over the last axis, computed wide; the weight multiplies as stored (no 1 + w)."""
        return reference.rms_norm(self, x, weight, eps)

    def norm_add(self, x: Array, residual: Array, weight: Array, eps: float) -> Array:
        """Return residual + rms_norm(x)."""
        return reference.norm_add(self, x, residual, weight, eps)

    def qkv_norm_rope(self, x: Array, attention: Attention, rope: Rope) -> tuple[Array, Array, Array]:
        """Project, norm and rotate: x [B, L, D] → q [B, H, L, A], k and v [B, K, L, A]."""
        return reference.qkv_norm_rope(self, x, attention, rope)

    def geglu(self, x: Array, gate: Array, up: Array) -> Array:
        """Return gelu_tanh(x · gateᵀ) · (x · upᵀ): x [..., D], gate and up [F, D] → [..., F]."""
        return reference.geglu(self, x, gate, up)

    def moe(self, h: Array, r: Array, router: Router, experts: Experts) -> Array:
        """Mixture of experts in one op, so that ordering and ties stay inside.

        h [B, L, D] is what the experts read, r [B, L, D] the raw residual that routes → [B, L, D].
        """
        return reference.moe(self, h, r, router, experts)

    def attention(self, q: Array, k: Array, v: Array, context: KV, span: Span) -> Array:
        """Attend over the cache and the query's own keys, kept apart; scale 1, softmax wide.

        q [B, H, L, A], k and v [B, K, L, A], context [B, K, S, A] → [B, L, H·A]. The cache's first `span.rows` rows
        come back bit-identical; a backend may use the rows beyond as scratch.
        """
        return reference.attention(self, q, k, v, context, span)

    def new_cache(self, batch: int, kv_heads: int, head_dim: int, capacity: int) -> KV:
        """Return an empty cache for at most `capacity` tokens, scratch for one canvas or chunk included."""
        return reference.new_cache(self, batch, kv_heads, head_dim)

    def cache_write(self, context: KV, k: Array, v: Array, span: Span, fresh: int | Array) -> KV:
        """Append the first `fresh` (int, or int32 [B]) rows of k and v [B, K, L, A].

        With a window only the newest `window − 1` rows are kept: all that any later query sees. The argument may be
        consumed; only the returned cache is valid.
        """
        return reference.cache_write(self, context, k, v, span, fresh)

    def layers(
        self, layers: Sequence[Layer], x: Array, ropes: Mapping[str, Rope], contexts: Sequence[KV],
        spans: Mapping[str, Span], fresh: int | Array | None,
    ) -> tuple[Array, tuple[KV, ...]]:  # fmt: skip
        """Run all layers of one pass: x [B, L, D] → x [B, L, D], and the caches.

        Ropes and spans are by layer kind. With `fresh` (see `cache_write`) each layer appends to its cache; None reads
        only, and the caches come back as they are.
        """
        return reference.layers(self, layers, x, ropes, contexts, spans, fresh)

    def logits(self, x: Array, table: Array, softcap: float) -> Array:
        """Return softcap · tanh(x · tableᵀ / softcap) in the wide dtype: x [B, L, D], table [V, D] → [B, L, V]."""
        return reference.logits(self, x, table, softcap)

    def mean_embedding(self, probabilities: Array, table: Array) -> Array:
        """Return the expected embedding, unscaled: wide [B, L, V] · table [V, D] → [B, L, D] in the compute dtype."""
        return reference.mean_embedding(self, probabilities, table)

    def vocab_head(
        self, x: Array, table: Array, softcap: float, temperature: Array, u: Array
    ) -> tuple[Array, Array, Array, Array]:
        """Attention over the embedding table: everything a denoising pass needs of the logits, and no logits.

        x [B, L, D], table [V, D], temperature wide [B, 1], u float32 [B, L] uniforms →
        sampled token int32 [B, L], argmax int32 [B, L], entropy in nats, wide [B, L], and the probabilities' mean
        embedding, unscaled, [B, L, D] in the compute dtype. Softmax, entropy and draw are wide.
        """
        return reference.vocab_head(self, x, table, softcap, temperature, u)

    def advance(
        self, sampler: Sampling, state: StepState, token: Array, argmax: Array, entropy: Array, soft: Array,
        noise: Array,
    ) -> StepState:  # fmt: skip
        """Accept, renoise and test whether the canvas is finished; see `core.sampler.advance`."""
        return sampling.advance(self, sampler, state, token, argmax, entropy, soft, noise)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a pure function of arrays (and tuples of them); the default runs it as it is.

        A backend may let the next call of the function overwrite what it returned, caches aside.
        """
        return function

    def thresholds(self, sampler: SamplerConfig) -> Sampling:
        """Return what compiled passes are given of a sampler's settings: constants, which tell one pass from another.

        A backend that would compile anew for each returns arrays.
        """
        return SamplerConfig(
            entropy_bound=sampler.entropy_bound, confidence=sampler.confidence, stability=sampler.stability
        )

    def extent(self, length: int) -> int | Array:
        """Return a context length as compiled functions take it: an int, or int32 [1] where a new int would retrace."""
        return length

    def fetch(self, *arrays: Array) -> Callable[[], list[np.ndarray]]:
        """Ask for arrays on the host; what comes back waits for them and returns them as they are now.

        On a backend that looks ahead the copies are made behind the work that is under way, and later passes may start.
        """
        return lambda: [self.to_numpy(x) for x in arrays]

    def run(self, work: Callable[[], Result]) -> Result:
        """Do some work that runs passes, such as getting an engine's next event; one call at a time.

        By default in the caller's thread. A backend whose runtime belongs to threads has one of its own.
        """
        return work()

    def guarded(self, doing: str) -> AbstractContextManager[None]:
        """Within, running out of memory releases what was taken and is a DgemmaError that says what would fit."""
        return nullcontext()

    def admit(self, config: ModelConfig, weight_bytes: Callable[[], int]) -> None:  # noqa: B027 - not on the CPU
        """Refuse, before anything is allocated, a model that will not fit; `weight_bytes` counts what its weights take.

        Raises:
            DgemmaError: with the numbers, and what would fit.
        """

    def synchronize(self, *arrays: Array) -> None:  # noqa: B027 - an eager backend has nothing to wait for
        """Wait until the arrays are computed."""

    def pack(self, weight: Any) -> Array:
        """Bring one stored weight to the device: a memory-mapped array in the file's own width, or a `QTensor` of such.

        By default a quantized weight is dequantized on the host; a backend that keeps it packed takes it in its ops.
        """
        return self.asarray(dense(weight, self.dtype), self.dtype)

    def prepare(self, part: Part) -> Part:
        """Lay out the weights of one packed `Attention` or `Mlp` together, as this backend wants them; same values."""
        return part

    def memory(self) -> int | None:
        """Return the peak bytes held on the accelerator, or None where the process's own peak says it."""
        return None

    def rounded(self, value: float) -> float:
        """Return a constant as the compute dtype would hold it: 53.066 is 53.0 in bfloat16."""
        return float(np.asarray(value, NUMPY_DTYPES[self.dtype]))


class Passes(ABC):
    """What a backend is, besides its ops, that runs a pass as a whole, from a graph written out before.

    `core/model.py` then hands the pass over instead of walking through the graph; its ops serve what is around it.
    """

    @abstractmethod
    def open(self, checkpoint: Checkpoint) -> None:
        """Get the graphs of a checkpoint ready, before its weights are packed.

        Raises:
            DgemmaError: there are none, and none can be made, or the runtime does not take them.
        """

    @abstractmethod
    def encode(self, cache: Cache, tokens: Array) -> Cache:
        """See `core.model.encode`; every row counts."""

    @abstractmethod
    def denoise(self, cache: Cache, canvas: Array, soft: Array) -> Array:
        """See `core.model.denoise`."""

    @abstractmethod
    def step(
        self, sampler: Sampling, cache: Cache, state: StepState, temperature: Array, uniforms: Array, noise: Array
    ) -> StepState:
        """See `core.model.step`."""
