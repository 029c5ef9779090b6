"""Finished episodes in a file, one line of JSON each, so that a long run can be stopped, resumed and added to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, final

from vla_spec.errors import BadConfig
from vla_spec.results import write_text


class EpisodeKey(NamedTuple):
    """One episode of the sweep."""

    task: str
    seed: int
    way: str
    cap: float


@final
class EpisodeLog:
    """Finished episodes in a file, a line of JSON each; the first line says what they belong to.

    Args:
        path: made if it is not there; its folder too.
        settings: what must be equal for episodes to be comparable.

    Raises:
        BadConfig: the file belongs to something else.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        #: What is known.
        self.episodes: dict[EpisodeKey, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._read()
        if not lines:
            self._append(settings)
            return
        if lines[0] != settings:
            other = sorted(k for k in settings if lines[0].get(k) != settings[k])
            raise BadConfig(
                f"{path}: episodes of another run, which differs in {', '.join(other) or 'its layout'}; name another "
                f"--out, or remove the file"
            )
        for line in lines[1:]:
            key = EpisodeKey(str(line["task"]), int(line["seed"]), str(line["way"]), float(line["cap"]))
            self.episodes[key] = line

    def add(self, key: EpisodeKey, found: dict[str, Any]) -> None:
        """One more episode, written at once."""
        line = {**key._asdict(), **found}
        self._append(line)
        self.episodes[key] = line

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self) -> list[dict[str, Any]]:
        """Whole lines; a last one that was cut off is taken away, so that the next one begins on a line of its own."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(self.path, whole)
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except json.JSONDecodeError as error:
            raise BadConfig(f"{self.path}: not a log of episodes ({error}); name another --out") from None
        if not all(isinstance(line, dict) for line in lines):
            raise BadConfig(f"{self.path}: not a log of episodes; name another --out")
        return lines
