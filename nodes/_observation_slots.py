"""The newest picture of each camera, the state of the same moment, the instruction: one observation. No ROS in here.

Callbacks put, the planning thread takes. Nothing queues: a newer message replaces the older one, and what was replaced,
too old, or too far apart is counted. Thread-safe; nothing is copied under the lock but references.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import final

import numpy as np

from vla_spec.errors import BadConfig
from vla_spec.types import Float32, Observation, UInt8

#: Joint states that are remembered until the pictures of their moment come: 0.64 s at 100 Hz.
NUM_STATES = 64


@dataclass(slots=True)
class SlotCounts:
    """Window: since construction.

    Attributes:
        num_images, num_states: messages that came.
        num_stale: looks at which a picture or the state was older than allowed.
        num_skewed: looks at which cameras, or pictures and state, were further apart than allowed.
        num_backwards: messages older than the one before from the same source.
        num_future: looks at which a stamp lay further ahead than an observation may be old: the clocks of two machines
            differ, or simulated time was asked for and there is none.
        num_unequal: looks at which the cameras' pictures had different sizes.
    """

    num_images: int = 0
    num_states: int = 0
    num_stale: int = 0
    num_skewed: int = 0
    num_backwards: int = 0
    num_future: int = 0
    num_unequal: int = 0


@final
class ObservationSlots:
    """See the module.

    Args:
        num_cameras: pictures of one observation, at least 1.
        max_age_ns: an observation older than this is not planned for; a message that is older by more than this than
            the one before from its source begins a new time.
        max_skew_ns: most time between the oldest and the newest part of one observation.
    """

    def __init__(self, num_cameras: int, max_age_ns: int, max_skew_ns: int) -> None:
        if num_cameras < 1 or max_age_ns <= 0 or max_skew_ns < 0:
            raise BadConfig(
                f"observation slots: {num_cameras} cameras, valid: 1 or more; max_age_ns {max_age_ns}, valid: more "
                f"than 0; max_skew_ns {max_skew_ns}, valid: 0 or more"
            )
        self.counts = SlotCounts()
        self._max_age_ns, self._max_skew_ns = max_age_ns, max_skew_ns
        self._changed = threading.Condition()
        self._images: list[tuple[UInt8, int] | None] = [None] * num_cameras
        self._states: deque[tuple[Float32, int]] = deque(maxlen=NUM_STATES)  # by stamp, oldest first
        self._instruction = ""
        self._version = 0  # counts messages; a look that found nothing waits for the next

    def put_image(self, camera: int, image: UInt8, stamp_ns: int) -> None:
        """A picture, uint8 [h, w, 3]. The array now belongs to the slot."""
        with self._changed:
            before = self._images[camera]
            self.counts.num_images += 1
            if before is not None and stamp_ns < before[1]:
                self.counts.num_backwards += 1
                if not self._is_other_time(before[1], stamp_ns):
                    return
            self._images[camera] = image, stamp_ns
            self._notify()

    def put_state(self, state: Float32, stamp_ns: int) -> None:
        """Joint positions, float32 [S]."""
        with self._changed:
            self.counts.num_states += 1
            if self._states and stamp_ns < self._states[-1][1]:
                self.counts.num_backwards += 1
                if not self._is_other_time(self._states[-1][1], stamp_ns):
                    return
                self._states.clear()
            self._states.append((state, stamp_ns))
            self._notify()

    def put_instruction(self, instruction: str) -> bool:
        """Words to follow from now on. True if they differ from those before."""
        with self._changed:
            is_new, self._instruction = instruction != self._instruction, instruction
            if is_new:
                self._notify()
            return is_new

    @property
    def instruction(self) -> str:
        """The words to follow; empty = none came yet."""
        return self._instruction

    @property
    def newest_state(self) -> Float32 | None:
        """Joint positions that came last, float32 [S]; None = none came yet."""
        with self._changed:
            return self._states[-1][0] if self._states else None

    def missing(self) -> list[str]:
        """What never came, in words: an observation needs all of it."""
        with self._changed:
            said = [f"no picture of camera {i}" for i, image in enumerate(self._images) if image is None]
            said += [] if self._states else ["no joint states"]
            return said if self._instruction else [*said, "no instruction"]

    def clear(self) -> None:
        """Forget pictures and state, not the instruction: time jumped, or an episode began."""
        with self._changed:
            self._images = [None] * len(self._images)
            self._states.clear()

    def wake(self) -> None:
        """Let `wait` return."""
        with self._changed:
            self._notify()

    def wait(self, version: int, timeout_s: float) -> int:
        """Block until something came after ``version``, or the time is up. Returns the version now."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != version, timeout_s)
            return self._version

    def look(self, now_ns: int, not_before_ns: int, step: int) -> Observation | None:
        """The newest whole observation, None if there is none that may be used (counted by reason).

        Its stamp is that of its oldest picture; its state is the one nearest to that.

        Args:
            now_ns: time now, on the clock of the stamps.
            not_before_ns: pictures older than this are of no interest (not counted).
            step: for the observation.
        """
        with self._changed:
            images, states, instruction = list(self._images), list(self._states), self._instruction
        if not states or not instruction or any(image is None for image in images):
            return None
        known = [image for image in images if image is not None]
        stamps = [stamp for _, stamp in known]
        oldest = min(stamps)
        if oldest < not_before_ns:
            return None
        # Pictures take longer than joint states: what the arm was like when they were taken is a few messages back.
        state = min(states, key=lambda known: abs(known[1] - oldest))
        if max((*stamps, state[1])) - now_ns > self._max_age_ns:
            self.counts.num_future += 1
            return None
        if now_ns - min(oldest, state[1]) > self._max_age_ns:
            self.counts.num_stale += 1
            return None
        if max((*stamps, state[1])) - min(oldest, state[1]) > self._max_skew_ns:
            self.counts.num_skewed += 1
            return None
        if any(image.shape != known[0][0].shape for image, _ in known):
            self.counts.num_unequal += 1
            return None
        return Observation(np.stack([image for image, _ in known]), state[0], instruction, oldest, step)

    def _is_other_time(self, before_ns: int, stamp_ns: int) -> bool:
        """So far back that it is no message out of order: its sender's clock was set, or the one before was wrong."""
        return before_ns - stamp_ns > self._max_age_ns

    def _notify(self) -> None:
        self._version += 1
        self._changed.notify_all()
