"""Every error that a user can cause. One sentence: what, where, what is valid, and what to do.

The command line prints the message and exits with ``exit_code``; there is no traceback. In the control loop nothing
raises for expected trouble: a late or empty result is a value.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class VlaSpecError(Exception):
    """Base of all errors that are the user's to fix."""

    exit_code = 2

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors of worker processes cross as they are, whatever their constructors take."""
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[VlaSpecError], args: tuple[Any, ...], attributes: dict[str, Any]) -> VlaSpecError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(attributes)
    return error


class UnknownOption(VlaSpecError):
    """A name that does not exist, with the valid ones and the closest."""

    def __init__(self, kind: str, name: object, valid: Iterable[str], where: str = "") -> None:
        self.kind, self.name, self.valid = kind, name, sorted(valid)
        close = difflib.get_close_matches(str(name), self.valid, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        at = f"{where}: " if where else ""
        super().__init__(f"{at}no {kind} named {name!r}; have {', '.join(self.valid) or 'none'}{hint}")


class BadConfig(VlaSpecError):
    """A configuration value that can't be right."""


class BadObservation(VlaSpecError):
    """Something in an observation or action that no policy can use."""

    def __init__(self, what: str, found: str, valid: str) -> None:
        self.what, self.found, self.valid = what, found, valid
        super().__init__(f"observation: {what} is {found}; valid: {valid}")


class BadToken(VlaSpecError):
    """A token id outside the token domain."""


class BadModel(VlaSpecError):
    """Weights or a graph that are missing, incomplete, corrupt or of another model."""


class BadEngine(BadModel):
    """A compiled engine that is missing, stale, corrupt, or of another device, version or model."""


class SlowPath(VlaSpecError):
    """The library would run somewhere slower than what was asked for."""


class NodeFailed(VlaSpecError):
    """A node, a process of its own, did not do what it should in time; the message quotes its log."""


class MissingDependency(VlaSpecError):
    """A library that this command needs and the machine lacks."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what} is missing; to install: {fix}")


class NoDevice(VlaSpecError):
    """A GPU that this command needs and the machine lacks, or whose driver is missing or too old."""

    exit_code = 69  # as sysexits.h has it: unavailable


class DeviceError(VlaSpecError):
    """The GPU refused a call: no memory left, an engine of another device, a device that was lost."""


class Interrupted(VlaSpecError):
    """Ctrl-C: stopped on request, what was written is whole."""

    exit_code = 130
