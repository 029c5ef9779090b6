"""Tighten the tolerance where the arm is slow, turns or revises its plan; may leave the rest of a chunk to the drafter.

Wraps another controller, which goes on to size drafts and to watch the deadline. A contact is not observed: an arm that
is about to touch something moves slowly, and that is what the schedules look at.
Sources: KERV, arXiv:2603.01581 (schedules `time` and `revision`, completion without another pass); HeiSD,
arXiv:2603.17573 (schedule `boundary`, verify-skip). `speed` and `curvature` are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, final

from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory, DeadlineController
from vla_spec.kinematics import Motion, PlayedSteps, boundary, speeds, straightness
from vla_spec.plugins import Parts
from vla_spec.types import LEAVE_REST, Plan, Round

Schedule = Literal["speed", "curvature", "boundary", "time", "revision"]


@dataclass(frozen=True, slots=True)
class Options:
    """A schedule from ``least`` to 1, the base controller, and how often it may do without verifying.

    Attributes:
        base: the controller that sizes drafts: a name, or ``{name: ..., options}``. Its tolerance is multiplied.
        schedule: `speed`: planned speed between ``slow`` and ``fast``. `curvature`: the same, times how straight the
            plan is. `boundary`: HeiSD's F of the last ``window`` steps. `time`: KERV's released code, loose at first
            and tight later in the episode. `revision`: KERV's paper, tight where new chunks correct old ones.
        least: tolerance of the tight end, as a share of the base controller's; also where nothing is known of the
            motion yet (the first chunk of an episode), except for `time`. KERV: 3 of 15 bins.
        is_delta: actions are increments; False = positions.
        slow, fast: speed of the tight and of the loose end; the defaults are the 5th percentile and the median over the
            shipped policy's demonstrations. [physical unit per control step]
        window: steps that `boundary` looks back over. HeiSD: 15.
        radius, length: mean radius and path length of the window that count as 1 in `boundary`; the defaults are the
            95th percentiles over the same demonstrations, as HeiSD takes them. [physical unit]
        radius_share: weight of the radius in F, the rest is the path length's. HeiSD: 0.5.
        duration: steps until `time` is at its tight end; KERV: 220 to 300, an episode.
        revised: revision at which `revision` has fallen to 1/e of its range. [physical unit, L1 over steps]
        sharpness: exponent phi of `revision`.
        leave_steps: control steps at the chunk's end that may be left to the drafter, unverified; 0 = none. KERV: 1.
            The policy bounds such a tail and labels it DRAFTED.
        leave_after: rounds behind the prefill before that; at least 1. KERV: 1.
        leave_pause: chunks that are verified whole between two that are not; at least 1. KERV: 4.
        leave_above: leave only where the schedule is at least this; 1 = at its loose end only. [0..1]
    """

    base: str | dict[str, Any] = "fixed"
    schedule: Schedule = "speed"
    least: float = 0.2
    is_delta: bool = True
    slow: float = 0.003
    fast: float = 0.010
    window: int = 15
    radius: float = 0.062
    length: float = 0.25
    radius_share: float = 0.5
    duration: int = 200
    revised: float = 0.004
    sharpness: float = 1.0
    leave_steps: int = 0
    leave_after: int = 1
    leave_pause: int = 4
    leave_above: float = 0.0

    def __post_init__(self) -> None:
        from vla_spec.config import resolve_choice

        if resolve_choice("controller", self.base, "base").name == "kinematic":
            raise BadConfig("base must be a controller that sizes drafts, got kinematic itself")
        for name in ("least", "radius_share", "leave_above"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise BadConfig(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("radius", "length", "revised", "sharpness", "window", "duration", "leave_after", "leave_pause"):
            if not getattr(self, name) > 0:
                raise BadConfig(f"{name} must be more than 0, got {getattr(self, name)}")
        if not 0.0 <= self.slow < self.fast:
            raise BadConfig(f"need 0 <= slow < fast, got {self.slow} and {self.fast}")
        if self.leave_steps < 0:
            raise BadConfig(f"leave_steps must be 0 or more, got {self.leave_steps}")


@final
class KinematicController:
    """``tolerance = base's tolerance * (least + (1 - least) * looseness)``, looseness in [0, 1] set once per chunk.

    - speed: ``clip((v - slow) / (fast - slow))``, v = mean speed that the previous chunk had planned for the steps
      that the new one is about (of its last steps, if none are left).
    - curvature: that, times distance between the plan's ends / its length.
    - boundary: ``share * min(R / radius, 1) + (1 - share) * min(D / length, 1)`` of the last steps played.
    - time: ``exp(-(step / tau)^3)``, ``tau = duration / ln(1e30)^(1/3)``.
    - revision: ``exp(-(K / revised)^sharpness)``, K = L1 distance of the last two plans where they overlap.

    A chunk without history begins a new motion: what was remembered of the old one is forgotten.
    """

    def __init__(self, options: Options, base: DeadlineController, motion: Motion, tokens_per_step: int) -> None:
        self._options, self._base = options, base
        self._most_left = options.leave_steps * tokens_per_step
        self._played = PlayedSteps(motion, tokens_per_step, options.window)
        self._since_left = options.leave_pause  # chunks verified whole since one was left
        self._num_rounds = 0  # behind the prefill of this chunk
        self._may_leave = self._has_left = False
        #: Of the current chunk, in [0, 1]; and how many chunks were left to the drafter since construction.
        self.looseness = 0.0
        self.num_left = 0

    @property
    def base(self) -> DeadlineController:
        """The controller that sizes drafts."""
        return self._base

    def begin(self, remaining_ns: int, history: ChunkHistory | None = None) -> bool:
        """Look at the motion, once; then whatever the base controller says."""
        options = self._options
        self._played.update(history)
        self.looseness = self._looseness(history is not None)
        if self._has_left:
            self._since_left = 0
        elif self._num_rounds > 0:
            self._since_left += 1
        self._has_left = False
        self._num_rounds = -1  # the prefill comes first
        self._may_leave = (
            self._most_left > 0
            and history is not None
            and self._since_left >= options.leave_pause
            and self.looseness >= options.leave_above
        )
        return self._base.begin(remaining_ns, history)

    def plan(self, remaining_ns: int, tokens_left: int) -> Plan | None:
        """The base controller's plan with a tighter tolerance, or `LEAVE_REST`."""
        plan = self._base.plan(remaining_ns, tokens_left)
        if plan is None or plan.gamma < 0:
            return plan
        if self._may_leave and tokens_left <= self._most_left and self._num_rounds >= self._options.leave_after:
            self._has_left = True
            self.num_left += 1
            return LEAVE_REST
        least = self._options.least
        return plan._replace(tolerance=plan.tolerance * (least + (1.0 - least) * self.looseness))

    def record(self, measured: Round) -> None:
        """Count, and tell the base controller."""
        self._num_rounds += 1
        self._base.record(measured)

    def _looseness(self, is_known: bool) -> float:
        options, played = self._options, self._played
        if options.schedule == "time":
            tau = options.duration / math.log(1e30) ** (1 / 3)
            return math.exp(-((played.num_steps / tau) ** 3))
        if not is_known:
            return 0.0
        if options.schedule == "boundary":
            return boundary(played.increments, options.radius, options.length, options.radius_share)
        if options.schedule == "revision":
            if played.revision is None:
                return 0.0
            return math.exp(-((played.revision / options.revised) ** options.sharpness))
        planned = played.planned
        if not len(planned):
            return 0.0
        loose = min(max((float(speeds(planned).mean()) - options.slow) / (options.fast - options.slow), 0.0), 1.0)
        return loose * straightness(planned) if options.schedule == "curvature" else loose


def build(options: Options, parts: Parts) -> KinematicController:
    """Needs what the base controller needs, the domain's switches and the tokenizer's unit."""
    from vla_spec.config import load_plugin, resolve_choice

    choice = resolve_choice("controller", options.base, "controller.base")
    base: DeadlineController = load_plugin("controller", choice.name).build(choice.options, parts)
    motion = Motion(parts.domain, parts.tokenizer, options.is_delta)
    return KinematicController(options, base, motion, parts.domain.tokens_per_step)
