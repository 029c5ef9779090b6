"""What a decoder looks like: everything that is needed to write its graph and to run it, and nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from vla_spec.errors import BadModel

#: Most tokens of one step unless an export says otherwise: as many rows lie behind the capacity for trees.
MAX_STEP = 32


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """Sizes and choices of one decoder.

    Attributes:
        num_layers, num_heads, head_width: of the transformer.
        num_kv_heads: fewer than num_heads = grouped queries (Ainslie et al. 2023, arXiv:2305.13245).
        hidden_width: D.
        mlp_width: hidden units of the feed-forward part.
        vocab_size: V, tokens that may occur; the head is sliced to them.
        capacity: most committed cache rows, prompt included.
        max_step: most tokens of one step; so many cache rows behind the capacity are scratch.
        norm: "layer", or "rms" (Zhang and Sennrich 2019, arXiv:1910.07467).
        norm_epsilon: of all norms.
        mlp: "gelu" with biases, or "silu_gated" without (SwiGLU, Shazeer 2020, arXiv:2002.05202).
        rope_theta: base of rotary positions (Su et al. 2021, arXiv:2104.09864); None = positions are learned and part
            of the embeddings.
        taps: numbers of layers after which the hidden state goes into the features.
        prompt_attention: "full" (prefix-LM) or "causal".
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    hidden_width: int
    mlp_width: int
    vocab_size: int
    capacity: int
    max_step: int = MAX_STEP
    norm: Literal["layer", "rms"] = "layer"
    norm_epsilon: float = 1e-5
    mlp: Literal["gelu", "silu_gated"] = "gelu"
    rope_theta: float | None = None
    taps: tuple[int, ...] = ()
    prompt_attention: Literal["full", "causal"] = "causal"

    @property
    def rows(self) -> int:
        """R, cache rows: the committed ones and the scratch behind them."""
        return self.capacity + self.max_step

    @property
    def feature_width(self) -> int:
        """F, width of what drafters read: the taps and the normalised last hidden state."""
        return self.hidden_width * (len(self.taps) + 1)

    @property
    def state_names(self) -> list[str]:
        """Names of the cache tensors as graph inputs, in the order of the state."""
        return [f"past_{kind}_{i}" for i in range(self.num_layers) for kind in ("key", "value")]

    @property
    def new_state_names(self) -> list[str]:
        """Names of the same tensors as graph outputs."""
        return [name.replace("past", "present") for name in self.state_names]

    @property
    def state_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of all cache tensors together: [2 * layers, 1, kv heads, R, head_width]."""
        return 2 * self.num_layers, 1, self.num_kv_heads, self.rows, self.head_width

    def to_json(self) -> dict[str, Any]:
        """As stored in engine.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: object, where: str) -> DecoderSpec:
        """Inverse of `to_json`.

        Raises:
            BadModel: unknown, missing or impossible values; names them.
        """
        if not isinstance(values, dict):
            raise BadModel(f"{where}: the decoder's description is {values!r}; valid: an object")
        known = {f.name for f in fields(cls)}
        try:
            spec = cls(**{**values, "taps": tuple(values.get("taps", ()))})
            wrong = [f.name for f in fields(cls) if not _is_valid(f.name, getattr(spec, f.name))]
        except TypeError as error:
            unknown = sorted(set(values) - known)
            raise BadModel(f"{where}: unknown {unknown}, or values are missing ({error})") from error
        if wrong or spec.num_heads % spec.num_kv_heads or any(not 0 < tap <= spec.num_layers for tap in spec.taps):
            raise BadModel(f"{where}: impossible decoder ({wrong or [spec.num_heads, spec.num_kv_heads, spec.taps]})")
        return spec


_CHOICES = {"norm": ("layer", "rms"), "mlp": ("gelu", "silu_gated"), "prompt_attention": ("full", "causal")}


def _is_valid(name: str, value: object) -> bool:
    if name in _CHOICES:
        return value in _CHOICES[name]
    if name == "taps":
        return isinstance(value, tuple) and all(isinstance(tap, int) for tap in value)
    if name == "rope_theta":
        return value is None or (isinstance(value, int | float) and value > 0)
    if name == "norm_epsilon":
        return isinstance(value, float) and 0 < value < 1
    return isinstance(value, int) and value > 0
