"""What is the time left worth, and how should it be spent? A table over tokens decoded and time left.

Finite-horizon dynamic programming (Bellman 1957): the value of a moment is the best, over draft lengths, of the tokens
expected from the next round plus the value of the moment after it. One row per number of decoded tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import numpy.typing as npt

#: In place of an action: no round fits.
NOTHING = 255

Float64 = npt.NDArray[np.float64]


@final
class Lookahead:
    """Rows are updated one by one, outside of the rounds; asking is one look into a table.

    ``value[m, t] = max over actions that fit of E[gained + value[m + gained, t - cost]]``, with a whole chunk worth
    ``bonus`` and a little for the time that is left then, so that of two ways to finish the faster one is taken.
    """

    def __init__(self, num_tokens: int, bin_ns: float, num_bins: int, bonus: float, hurry: float) -> None:
        """An empty table: every row needs an `update`, from the last token to the first.

        Args:
            num_tokens: T.
            bin_ns: width of a time bin. [ns]
            num_bins: more time than this is as good as the last bin.
            bonus: extra worth of a whole chunk. [tokens]
            hurry: worth of one bin's time when the chunk is whole; small. [tokens]
        """
        self._num_tokens, self._bin_ns, self._num_bins = num_tokens, bin_ns, num_bins
        self._value = np.zeros((num_tokens + 1, num_bins), np.float32)
        self._value[num_tokens] = bonus + hurry * np.arange(num_bins)
        self._choice = [bytes([NOTHING]) * num_bins for _ in range(num_tokens + 1)]
        self._gained = np.arange(1, num_tokens + 1, dtype=np.float32)[:, None]

    def update(
        self, m: int, kinds: Sequence[tuple[int, Float64]], cost_ns: Sequence[float], need_ns: Sequence[float]
    ) -> None:
        """Compute one row from the rows after it.

        Args:
            m: tokens decoded, 1 <= m < T.
            kinds: per kind of draft, its first action (the depths 0, 1, ... of one kind are consecutive actions) and
                its survival, float64 [depths]; no draft may reach beyond the chunk's last token but one.
            cost_ns: what each action's round is expected to take. [ns]
            need_ns: how much time must be left to start it. [ns]
        """
        bins, width = self._num_bins, self._bin_ns
        best = np.zeros(bins, np.float32)
        choice = np.full(bins, NOTHING, np.uint8)
        for first, survival in kinds:
            depths = len(survival)
            after = self._value[m + 1 : m + 1 + depths] + self._gained[:depths]  # [depths, bins] if so many are gained
            expected = after[0].copy()
            more = (after[1:] - after[:-1]) * survival[1:, None].astype(np.float32)
            reached = np.full((depths, bins), -1.0, np.float32)
            for depth in range(depths):
                if depth:
                    expected += more[depth - 1]
                start = int(need_ns[first + depth] / width)  # whoever asks has the exact time and sees if it fits
                spent = min(int(cost_ns[first + depth] / width + 0.5), start)
                if start < bins:
                    reached[depth, start:] = expected[start - spent : bins - spent]
            longest = reached.argmax(axis=0)
            of_kind = reached.max(axis=0)
            is_better = of_kind > best
            np.copyto(best, of_kind, where=is_better)
            np.copyto(choice, (first + longest).astype(np.uint8), where=is_better)
        self._value[m] = best
        self._choice[m] = choice.tobytes()

    def choice(self, m: int, bin_index: int) -> int:
        """The best action with so many bins of time left, or `NOTHING`."""
        return self._choice[m][bin_index]

    def value(self, m: int, bin_index: int) -> float:
        """Expected tokens from here on, the bonus and the worth of time included."""
        return float(self._value[m, bin_index])
