"""What the numbers of one action mean for motion: limits, how to hold, how to stop, how to bound a guess.

DELTA: hold is 0; a decelerating stop shrinks the increment that was sent last linearly to 0.
POSITION: hold is the last one again; a stop goes on in its direction by increments that shrink linearly to 0.
VELOCITY: hold is the last one again; a stop shrinks it linearly to 0.
SWITCH: the last one again, always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from vla_spec.errors import BadConfig
from vla_spec.types import Bool, Float32


class DofKind(IntEnum):
    """What one degree of freedom's number asks for."""

    DELTA = 0  # move by so much in this control step; standing still is 0
    POSITION = 1  # be there; standing still is the last value again
    VELOCITY = 2  # move at this speed until told otherwise; standing still has to be reached by slowing down
    SWITCH = 3  # a gripper or another state that has nothing to do with motion; kept


@dataclass(frozen=True, slots=True)
class ActionSpace:
    """Limits and kinds of one action's A numbers.

    Attributes:
        low, high: float32 [A], absolute limits.
        kinds: one per degree of freedom.
        max_change: float32 [A], largest change from one control step to the next that an *unverified* action may
            make. Too small: a guessed tail lags behind the plan; too large: it may jerk.
        rest: float32 [A], what a hold sends for POSITION and SWITCH before anything was sent.
        stop_steps: control steps over which the decelerating stop brings motion to zero.
    """

    low: Float32
    high: Float32
    kinds: tuple[DofKind, ...]
    max_change: Float32
    rest: Float32
    stop_steps: int = 8

    @staticmethod
    def from_limits(
        low: Float32,
        high: Float32,
        switches: Sequence[int] = (),
        kind: DofKind = DofKind.DELTA,
        max_change: float | Float32 | None = None,
        stop_steps: int = 8,
    ) -> ActionSpace:
        """All degrees of freedom of one kind, except the switches.

        Args:
            low: float32 [A].
            high: float32 [A], above ``low``.
            switches: indices of grippers and the like.
            kind: of all others.
            max_change: scalar or [A], in action units per step; None = a quarter of the range.
            stop_steps: see `ActionSpace`.

        Raises:
            BadConfig: limits that contradict each other, or an index that does not exist.
        """
        low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
        if low.ndim != 1 or low.shape != high.shape or not (low < high).all():
            raise BadConfig(f"action limits: low {low} must be below high {high}, one number per degree of freedom")
        bad = [i for i in switches if not 0 <= i < len(low)]
        if bad:
            raise BadConfig(f"action switches: {bad} do not exist; valid: 0..{len(low) - 1}")
        if stop_steps < 1:
            raise BadConfig(f"stop_steps is {stop_steps}; valid: 1 or more")
        kinds = tuple(DofKind.SWITCH if i in switches else kind for i in range(len(low)))
        change = np.float32(0.25) * (high - low) if max_change is None else np.asarray(max_change, np.float32)
        if not (change > 0).all():
            raise BadConfig(f"max_change is {change}; valid: more than 0")
        rest = np.clip(np.zeros_like(low), low, high)
        return ActionSpace(low, high, kinds, np.broadcast_to(change, low.shape).astype(np.float32), rest, stop_steps)

    @property
    def size(self) -> int:
        """A."""
        return len(self.kinds)

    def mask(self, *kinds: DofKind) -> Bool:
        """Bool [A], True where the degree of freedom is of one of these kinds."""
        return np.array([kind in kinds for kind in self.kinds])

    def clip(self, actions: Float32) -> Float32:
        """Into the absolute limits; [..., A]."""
        return np.clip(actions, self.low, self.high).astype(np.float32)

    def hold(self, last: Float32 | None) -> Float32:
        """What holds still, float32 [A]: DELTA zero, POSITION and SWITCH as last sent, VELOCITY as last sent.

        A VELOCITY goes on because a hold bridges a gap of a few steps; `stop` follows when the gap gets longer.
        ``last`` None: nothing was sent yet.
        """
        if last is None:
            return self.rest.copy()
        return np.where(self.mask(DofKind.DELTA), self.clip(np.zeros_like(last)), last).astype(np.float32)

    def stop(self, last: Float32 | None, num_steps: int, before: Float32 | None = None) -> Float32:
        """The decelerating stop, ``num_steps`` >= 0 steps after it began; float32 [A], within the limits.

        Speed falls linearly to zero within `stop_steps`. An arm that held before it stops stands still at once: its
        last increment is zero. SWITCH is as in `hold`.

        Args:
            last: float32 [A], the command before the stop began; None = nothing was sent yet.
            num_steps: since the stop began.
            before: float32 [A], the command before ``last``: their difference, `max_change` at most, is how fast a
                POSITION moves. None = it stands.
        """
        if last is None:
            return self.hold(None)
        k, n = min(num_steps + 1, self.stop_steps), self.stop_steps
        left = np.float32(1.0 - k / n)
        travelled = np.float32(k - k * (k + 1) / (2 * n))  # sum of the speeds so far, in units of the first
        motion = np.zeros_like(last) if before is None else np.clip(last - before, -self.max_change, self.max_change)
        stopped = np.where(self.mask(DofKind.DELTA, DofKind.VELOCITY), last * left, last)
        stopped = np.where(self.mask(DofKind.POSITION), last + motion * travelled, stopped)
        return self.clip(stopped)

    def limit_change(self, action: Float32, before: Float32) -> Float32:
        """``action`` within `max_change` of ``before`` and inside the limits, switches as they are; float32 [A]."""
        near = np.clip(action, before - self.max_change, before + self.max_change)
        return self.clip(np.where(self.mask(DofKind.SWITCH), action, near))

    def bound(self, rows: Float32, before: Float32 | None, slowdown: float = 1.0) -> Float32:
        """Make unverified actions harmless: slower and slower, no jumps, inside the limits, no switching.

        Row i's motion is scaled by ``slowdown ** (i + 1)`` (the increments, for POSITION), then held within
        `max_change` of the row before and inside the absolute limits. Switches keep the value of ``before``.

        Args:
            rows: float32 [n, A].
            before: float32 [A], the last trusted action; None = there is none, the first row may be anything allowed
                and switches follow it.
            slowdown: in (0, 1]; 1 = full speed. Small: the robot waits for the next plan; large: it trusts the guess.

        Returns:
            float32 [n, A]; bounded rows change at most `max_change` even where slowing down alone would change more.
        """
        bounded = self.clip(rows)
        is_switch, is_position = self.mask(DofKind.SWITCH), self.mask(DofKind.POSITION)
        previous_row, previous = before, before
        for i in range(len(bounded)):
            raw, factor = bounded[i].copy(), np.float32(slowdown ** (i + 1))
            if previous is None or previous_row is None:
                row = np.where(is_switch | is_position, raw, raw * factor)
            else:
                row = np.where(is_position, previous + factor * (raw - previous_row), raw * factor)
                row = np.clip(row, previous - self.max_change, previous + self.max_change)
                row = np.where(is_switch, previous, row)
            bounded[i] = np.clip(row, self.low, self.high)
            previous_row, previous = raw, bounded[i].copy()
        return bounded
