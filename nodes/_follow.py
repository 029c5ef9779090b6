"""Following an instruction until done or timeout: one goal at a time, with feedback and a way out. No ROS in here.

What a ROS action does, on two topics: an action needs a type of its own, and no package of standard messages has one
with words in its goal (docs/decisions/0031-ros-nodes.md). States have the names of `action_msgs/GoalStatus`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, final

from vla_spec.clock import NS_PER_S
from vla_spec.errors import BadObservation

#: A goal without this key has this much time [s].
DEFAULT_TIMEOUT_S = 60.0
MAX_TIMEOUT_S = 86_400.0
MAX_CHARS = 10_000


@dataclass(frozen=True, slots=True)
class Goal:
    """What to follow.

    Attributes:
        goal_id: the client's own name for it; comes back in every feedback.
        instruction: words.
        timeout_s: aborted after so long [s].
    """

    goal_id: str
    instruction: str
    timeout_s: float = DEFAULT_TIMEOUT_S


def read_goal(text: str) -> Goal:
    """A goal from its JSON: ``goal_id``, ``instruction`` and, optionally, ``timeout_s``.

    Raises:
        BadObservation: something else.
    """
    try:
        if len(text) > MAX_CHARS:
            raise ValueError(f"{len(text)} characters")
        known = json.loads(text)
        goal_id, instruction = known["goal_id"], known["instruction"]
        timeout_s = known.get("timeout_s", DEFAULT_TIMEOUT_S)
        if not isinstance(goal_id, str) or not isinstance(instruction, str) or not goal_id or not instruction:
            raise TypeError("goal_id or instruction")
        if type(timeout_s) not in (int, float) or not math.isfinite(timeout_s) or not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise ValueError("timeout_s")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        valid = f"JSON with goal_id, instruction and, if wanted, timeout_s up to {MAX_TIMEOUT_S:g}"
        raise BadObservation("follow", repr(error)[:100], valid) from error
    return Goal(goal_id, instruction, float(timeout_s))


@final
class Follow:
    """The goal that is being followed, if any. Not thread-safe: owned by the executor's thread."""

    def __init__(self) -> None:
        self._goal: Goal | None = None
        self._started_ns = 0

    @property
    def goal(self) -> Goal | None:
        """None = there is none."""
        return self._goal

    def start(self, goal: Goal, now_ns: int) -> None:
        """Follow it from now on; end the one before first."""
        self._goal, self._started_ns = goal, now_ns

    def is_timeout(self, now_ns: int) -> bool:
        """Whether the goal has used up its time, on a steady clock."""
        return self._goal is not None and now_ns - self._started_ns >= self._goal.timeout_s * NS_PER_S

    def feedback(self, now_ns: int, status: str, said: str, **values: Any) -> str:
        """JSON of where the goal stands: goal_id, status, elapsed_s, says, and whatever else is known."""
        assert self._goal is not None
        elapsed_s = round((now_ns - self._started_ns) / NS_PER_S, 3)
        return json.dumps(
            {"goal_id": self._goal.goal_id, "instruction": self._goal.instruction, "status": status, "says": said,
             "elapsed_s": elapsed_s, "timeout_s": self._goal.timeout_s, **values}
        )  # fmt: skip

    def end(self, now_ns: int, status: str, said: str, **values: Any) -> str:
        """The last feedback; there is no goal any more."""
        last = self.feedback(now_ns, status, said, **values)
        self._goal = None
        return last
