"""A tolerance that was fitted on one policy, as a file: numbers in physical units, and where they come from.

Written by `vla-spec calibrate tolerance`, read by `relaxed_physical`. JSON, data only; refused for another model.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_spec.errors import BadConfig
from vla_spec.interfaces import Engine

#: Version of the layout, and what kind of file it is.
FORMAT, KIND = 1, "tolerance"
_HOW = "`vla-spec calibrate tolerance --out FILE` writes one"


@dataclass(frozen=True, slots=True)
class FittedTolerance:
    """How far a drafted token may be from the target's choice.

    Attributes:
        model_hash: sha256 of the weights that it was fitted on, hex.
        cap: [A], of one token. [m, rad]
        budget: [A], of the sum over one group; equal for degrees of freedom that share a group. [m, rad]
        relative: share of how far the target's own choice would move a token that is added to its cap. [0..1]
        evidence: how it was fitted: command, date, seeds, margin, the curves. For people; nothing here is used.
    """

    model_hash: str
    cap: tuple[float, ...]
    budget: tuple[float, ...]
    relative: float
    evidence: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values; `from_file` takes them back."""
        return {
            "format": FORMAT,
            "kind": KIND,
            "model_hash": self.model_hash,
            "cap": list(self.cap),
            "budget": list(self.budget),
            "relative": self.relative,
            **self.evidence,
        }

    @staticmethod
    def from_file(path: Path) -> FittedTolerance:
        """Read and check.

        Raises:
            BadConfig: no such file, cut off, another kind of file, or numbers that can't be a tolerance.
        """
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BadConfig(f"{path}: can't be read ({error.strerror}); {_HOW}") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BadConfig(f"{path}: not JSON, or cut off ({error}); {_HOW}") from None
        if not isinstance(tree, dict) or tree.get("kind") != KIND or tree.get("format") != FORMAT:
            raise BadConfig(f'{path}: not a fitted tolerance ("kind": "{KIND}", "format": {FORMAT}); {_HOW}')
        names = ("model_hash", "cap", "budget", "relative")
        try:
            fitted = FittedTolerance(
                str(tree["model_hash"]),
                tuple(float(number) for number in tree["cap"]),
                tuple(float(number) for number in tree["budget"]),
                float(tree["relative"]),
                {key: value for key, value in tree.items() if key not in (*names, "format", "kind")},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadConfig(f"{path}: {error!r}; a fitted tolerance has {', '.join(names)}; {_HOW}") from None
        numbers = (*fitted.cap, *fitted.budget, fitted.relative)
        if len(fitted.cap) != len(fitted.budget) or not all(math.isfinite(n) and n >= 0 for n in numbers):
            raise BadConfig(f"{path}: cap and budget need one number >= 0 per degree of freedom each, got {numbers}")
        return fitted

    def check_model(self, target: Engine | None, path: Path) -> None:
        """Refuse to be used with another policy than the one it was fitted on.

        Raises:
            BadConfig: another model, or it can't be told.
        """
        if target is None:
            raise BadConfig(f"{path}: a fitted tolerance needs the target engine, to see that it was fitted on it")
        found = target.info.model_hash
        if found != self.model_hash:
            raise BadConfig(
                f"{path}: fitted on model {self.model_hash[:12]}, the one that is loaded is {found[:12]}; fit again "
                f"with `vla-spec calibrate tolerance`, or state cap and budget by hand"
            )
