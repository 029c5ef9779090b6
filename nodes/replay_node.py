"""`replay_node`: plays what sensors said in a bag, at its own pace, as if it happened now; time comes from the bag.

Messages are published as they were recorded, byte for byte. If the bag has `/clock`, that is everybody's time; if not,
`/clock` follows the times at which messages were recorded. What a policy or an actor had published is left out.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.parameter import Parameter as RosParameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock as ClockMessage

from vla_spec.errors import BadConfig, MissingDependency
from vla_spec.nodes import _messages as messages
from vla_spec.nodes._main import run_node, wait_s
from vla_spec.nodes._parameters import Parameter, declare
from vla_spec.nodes._qos import LATCHED

PARAMETERS = (
    Parameter("bag", "", "MCAP file"),
    Parameter("topics", ["*image*", "*/joint_states", "*/instruction"], "patterns of the topics to play"),
    Parameter("rate", 1.0, "recorded seconds per second", 0.01, 100.0),
    Parameter("loops", False, "begin again at the end; time jumps back"),
)
SENSOR = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
TICK_S = 0.002
#: What the middleware is given to send the last messages before the process ends [s].
FLUSH_S = 0.1


@final
class ReplayNode(Node):
    """See the module."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("replay_node", **kwargs)
        self.set_parameters([RosParameter("use_sim_time", value=False)])
        self._values = declare(self, PARAMETERS)
        path = Path(self._values["bag"])
        if not path.is_file():
            raise BadConfig(f"replay_node: bag is {str(path)!r}; valid: an MCAP file")
        try:
            from mcap.exceptions import McapError
            from mcap.reader import make_reader
        except ImportError as error:
            raise MissingDependency("mcap", "pip install 'vla_spec[ros]'") from error
        self._file = path.open("rb")
        try:
            self._reader: Any = make_reader(self._file, validate_crcs=True)
            summary = self._reader.get_summary()
        except McapError as error:
            self._file.close()
            raise BadConfig(f"replay_node: {path} is no readable MCAP file ({error})") from error
        channels = {} if summary is None else summary.channels
        self._types = {
            c.topic: summary.schemas[c.schema_id].name for c in channels.values() if c.message_encoding == "cdr"
        }
        wanted = [t for t in self._types if any(fnmatch.fnmatch(t, p) for p in self._values["topics"])]
        if not wanted:
            self._file.close()
            raise BadConfig(
                f"replay_node: none of {list(self._values['topics'])} is in {path}; it has {', '.join(self._types)}"
            )
        self._has_clock = "/clock" in self._types
        self._played = [*wanted, "/clock"] if self._has_clock else wanted
        self._publishers_of = {topic: self._publisher(topic) for topic in wanted}
        self._clock_publisher = self.create_publisher(ClockMessage, "/clock", 1)
        self._is_over = False
        self.num_played = 0
        self._begin()
        self.create_timer(TICK_S, self._tick, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def is_over(self) -> bool:
        """The bag is played."""
        return self._is_over

    def _publisher(self, topic: str) -> Any:
        name = self._types[topic]
        kind = messages.type_named(name)
        if kind is None:
            raise BadConfig(f"replay_node: type {name} of {topic} is not installed here")
        return self.create_publisher(kind, topic, LATCHED if name.endswith("/String") else SENSOR)

    def _begin(self) -> None:
        self._messages: Iterator[Any] = self._reader.iter_messages(topics=self._played)
        self._next = self._read()
        self._first_ns = 0 if self._next is None else self._next[2].log_time
        self._started_ns = time.monotonic_ns()

    def _read(self) -> Any:
        """The next message, None at the end.

        Raises:
            BadConfig: the file is damaged from here on.
        """
        try:
            return next(self._messages, None)
        except Exception as error:  # the reader has no base class for what a damaged file does to it
            self._file.close()
            raise BadConfig(
                f"replay_node: {self._values['bag']} is damaged ({type(error).__name__}: {error})"
            ) from error

    def _tick(self) -> None:
        """Everything that is due."""
        passed_ns = round((time.monotonic_ns() - self._started_ns) * self._values["rate"])
        while self._next is not None and self._next[2].log_time - self._first_ns <= passed_ns:
            _, channel, message = self._next
            if channel.topic == "/clock":
                self._clock_publisher.publish(bytes(message.data))
            else:
                if not self._has_clock:
                    self._clock_publisher.publish(ClockMessage(clock=messages.to_stamp(message.log_time)))
                self._publishers_of[channel.topic].publish(bytes(message.data))
            self.num_played += 1
            self._next = self._read()
        if self._next is None:
            if self._values["loops"]:
                self._begin()
            else:
                self._is_over = True

    def finish(self) -> None:
        """The process ends; the last messages are given time to leave."""
        wait_s(FLUSH_S)
        self._file.close()


def main() -> None:
    """Entry point."""
    run_node(ReplayNode)


if __name__ == "__main__":
    main()
