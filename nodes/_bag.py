"""Writes topics into an MCAP file that Foxglove and `ros2 bag` open: messages as on the wire, with their schemas.

Needs the package `mcap`. Nothing is decoded, so recording costs a copy.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, final

from ament_index_python.packages import get_package_share_directory

from vla_spec.errors import MissingDependency

_BUILT_IN = {
    "bool", "byte", "char", "float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64",
    "uint64", "string", "wstring",
}  # fmt: skip
_TYPE = re.compile(r"^([A-Za-z][A-Za-z0-9_/]*)")


def definition(type_name: str) -> str:
    """The text of a message type and of all types in it, as MCAP's ``ros2msg`` wants it; ``pkg/msg/Name``."""
    parts, known, waiting = [], {type_name}, [type_name]
    while waiting:
        name = waiting.pop(0)
        package, _, short = name.split("/")
        text = (_share(package) / "msg" / f"{short}.msg").read_text(encoding="utf-8")
        head = "" if name == type_name else f"{'=' * 80}\nMSG: {package}/{short}\n"
        parts.append(head + text)
        for inner in _fields(text, package):
            if inner not in known:
                known.add(inner)
                waiting.append(inner)
    return "\n".join(parts)


def _share(package: str) -> Path:
    """Where a package's files are. ROS from wheels is in Python's own prefix, which nobody may have named."""
    try:
        return Path(get_package_share_directory(package))
    except (LookupError, OSError):
        return Path(sys.prefix) / "share" / package


def _fields(text: str, package: str) -> Iterator[str]:
    """Types that a definition refers to, as pkg/msg/Name."""
    for line in text.splitlines():
        found = _TYPE.match(line.split("#")[0].strip())
        if found is None:
            continue
        kind = found[1]
        if kind in _BUILT_IN:
            continue
        names = kind.split("/")
        yield f"{names[0] if len(names) > 1 else package}/msg/{names[-1]}"


@final
class Bag:
    """One file. Finished by `close`; a file of a process that was killed is still readable up to its last chunk.

    Raises:
        MissingDependency: mcap is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            from mcap.writer import Writer
        except ImportError as error:
            raise MissingDependency("mcap", "pip install 'vla_spec[ros]'") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._writer: Any = Writer(self._file)
        self._writer.start(profile="ros2", library="vla_spec")
        self._schemas: dict[str, int] = {}
        self._channels: dict[str, int] = {}
        self.num_messages = 0

    def __enter__(self) -> Bag:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def add_topic(self, topic: str, type_name: str) -> None:
        """Before its first message. ``type_name`` as ``std_msgs/msg/String``."""
        if type_name not in self._schemas:
            self._schemas[type_name] = self._writer.register_schema(
                name=type_name, encoding="ros2msg", data=definition(type_name).encode()
            )
        self._channels[topic] = self._writer.register_channel(
            topic=topic, message_encoding="cdr", schema_id=self._schemas[type_name]
        )

    def write(self, topic: str, serialized: bytes, time_ns: int) -> None:
        """One message as it came."""
        self._writer.add_message(
            channel_id=self._channels[topic], log_time=time_ns, publish_time=time_ns, data=serialized,
            sequence=self.num_messages,
        )  # fmt: skip
        self.num_messages += 1

    def close(self) -> None:
        """Write the index."""
        if not self._file.closed:
            self._writer.finish()
            self._file.close()
