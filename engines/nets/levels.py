"""Action levels: which of the 256 bins a demonstration's action is rounded to, and the soft label that teaches it.

The scripted experts are proportional controllers: what matters in an action is its relative size. So labels are
rounded to 35 of the 256 bins whose spacing grows with the magnitude: two bins near zero, about a fifth of the magnitude
further out. Bin b means (b - 128) / 127, so that 0 and +-1 are exact.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NUM_BINS = 256
ZERO_BIN = 128
HALF = 127
#: Range of a uniform 256-bin tokenizer whose bin b has its centre at (b - 128) / 127.
TOKENIZER_LOW, TOKENIZER_HIGH = -128.5 / HALF, 127.5 / HALF

_POSITIVE = (2, 4, 6, 8, 11, 14, 18, 22, 27, 33, 40, 48, 58, 70, 84, 103, 127)
LEVEL_BINS = np.array([ZERO_BIN - d for d in reversed(_POSITIVE)] + [ZERO_BIN] + [ZERO_BIN + d for d in _POSITIVE])
SIGMA = 0.6  # of the soft label, in levels


def level_position(actions: np.ndarray) -> np.ndarray:
    """Actions in [-1, 1] -> fractional index into `LEVEL_BINS`."""
    return np.interp(actions * HALF + ZERO_BIN, LEVEL_BINS, np.arange(len(LEVEL_BINS)))


def tokens_from_actions(actions: np.ndarray) -> np.ndarray:
    """Actions in [-1, 1] -> the nearest level's bin, int64."""
    return LEVEL_BINS[np.rint(level_position(actions)).astype(int)]


def soft_cross_entropy(logits: Tensor, position: Tensor) -> Tensor:
    """Mean cross-entropy against a Gaussian over levels. logits [..., 256], position [...] fractional level index."""
    levels = torch.arange(len(LEVEL_BINS), dtype=torch.float32)
    label = torch.softmax(-0.5 * ((position[..., None] - levels) / SIGMA) ** 2, -1)
    logits = logits.float()
    logp = logits[..., torch.from_numpy(LEVEL_BINS)] - torch.logsumexp(logits, -1, keepdim=True)
    return -(label * logp).sum(-1).mean()
