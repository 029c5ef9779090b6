"""Plays back recorded observations and writes down the commands that it got. Nothing moves.

A recording is one ``.npz`` file of plain arrays (never pickled objects): ``images`` uint8 [n, cameras, h, w, 3],
``state`` float32 [n, S], and optionally ``steps`` int32 [n] (the control step of each, ascending from 0; default
0, 1, 2, ...), ``instruction`` (one string), ``action_low`` and ``action_high`` float32 [A], ``dt_s``.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from vla_spec.atomic import replacing
from vla_spec.errors import BadConfig, BadObservation
from vla_spec.plugins import Parts
from vla_spec.types import Float32, Observation


@dataclass(frozen=True, slots=True)
class Options:
    """What a configuration may set.

    Attributes:
        path: the recording.
        instruction: the words in every observation; None = the recording's.
        action_size: A, where the recording has no limits.
        dt_s: control period [s], where the recording has none.
    """

    path: str = ""
    instruction: str | None = None
    action_size: int = 4
    dt_s: float = 0.0125

    def __post_init__(self) -> None:
        if self.action_size < 1 or self.dt_s <= 0:
            raise BadConfig(f"replay: action_size {self.action_size} must be 1 or more, dt_s {self.dt_s} more than 0")


@final
class ReplayRobot:
    """Observation i is what the recording saw last at or before control step i; behind its end, its last one.

    Raises:
        BadConfig: no such file, no such arrays, or arrays that contradict each other.
    """

    def __init__(self, options: Options) -> None:
        arrays = _load(Path(options.path))
        self._images, self._state = arrays["images"], np.atleast_1d(arrays["state"]).astype(np.float32)
        n = len(np.atleast_1d(self._images))
        self._steps = np.atleast_1d(arrays.get("steps", np.arange(n)))
        where = f"replay: {options.path}"
        if self._images.dtype != np.uint8 or self._images.ndim != 5 or self._images.shape[-1] != 3 or n == 0:
            found = f"{self._images.dtype} {list(self._images.shape)}"
            raise BadConfig(f"{where}: images are {found}; valid: uint8 [n, cameras, h, w, 3], n from 1")
        self._is_by_step = len(self._state) != n  # one state per control step, fewer pictures
        if self._state.ndim != 2 or len(self._steps) != n or self._steps[0] != 0 or (np.diff(self._steps) <= 0).any():
            raise BadConfig(f"{where}: needs state [n, S] and n steps that ascend from 0; valid: n = {n}")
        if self._is_by_step and len(self._state) <= self._steps[-1]:
            raise BadConfig(f"{where}: {len(self._state)} states; valid: {n}, or one per step up to {self._steps[-1]}")
        recorded = str(arrays["instruction"]) if "instruction" in arrays else ""
        self.instruction = recorded if options.instruction is None else options.instruction
        self.action_low = arrays.get("action_low", np.full(options.action_size, -1)).astype(np.float32)
        self.action_high = arrays.get("action_high", np.full(options.action_size, 1)).astype(np.float32)
        self.dt_s = float(arrays.get("dt_s", options.dt_s))
        self.is_success = False  # a recording can't be solved
        self.reset(0)

    def reset(self, seed: int) -> None:
        self.step = 0
        self._sent: list[Float32] = []
        self._sent_ns: list[int] = []

    @property
    def num_steps(self) -> int:
        """Control steps that the recording covers."""
        return len(self._state) if self._is_by_step else int(self._steps[-1]) + 1

    @property
    def commands(self) -> Float32:
        """Float32 [steps, A]: what was sent since the reset."""
        return np.array(self._sent, np.float32).reshape(-1, len(self.action_low))

    def observe(self, now_ns: int) -> Observation:
        frame = int(np.searchsorted(self._steps, self.step, side="right")) - 1
        row = min(self.step, len(self._state) - 1) if self._is_by_step else frame
        return Observation(self._images[frame], self._state[row], self.instruction, now_ns, self.step)

    def act(self, action: Float32, now_ns: int) -> Float32:
        if not np.isfinite(action).all():
            raise BadObservation("action", f"not finite: {action}", f"numbers in {self.action_low}..{self.action_high}")
        sent = np.clip(action, self.action_low, self.action_high).astype(np.float32)
        self._sent.append(sent)
        self._sent_ns.append(now_ns)
        self.step += 1
        return sent

    def save_commands(self, path: Path) -> None:
        """Write ``commands`` float32 [steps, A] and ``stamp_ns`` int64 [steps] to a ``.npz`` file, atomically."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, commands=self.commands, stamp_ns=np.array(self._sent_ns, np.int64))

    def close(self) -> None:
        """Nothing to free."""


def _load(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise BadConfig(f"replay: {path}: no such file; valid: a .npz with images and state") from None
    except (ValueError, OSError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise BadConfig(f"replay: {path}: not a .npz of plain arrays: {error}") from None
    missing = {"images", "state"} - set(arrays)
    if missing:
        raise BadConfig(f"replay: {path}: lacks {sorted(missing)}, has {sorted(arrays)}")
    return arrays


def build(options: Options, parts: Parts | None = None) -> ReplayRobot:
    """A robot needs no other part."""
    return ReplayRobot(options)
