"""The actor in a process of its own: its ticks share no interpreter with the planner.

This process plans; the child builds the robot, keeps its rate and plays chunks. They meet in two slots of shared memory
(`vla_spec.shared_slot`): observations one way, chunks the other. The child wakes the planner through a pipe that it
never waits for; it never waits for the planner either. Between episodes they talk over a socket, in JSON and plain
arrays. If the planner dies, the arm plays what it has, holds, and comes to rest; if the actor dies, the run says so.

Run as a module this is the child: ``python -m vla_spec.actor_process CONTROL_FD WAKE_FD``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from enum import Enum
from typing import Any, final

import numpy as np
import numpy.typing as npt

from vla_spec.action_space import ActionSpace, DofKind
from vla_spec.chunks import ChunkOptions, Gap, HandOver
from vla_spec.clock import Clock, MonotonicClock
from vla_spec.errors import BadConfig, VlaSpecError
from vla_spec.interfaces import ChunkHistory
from vla_spec.policy import Policy
from vla_spec.realtime import (
    Grant,
    QuietInterpreter,
    RealtimeOptions,
    RealtimeRecord,
    UsageLog,
    locked_memory,
    thread_privileges,
)
from vla_spec.runtime import (
    EpisodeResult,
    EpisodicRobot,
    Mode,
    PlanRequest,
    RuntimeOptions,
    StepLog,
    check_options,
    make_actor,
    play_paced,
    step_period_ns,
)
from vla_spec.shared_slot import Slot, open_memory, size_of, slots_in
from vla_spec.trace import PlanRecord
from vla_spec.types import ActionChunk, Observation, Provenance, Rung, TokenDomain

#: Longest instruction in bytes (UTF-8); a longer one is a bad observation.
MAX_INSTRUCTION_BYTES = 1024
#: How long the child may take to end after it was asked to [s].
END_TIMEOUT_S = 10.0
#: How often the child looks for the first chunk, before the episode's clock starts [ns].
FIRST_PLAN_POLL_NS = 500_000

Arrays = dict[str, npt.NDArray[Any]]


class ActorLost(VlaSpecError):
    """The actor's process ended, or failed, in the middle of its work."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """What both sides have to agree about before they share memory.

    Attributes:
        num_tokens, horizon, tokens_per_step, action_size: T, H, tokens of one action, numbers of one action.
        image_shape: of `Observation.images`. state_size: S.
    """

    num_tokens: int
    horizon: int
    tokens_per_step: int
    action_size: int
    image_shape: tuple[int, ...]
    state_size: int

    @property
    def layouts(self) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Of a request and of a chunk. ``num_tokens`` and ``num_actions`` of -1 stand for None."""
        actions = (self.horizon, self.action_size)
        words = [("instruction_bytes", "<i4"), ("instruction", "u1", (MAX_INSTRUCTION_BYTES,))]
        request = np.dtype(
            [("stamp_ns", "<i8"), ("step", "<i8"), ("deadline_ns", "<i8"), ("consumed", "<i4"), ("num_forced", "<i4")]
            + [("num_tokens", "<i4"), ("num_actions", "<i4"), ("is_whole", "<i4"), *words]
            + [("images", "u1", self.image_shape), ("state", "<f4", (self.state_size,))]
            + [("tokens", "<i4", (self.num_tokens,)), ("actions", "<f4", actions)]
        )
        chunk = np.dtype(
            [(name, "<i8") for name in ("chunk_id", "observation_step", "observation_stamp_ns")]
            + [(name, "<i8") for name in ("start_ns", "ready_ns", "deadline_ns")]
            + [("max_deviation", "<f8"), ("rung", "<i4"), ("num_rows", "<i4"), ("num_tokens", "<i4"), *words]
            + [("actions", "<f4", actions), ("provenance", "u1", actions), ("tokens", "<i4", (self.num_tokens,))]
        )
        return request, chunk


@final
class ActorProcess:
    """One robot in a child process, for any number of episodes. Owned by the thread that plans. Close it.

    Args:
        robot: name of the robot plugin.
        robot_options: its options, as YAML would give them.
        domain: what tokens mean; the same for all policies that are going to plan.
        space: what an action's numbers mean; the same, too.

    Raises:
        VlaSpecError: what the child says about building the robot.
    """

    def __init__(self, robot: str, robot_options: Mapping[str, Any], domain: TokenDomain, space: ActionSpace) -> None:
        self._control, theirs = socket.socketpair()
        self._wake, wake = os.pipe()
        self._selector = selectors.DefaultSelector()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vla_spec.actor_process", str(theirs.fileno()), str(wake)],
                pass_fds=(theirs.fileno(), wake),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process, which ends the child in an orderly way
            )
        finally:
            theirs.close()
            os.close(wake)
        try:
            _send(self._control, {
                "robot": robot, "options": dict(robot_options), "num_tokens": domain.num_tokens,
                "tokens_per_step": domain.tokens_per_step, "space": _space_tree(space),
            })  # fmt: skip
            told, _ = self._receive()
            self._sizes = Sizes(**{**told["sizes"], "image_shape": tuple(told["sizes"]["image_shape"])})
            #: Of the robot.
            self.dt_s: float = told["dt_s"]
            _, descriptors, _, _ = socket.recv_fds(self._control, 1, 1)
            self._requests, self._chunks = slots_in(descriptors[0], *self._sizes.layouts)
            os.close(descriptors[0])
        except BaseException:
            self.close()
            raise
        os.set_blocking(self._wake, False)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._selector.register(self._control, selectors.EVENT_READ)
        #: What plans were made from, in the last episode.
        self.observations: list[Observation] = []

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def run_episode(
        self, policy: Policy | None, clock: Clock, options: RuntimeOptions | None = None, seed: int = 0
    ) -> EpisodeResult:
        """Run one episode in real time.

        Args:
            policy: plans; None = nobody does, the arm holds (to measure the actor alone).
            clock: a monotonic one, the policy's; the child reads the same clock of the machine.
            options: knobs; the mode is REAL_TIME.
            seed: of the robot's reset.

        Raises:
            BadConfig: another mode than REAL_TIME, or ``execute_horizon`` is longer than a chunk.
            ActorLost: the child ended or failed.
        """
        options = options or RuntimeOptions(mode=Mode.REAL_TIME)
        check_options(options, self._sizes.horizon, clock)
        if options.mode is not Mode.REAL_TIME:
            raise BadConfig(f"runtime.mode is {options.mode.value}; valid for an actor in its own process: real_time")
        if policy is None:
            options = dataclasses.replace(options, is_first_plan_free=False)
        else:
            policy.reset()
        self.observations = []
        asked = options.realtime
        plans: list[PlanRecord] = []
        usage = UsageLog(options.max_steps + 1)
        with ExitStack() as stack:
            grants: list[Grant] = []
            quiet = stack.enter_context(QuietInterpreter(clock.now_ns))
            if asked is not None:
                grants += stack.enter_context(locked_memory("planner's process", asked.lock_memory))
                if asked.freeze_gc:
                    grants.append(quiet.freeze("planner's process"))
                grants += stack.enter_context(thread_privileges("planner", asked.planner_priority, asked.planner_cpus))
            self._requests.forget()
            _send(self._control, {"do": "episode", "seed": seed, "options": _options_tree(options)})
            while True:
                ready = {key.fileobj for key, _ in self._selector.select()}
                if self._wake in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake, 4096)
                    if self._requests.poll() and policy is not None:
                        usage.begin()
                        plans.append(self._plan(policy))
                        usage.tick()
                        if asked is not None and asked.freeze_gc:
                            quiet.collect_in(max(0, plans[-1].slack_ns))
                if self._control in ready:
                    told, arrays = self._receive()
                    break
        if policy is not None:
            policy.trace.flush()
        of_planner = usage.rows[int(options.is_first_plan_free) :]
        return _episode_result(told, arrays, seed, plans, of_planner, tuple(grants))

    def close(self) -> None:
        """End the child."""
        with contextlib.suppress(OSError):
            _send(self._control, {"do": "close"})
        self._selector.close()
        self._control.close()
        with contextlib.suppress(OSError):
            os.close(self._wake)
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _plan(self, policy: Policy) -> PlanRecord:
        """Answer the request that was polled."""
        request = _read_request(self._requests)
        self.observations.append(request.observation)
        _write_chunk(self._chunks, policy.plan(*request))
        assert policy.last_record is not None, "a plan was made and not recorded"
        return policy.last_record

    def _receive(self) -> tuple[dict[str, Any], Arrays]:
        """The child's next message.

        Raises:
            ActorLost: it ended, or says that it failed.
        """
        try:
            tree, arrays = _receive(self._control)
        except (OSError, EOFError) as error:
            raise ActorLost(f"the actor's process ended ({type(error).__name__}); its messages are above") from None
        if "error" in tree:
            raise ActorLost(f"the actor's process: {tree['error']}")
        return tree, arrays


# --- what crosses the boundary ---


def _write_request(slot: Slot, request: PlanRequest) -> None:
    fields, seen, history = slot.fields, request.observation, request.history
    fields["stamp_ns"][...], fields["step"][...] = seen.stamp_ns, seen.step
    fields["deadline_ns"][...] = request.deadline_ns
    is_whole = seen.images.shape == fields["images"].shape and seen.state.shape == fields["state"].shape
    is_whole = _write_words(fields, seen.instruction) and is_whole
    fields["is_whole"][...] = is_whole
    if is_whole:
        fields["images"][...], fields["state"][...] = seen.images, seen.state
    fields["num_tokens"][...] = fields["num_actions"][...] = -1
    if history is not None:
        fields["consumed"][...], fields["num_forced"][...] = history.consumed, history.num_forced
        fields["num_tokens"][...] = len(history.tokens)
        fields["tokens"][: len(history.tokens)] = history.tokens
        if history.actions is not None:
            fields["num_actions"][...] = len(history.actions)
            fields["actions"][: len(history.actions)] = history.actions
    slot.publish()


def _read_request(slot: Slot) -> PlanRequest:
    fields = slot.fields
    is_whole = bool(fields["is_whole"])
    seen = Observation(
        # What did not fit is nothing: the adapter refuses it, and the answer comes from a lower rung.
        fields["images"].copy() if is_whole else np.empty((0, 0, 0, 3), np.uint8),
        fields["state"].copy() if is_whole else np.empty(0, np.float32),
        _read_words(fields) if is_whole else "",
        int(fields["stamp_ns"]),
        int(fields["step"]),
    )
    history, num_tokens, num_actions = None, int(fields["num_tokens"]), int(fields["num_actions"])
    if num_tokens >= 0:
        actions = fields["actions"][:num_actions].copy() if num_actions >= 0 else None
        consumed, num_forced = int(fields["consumed"]), int(fields["num_forced"])
        history = ChunkHistory(fields["tokens"][:num_tokens].copy(), consumed, num_forced, actions)
    return PlanRequest(seen, int(fields["deadline_ns"]), history)


def _write_chunk(slot: Slot, chunk: ActionChunk) -> None:
    fields, h, m = slot.fields, len(chunk.actions), len(chunk.tokens)
    for name in ("chunk_id", "observation_step", "observation_stamp_ns", "start_ns", "ready_ns", "deadline_ns"):
        fields[name][...] = getattr(chunk, name)
    fields["max_deviation"][...], fields["rung"][...] = chunk.max_deviation, chunk.rung
    fields["num_rows"][...], fields["num_tokens"][...] = h, m
    _write_words(fields, chunk.instruction)
    fields["actions"][:h], fields["provenance"][:h], fields["tokens"][:m] = (
        chunk.actions, chunk.provenance, chunk.tokens
    )  # fmt: skip
    slot.publish()


def _read_chunk(slot: Slot) -> ActionChunk:
    fields = slot.fields
    h, m = int(fields["num_rows"]), int(fields["num_tokens"])
    return ActionChunk(
        actions=fields["actions"][:h].copy(),
        provenance=fields["provenance"][:h].copy(),
        rung=Rung(int(fields["rung"])),
        chunk_id=int(fields["chunk_id"]),
        instruction=_read_words(fields),
        observation_stamp_ns=int(fields["observation_stamp_ns"]),
        observation_step=int(fields["observation_step"]),
        start_ns=int(fields["start_ns"]),
        ready_ns=int(fields["ready_ns"]),
        deadline_ns=int(fields["deadline_ns"]),
        tokens=fields["tokens"][:m].copy(),
        max_deviation=float(fields["max_deviation"]),
    )


def _write_words(fields: Arrays, words: str) -> bool:
    """False: they don't fit, and are left out."""
    encoded = words.encode()
    fits = len(encoded) <= MAX_INSTRUCTION_BYTES
    fields["instruction_bytes"][...] = len(encoded) if fits else 0
    if fits:
        fields["instruction"][: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return fits


def _read_words(fields: Arrays) -> str:
    return bytes(fields["instruction"][: int(fields["instruction_bytes"])]).decode()


def _send(control: socket.socket, tree: Mapping[str, Any], arrays: Arrays | None = None) -> None:
    """One message: a length, JSON, then the arrays' bytes in the order in which the JSON names them."""
    named = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    kinds = [[name, array.dtype.str, list(array.shape)] for name, array in named.items()]
    head = json.dumps({"tree": tree, "arrays": kinds}, default=_plain).encode()
    control.sendall(struct.pack("<I", len(head)) + head + b"".join(array.tobytes() for array in named.values()))


def _receive(control: socket.socket) -> tuple[dict[str, Any], Arrays]:
    """The next message.

    Raises:
        EOFError: the other side is gone.
    """
    head = json.loads(_take(control, struct.unpack("<I", _take(control, 4))[0]))
    arrays: Arrays = {}
    for name, kind, shape in head["arrays"]:
        dtype = np.dtype(kind)
        taken = _take(control, int(np.prod(shape)) * dtype.itemsize)
        arrays[name] = np.frombuffer(taken, dtype).reshape(shape)
    return head["tree"], arrays


def _take(control: socket.socket, num_bytes: int) -> bytes:
    parts = bytearray()
    while len(parts) < num_bytes:
        part = control.recv(min(num_bytes - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _plain(value: object) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} is not plain")


def _space_tree(space: ActionSpace) -> dict[str, Any]:
    tree = {name: getattr(space, name).tolist() for name in ("low", "high", "max_change", "rest")}
    return {**tree, "kinds": [int(kind) for kind in space.kinds], "stop_steps": space.stop_steps}


def _space_of(tree: Mapping[str, Any]) -> ActionSpace:
    arrays = {name: np.array(tree[name], np.float32) for name in ("low", "high", "max_change", "rest")}
    return ActionSpace(**arrays, kinds=tuple(DofKind(kind) for kind in tree["kinds"]), stop_steps=tree["stop_steps"])


def _options_tree(options: RuntimeOptions) -> dict[str, Any]:
    return dataclasses.asdict(options)


def _options_of(tree: Mapping[str, Any]) -> RuntimeOptions:
    values = dict(tree)
    values["mode"] = Mode(values["mode"])
    values["chunks"] = ChunkOptions(**{**values["chunks"], "hand_over": HandOver(values["chunks"]["hand_over"])})
    if values["realtime"] is not None:
        asked: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["realtime"].items()}
        values["realtime"] = RealtimeOptions(**asked)
    return RuntimeOptions(**values)


def _episode_result(
    told: Mapping[str, Any],
    arrays: Arrays,
    seed: int,
    plans: list[PlanRecord],
    planner_usage: npt.NDArray[np.int64],
    grants: tuple[Grant, ...],
) -> EpisodeResult:
    record = RealtimeRecord(
        told["period_ns"],
        arrays["lateness_ns"],
        arrays["usage"],
        planner_usage,
        (*(Grant(*grant) for grant in told["grants"]), *grants),
        told["num_collections"],
        told["longest_collection_ns"],
        is_own_process=True,
    )
    return EpisodeResult(
        seed=seed,
        success=told["success"],
        num_steps=len(arrays["actions"]),
        plans=tuple(plans),
        observe_ns=arrays["observe_ns"],
        delay_steps=arrays["delay_steps"],
        actions=arrays["actions"],
        provenance=arrays["provenance"],
        chunk_ids=arrays["chunk_ids"],
        counts={kind: told["counts"][kind] for kind in Provenance},
        rungs={rung: told["rungs"][rung] for rung in Rung},
        slack_ns=arrays["slack_ns"],
        num_late_steps=told["num_late_steps"],
        period_ns=told["period_ns"],
        measured_period_ns=told["measured_period_ns"],
        realtime=record,
        gaps={gap: told["gaps"][gap] for gap in Gap},
    )


# --- the child ---


class PlannerLost(VlaSpecError):
    """The planner's process is gone, and the arm has come to rest."""


@final
class _RemotePlanner:
    """The planner's process as the actor sees it."""

    def __init__(self, requests: Slot, chunks: Slot, wake: int) -> None:
        self._requests, self._chunks, self._wake = requests, chunks, wake
        os.set_blocking(wake, False)
        self._held: ActionChunk | None = None
        self.is_busy = False
        self.is_lost = False

    def reset(self) -> None:
        """A new episode: an answer to the one before is nobody's."""
        self._chunks.forget()
        self._held, self.is_busy = None, False

    def submit(self, request: PlanRequest) -> None:
        """Publish an observation, and wake the planner."""
        self.is_busy = True
        _write_request(self._requests, request)
        try:
            os.write(self._wake, b"\1")
        except BlockingIOError:
            pass  # it was woken before and has not looked yet
        except BrokenPipeError:
            self.is_lost = True

    def poll(self, now_ns: int) -> ActionChunk | None:
        """The finished chunk, if there is one."""
        if self._held is None and self._chunks.poll():
            self._held = _read_chunk(self._chunks)
        if self._held is None or self._held.ready_ns > now_ns:
            return None
        chunk, self._held, self.is_busy = self._held, None, False
        return chunk

    def has_chunk(self) -> bool:
        """There is a chunk, or there never will be one."""
        if self._held is None and self._chunks.poll():
            self._held = _read_chunk(self._chunks)
        return self._held is not None or self.is_lost


@final
class _Child:
    """The robot, and the loop that keeps its rate."""

    def __init__(self, control: socket.socket, wake: int) -> None:
        self._control = control
        hello, _ = _receive(control)
        self._space = _space_of(hello["space"])
        self._tokens_per_step: int = hello["tokens_per_step"]
        self._robot = _build_robot(hello["robot"], hello["options"])
        self._robot.reset(0)
        seen = self._robot.observe(0)
        self._horizon = hello["num_tokens"] // self._tokens_per_step
        sizes = Sizes(
            hello["num_tokens"], self._horizon, self._tokens_per_step, self._space.size, seen.images.shape,
            len(seen.state),
        )  # fmt: skip
        _send(control, {"sizes": dataclasses.asdict(sizes), "dt_s": self._robot.dt_s})
        descriptor = open_memory(size_of(*sizes.layouts))
        socket.send_fds(control, [b"\0"], [descriptor])
        requests, chunks = slots_in(descriptor, *sizes.layouts)
        self._link = _RemotePlanner(requests, chunks, wake)
        os.close(descriptor)

    def serve(self) -> None:
        """Episodes until there is no more to do."""
        try:
            while True:
                told, _ = _receive(self._control)
                if told["do"] != "episode":
                    return
                _send(self._control, *self._episode(told["seed"], _options_of(told["options"])))
        except EOFError:
            return  # the planner went away between episodes
        finally:
            self._robot.close()

    def _episode(self, seed: int, options: RuntimeOptions) -> tuple[dict[str, Any], Arrays]:
        clock, link, robot = MonotonicClock(), self._link, self._robot
        period_ns = step_period_ns(robot.dt_s, options)
        actor = make_actor(robot, link, self._space, self._tokens_per_step, self._horizon, clock, options)
        actor.reset(seed, clock.now_ns())
        log, usage, asked = StepLog(options.max_steps, self._space.size), UsageLog(options.max_steps), options.realtime

        def check() -> None:
            at_rest = options.chunks.max_holds + self._space.stop_steps
            link.is_lost = link.is_lost or self._is_called_off()
            if link.is_lost and actor.buffer.holds_in_a_row > at_rest:
                raise PlannerLost("the planner's process is gone; the arm was brought to rest")

        with ExitStack() as stack:
            grants: list[Grant] = []
            if asked is not None:
                grants += stack.enter_context(locked_memory("actor's process", asked.lock_memory))
            quiet = stack.enter_context(QuietInterpreter(clock.now_ns))
            if options.is_first_plan_free:
                actor.look(clock.now_ns())
                while not link.has_chunk():
                    clock.sleep_until_ns(clock.now_ns() + FIRST_PLAN_POLL_NS)
            if asked is not None and asked.freeze_gc:
                grants.append(quiet.freeze("actor's process"))
            if asked is not None:
                grants += stack.enter_context(thread_privileges("actor", asked.fifo_priority, asked.actor_cpus))
            keeper = play_paced(actor, log, robot, clock, options, period_ns, quiet, usage, check)
        n = log.num_steps
        told = {
            "success": bool(robot.is_success),
            "period_ns": period_ns,
            "measured_period_ns": keeper.measured_period_ns,
            "num_late_steps": keeper.skip_count,
            "counts": [actor.buffer.counts[kind] for kind in Provenance],
            "rungs": [actor.buffer.rung_counts[rung] for rung in Rung],
            "gaps": [actor.buffer.gap_counts[gap] for gap in Gap],
            "grants": [list(grant) for grant in grants],
            "num_collections": quiet.num_collections,
            "longest_collection_ns": quiet.longest_ns,
        }
        arrays: Arrays = {
            "actions": log.actions[:n],
            "provenance": log.provenance[:n],
            "chunk_ids": log.chunk_ids[:n],
            "slack_ns": log.slack_ns[:n],
            "lateness_ns": log.lateness_ns[:n],
            "usage": usage.rows,
            "observe_ns": np.array(actor.observe_ns, np.int64),
            "delay_steps": np.array(actor.delays, np.int32),
        }
        return told, arrays

    def _is_called_off(self) -> bool:
        """The planner's process is gone, or wants no more of this episode. A microsecond."""
        try:
            self._control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False  # nothing was said: all is well
        except OSError:
            pass
        return True


def _build_robot(name: str, options: Mapping[str, Any]) -> EpisodicRobot:
    from vla_spec.config import build_options, load_plugin

    plugin = load_plugin("robot", name)
    robot: EpisodicRobot = plugin.build(build_options(plugin.options, options, "robot"), None)  # type: ignore[arg-type]
    return robot


def main(control_fd: int, wake_fd: int) -> int:
    """The child's whole life. Returns its exit code."""
    control = socket.socket(fileno=control_fd)
    try:
        _Child(control, wake_fd).serve()
    except Exception as error:  # whatever it was, the other side has to be told
        text = str(error) if isinstance(error, VlaSpecError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            _send(control, {"error": text})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
