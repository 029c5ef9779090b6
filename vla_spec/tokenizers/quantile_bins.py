"""Actions to OpenVLA's tokens: bins over what lay between the 1st and 99th percentile of the training data.

Token ids count the last ``num_bins`` ids of the text vocabulary from 0, in the order of these ids; a larger id is a
smaller value. As published, 256 bin edges lie evenly on [-1, 1], edges included, so there are 255 intervals, and the
two smallest ids both mean the highest one: what was exactly 1 (and a gripper mostly is) has an id of its own.
Source: Kim et al. 2024 (OpenVLA), arXiv:2406.09246.
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
    """Statistics of the data set that a model was trained on.

    Attributes:
        num_bins: V.
        q01, q99: [A] percentiles of each degree of freedom, in the robot's action units.
        mask: [A] whether it was normalised by them; False = the tokens' own [-1, 1], as for most grippers.
        unit: [A] physical size of one action unit [m, rad, ...], or one number for all.
    """

    num_bins: int = 256
    q01: tuple[float, ...] = (-1.0, -1.0, -1.0, -1.0)
    q99: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    mask: tuple[bool, ...] = (True, True, True, False)
    unit: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.num_bins < 3:
            raise BadConfig(f"num_bins is {self.num_bins}; valid: 3 or more")
        if not self.q01 or not len(self.q01) == len(self.q99) == len(self.mask):
            raise BadConfig(f"q01, q99 and mask are {self.q01}, {self.q99}, {self.mask}; valid: A numbers each")
        if not all(np.isfinite(a) and np.isfinite(b) and a <= b for a, b in zip(self.q01, self.q99, strict=True)):
            raise BadConfig(f"q01 is {self.q01} and q99 {self.q99}; valid: finite, q01 <= q99")
        if len(self.unit) not in (1, len(self.q01)) or min(self.unit) <= 0:
            raise BadConfig(f"unit is {self.unit}; valid: 1 or {len(self.q01)} positive numbers")


@final
class QuantileBins:
    """Token = bin of the normalised value; value = centre of the bin, un-normalised."""

    def __init__(self, options: Options) -> None:
        self._num_bins = options.num_bins
        self._edges = np.linspace(-1.0, 1.0, options.num_bins)
        self._centres = (self._edges[:-1] + self._edges[1:]) / 2
        mask = np.array(options.mask, bool)
        self._low = np.where(mask, np.asarray(options.q01, np.float64), -1.0)  # [A]
        self._high = np.where(mask, np.asarray(options.q99, np.float64), 1.0)  # [A]
        width = (self._high - self._low) / (options.num_bins - 1)
        self._physical_width = np.broadcast_to(width * np.asarray(options.unit, np.float64), width.shape)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._num_bins

    def encode(self, actions: Float32) -> Int32:
        """float32 [H, A] -> int32 [H * A], time-major. Values outside the range are clipped.

        All of the highest interval becomes the smallest id, which in training stood for its upper edge alone: values
        beyond the 99th percentile were clipped to it, so it is what a model says there.

        Raises:
            BadObservation: an action is NaN or has the wrong number of degrees of freedom.
        """
        values = checked_actions(actions, len(self._low))
        spread = self._high - self._low
        share = np.divide(values - self._low, spread, out=np.full_like(values, 0.5), where=spread > 0)
        normalised = np.clip(2 * share - 1, -1, 1)
        edge = np.digitize(normalised, self._edges)  # 1..num_bins
        edge[edge >= self._num_bins - 1] = self._num_bins
        return np.asarray(self._num_bins - edge, np.int32).reshape(-1)

    def decode(self, tokens: Int32) -> Float32:
        """int32 [m] -> float32 [m // A, A]: whole steps only, a started step is left out."""
        whole = whole_steps(tokens, len(self._low))  # [m // A, A]
        normalised = self._centres[self._interval(whole)]
        return np.asarray(0.5 * (normalised + 1) * (self._high - self._low) + self._low, np.float32)

    def distance(self, token: Int32, other: Int32, position: Int32) -> Float32:
        """Physical distance of two tokens at chunk positions ``position``; 0 between the two highest."""
        width = self._physical_width[position % len(self._low)]
        return np.asarray(np.abs(self._interval(token) - self._interval(other)) * width, np.float32)

    def _interval(self, tokens: Int32) -> Int32:
        return np.asarray(np.clip(self._num_bins - 1 - tokens, 0, self._num_bins - 2), np.int32)


def build(options: Options, parts: Parts | None = None) -> QuantileBins:
    """A tokenizer needs no other part."""
    return QuantileBins(options)
