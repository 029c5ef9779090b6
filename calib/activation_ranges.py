"""How large an activation gets: a histogram of magnitudes, and where to cut it off for eight bits.

Source: Wu et al. 2020, arXiv:2004.09602 (percentile calibration); Sung et al. 2015, arXiv:1511.06488 (least squares).
"""

from __future__ import annotations

from typing import Any, final

import numpy as np
import numpy.typing as npt

from vla_spec.errors import BadConfig, BadModel
from vla_spec.types import Float32

#: One bin per value of a float's upper 15 bits below the sign, which is a bfloat16: 128 bins per power of two.
NUM_BINS = 1 << 15
_FIRST_NOT_FINITE = 0xFF << 7
_EDGES = (np.arange(_FIRST_NOT_FINITE + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
_EDGES[-1] = np.float64(np.finfo(np.float32).max)
_CENTRES = (_EDGES[:-1] + _EDGES[1:]) / 2
#: Name of a method besides percentiles.
MSE, MAX = "mse", "max"
#: Methods of nvidia-modelopt, which has its own eyes on the activations.
LIBRARY_METHODS = ("modelopt-max", "modelopt-entropy")
#: Steps of int8 from zero to the cut-off.
_STEPS = 127
#: Fractions of the largest magnitude that least squares tries.
_FRACTIONS = np.linspace(0.1, 1.0, 91)


@final
class Magnitudes:
    """Magnitudes that one tensor [k, width] took. Not thread-safe.

    Bins are as wide as 0.4 to 0.8 % of their value, whatever the range, so nothing has to be known beforehand, the
    order of calls does not matter, and a percentile is right to 0.8 %.

    Args:
        name: of the tensor, for errors.
        width: of its rows.
    """

    def __init__(self, name: str, width: int) -> None:
        self.name = name
        #: int64 [NUM_BINS]
        self.counts: npt.NDArray[np.int64] = np.zeros(NUM_BINS, np.int64)
        #: float32 [width], largest magnitude of each channel.
        self.channel_max: Float32 = np.zeros(width, np.float32)
        #: Exactly.
        self.largest = 0.0

    def add(self, values: Float32) -> None:
        """Count the values of a call, float32 [k, width].

        Raises:
            BadModel: one of them is not finite.
        """
        magnitudes = np.abs(np.ascontiguousarray(values, np.float32))
        bins = magnitudes.view(np.uint32).reshape(-1) >> np.uint32(16)
        if not len(bins):
            return
        if bins.max() >= _FIRST_NOT_FINITE:
            row = int(np.argmax(~np.isfinite(magnitudes).all(1)))
            raise BadModel(
                f"{self.name}: not a finite number in row {row} of an observation; nothing can be calibrated"
            )
        self.counts += np.bincount(bins, minlength=NUM_BINS)
        np.maximum(self.channel_max, magnitudes.max(0), out=self.channel_max)
        self.largest = max(self.largest, float(magnitudes.max()))

    def clip(self, method: str) -> float:
        """Largest magnitude to represent.

        Args:
            method: "max", "mse" (least squared error of clipping and rounding), or a percentile such as "99.99".
                Those of `LIBRARY_METHODS` are not for here.

        Raises:
            BadConfig: another word, or a percentile outside of (0, 100].
            BadModel: nothing but zeros was seen.
        """
        check_method(method)
        assert method not in LIBRARY_METHODS, method
        if self.largest == 0:
            raise BadModel(f"{self.name}: nothing but zeros in all observations; nothing can be calibrated")
        if method == MAX:
            return self.largest
        if method == MSE:
            return self._least_squares()
        cumulated = np.cumsum(self.counts)
        wanted = float(method) / 100 * cumulated[-1]
        upper = _EDGES[int(np.searchsorted(cumulated, wanted)) + 1]
        return float(min(upper, self.largest))

    def _least_squares(self) -> float:
        """Rounding costs a twelfth of a squared step, or the value where it becomes zero; clipping what is cut off."""
        present = np.flatnonzero(self.counts[:_FIRST_NOT_FINITE])
        values, counts = _CENTRES[present], self.counts[present]
        values = np.minimum(values, self.largest)
        clips = self.largest * _FRACTIONS
        errors = []
        for clip in clips:
            step = clip / _STEPS
            rounding = np.where(values < step / 2, values**2, step**2 / 12)
            errors.append(float((counts * np.where(values > clip, (values - clip) ** 2, rounding)).sum()))
        return float(clips[int(np.argmin(errors))])

    def summary(self) -> dict[str, Any]:
        """How far outliers stand out: the largest magnitude over the median channel's largest."""
        middle = float(np.median(self.channel_max))
        return {"largest": self.largest, "outlier_ratio": self.largest / middle if middle > 0 else None}


def check_method(method: str) -> None:
    """Raises BadConfig for a method that does not exist."""
    if method in (MSE, MAX, *LIBRARY_METHODS):
        return
    try:
        value = float(method)
    except ValueError:
        value = float("nan")
    if not 0 < value <= 100:
        raise BadConfig(
            f"range {method!r}: valid: {MAX}, {MSE}, a percentile in (0, 100] such as 99.99, or "
            f"{', '.join(LIBRARY_METHODS)}"
        )


def migration_factor(channel_max: Float32, weights: Float32, strength: float) -> Float32:
    """By what to divide each channel of an activation so that outliers move into the weights behind it.

    Args:
        channel_max: float32 [width], largest magnitude of each channel.
        weights: float32 [width_out, width], of all products that read it.
        strength: alpha of the paper: 0 = all difficulty stays, 1 = all of it goes into the weights.

    Returns:
        float32 [width], of geometric mean 1.

    Source: Xiao et al. 2023, arXiv:2211.10438, equation 4.
    """
    floor = 1e-5
    activation = np.maximum(channel_max, floor).astype(np.float64)
    weight = np.maximum(np.abs(weights).max(0), floor).astype(np.float64)
    logarithm = strength * np.log(activation) - (1 - strength) * np.log(weight)
    factor: Float32 = np.exp(logarithm - logarithm.mean()).astype(np.float32)
    return factor
