"""Actions to tokens by uniform bins, one token per degree of freedom, and back to the bins' centres.

Source: Brohan et al. 2022 (RT-1), arXiv:2212.06817; Kim et al. 2024 (OpenVLA), arXiv:2406.09246.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from vla_spec.errors import BadConfig
from vla_spec.plugins import Parts
from vla_spec.tokenizers._steps import checked_actions, whole_steps
from vla_spec.types import Float32, Int32


@dataclass(frozen=True, slots=True)
class Options:
    """Uniform bins.

    Attributes:
        vocab_size: V, bins per degree of freedom.
        low, high: [A] range of each degree of freedom, in the robot's action units; the default is the box [-1, 1]^4.
        unit: [A] physical size of one action unit [m, rad, ...], or one number for all; 1 = actions are physical.
    """

    vocab_size: int = 256
    low: tuple[float, ...] = (-1.0, -1.0, -1.0, -1.0)
    high: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    unit: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise BadConfig(f"vocab_size must be at least 2, got {self.vocab_size}")
        if not self.low or len(self.low) != len(self.high):
            raise BadConfig(f"low and high need one number per degree of freedom, got {self.low} and {self.high}")
        if not all(np.isfinite(lo) and np.isfinite(hi) and lo < hi for lo, hi in zip(self.low, self.high, strict=True)):
            raise BadConfig(f"low must lie below high everywhere, got {self.low} and {self.high}")
        if len(self.unit) not in (1, len(self.low)) or min(self.unit) <= 0:
            raise BadConfig(f"unit needs 1 or {len(self.low)} positive numbers, got {self.unit}")


@final
class UniformBins:
    """Token = index of the bin that holds the value; value = centre of the bin; error at most half a bin."""

    def __init__(self, options: Options) -> None:
        self._vocab_size = options.vocab_size
        self._low = np.asarray(options.low, np.float64)  # [A]
        self._high = np.asarray(options.high, np.float64)  # [A]
        self._width = (self._high - self._low) / options.vocab_size  # [A]
        physical = self._width * np.asarray(options.unit, np.float64)  # [A]
        self._physical_width = physical.astype(np.float32)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._vocab_size

    def encode(self, actions: Float32) -> Int32:
        """float32 [H, A] -> int32 [H * A], time-major. Values outside the range are clipped.

        Raises:
            BadObservation: an action is NaN or has the wrong number of degrees of freedom.
        """
        values = checked_actions(actions, len(self._low))
        inside = np.clip(values, self._low, self._high)
        bins = ((inside - self._low) / self._width).astype(np.int32)  # [H, A]
        return np.minimum(bins, self._vocab_size - 1).reshape(-1)

    def decode(self, tokens: Int32) -> Float32:
        """int32 [m] -> float32 [m // A, A]: whole steps only, a started step is left out."""
        whole = whole_steps(tokens, len(self._low))  # [m // A, A]
        return (self._low + (whole + 0.5) * self._width).astype(np.float32)

    def distance(self, token: Int32, other: Int32, position: Int32) -> Float32:
        """Physical distance of two tokens at chunk positions ``position``; degree of freedom = position modulo A."""
        width: Float32 = self._physical_width[position % len(self._low)]
        return np.asarray(np.abs(token - other) * width, np.float32)


def build(options: Options, parts: Parts | None = None) -> UniformBins:
    """A tokenizer needs no other part."""
    return UniformBins(options)
