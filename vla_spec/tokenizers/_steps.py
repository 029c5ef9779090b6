"""What tokenizers of one token per degree of freedom share: rows of A numbers, checked; whole steps of tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vla_spec.errors import BadObservation
from vla_spec.types import Float32, Int32


def checked_actions(actions: Float32, num_dofs: int) -> npt.NDArray[np.float64]:
    """float64 [H, A].

    Raises:
        BadObservation: an action is NaN or has the wrong number of degrees of freedom.
    """
    values = np.asarray(actions, np.float64)
    if values.ndim != 2 or values.shape[1] != num_dofs:
        raise BadObservation("actions", f"of shape {values.shape}", f"[H, {num_dofs}]")
    if np.isnan(values).any():
        raise BadObservation("actions", "NaN", "numbers")
    return values


def whole_steps(tokens: Int32, num_dofs: int) -> Int32:
    """int32 [m] -> [m // A, A]; a started step is left out."""
    return tokens[: len(tokens) // num_dofs * num_dofs].reshape(-1, num_dofs)
