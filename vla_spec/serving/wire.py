"""What crosses the network: one msgpack map per message, numbers and bytes only, checked before it is believed.

A message is a map with ``vla`` (the protocol's version), ``type`` and exactly the fields of that type. An array is
``{"dtype": one of DTYPES, "shape": [...], "data": bytes}``, C order, little endian. Nothing in a message says what to
run; nothing is allocated by what a message claims, since the size of the whole frame, each array's dtype and shape, and
the length of its bytes are compared with the policy's own sizes first. docs/serving.md has the table of all messages.

Times are never clock readings of the other side, but durations, or readings that the other side only sends back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import msgpack
import numpy as np
import numpy.typing as npt

from vla_spec.action_space import ActionSpace, DofKind
from vla_spec.costs import Costs
from vla_spec.errors import BadConfig, VlaSpecError
from vla_spec.interfaces import ChunkHistory
from vla_spec.ladder import Reason
from vla_spec.trace import PlanRecord
from vla_spec.types import ActionChunk, Observation, Provenance, Round, Rung

#: Version of this protocol. Another one is refused by name; there is no guessing.
PROTOCOL = 1
#: Arrays may have these types, and no others.
DTYPES = ("|u1", "<i4", "<i8", "<f4")
#: Longest instruction, name or explanation [bytes of UTF-8].
MAX_TEXT_BYTES = 1024
#: Longest token of a client.
MAX_TOKEN_BYTES = 64
#: Largest message that a client takes before it knows the policy's sizes, and ever [bytes].
MAX_REPLY_BYTES = 4 << 20
#: What keys, numbers and short texts of one message take at most, arrays left out [bytes].
_OVERHEAD_BYTES = 4096
#: Longest duration in a message [ns]: eleven days.
_MOST_NS = 10**15
_INT64 = 2**63 - 1
#: Rounds of one chunk that an answer may list.
_MOST_ROUNDS = 4096

Tree = Mapping[str, Any]


class BadMessage(VlaSpecError):
    """A message that is not what the protocol says. Refused, counted, never fatal to the receiver."""


class WrongVersion(BadMessage):
    """A message of another version of the protocol."""

    def __init__(self, found: object) -> None:
        super().__init__(f"protocol version {found!r}; valid: {PROTOCOL}, which this side speaks")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What both sides have to agree about; from the policy's own files.

    Attributes:
        image_shape: of `Observation.images`: cameras, height, width, 3.
        state_size: S.
        horizon, action_size, num_tokens, tokens_per_step, vocab_size: H, A, T, tokens of one action, V.
    """

    image_shape: tuple[int, int, int, int]
    state_size: int
    horizon: int
    action_size: int
    num_tokens: int
    tokens_per_step: int
    vocab_size: int

    def __post_init__(self) -> None:
        numbers = (*self.image_shape, *(getattr(self, item.name) for item in fields(self)[1:]))
        if len(self.image_shape) != 4 or min(numbers) < 1 or self.image_shape[3] != 3:
            raise BadConfig(f"sizes are {self}; valid: whole numbers from 1, images [cameras, height, width, 3]")

    @property
    def max_request_bytes(self) -> int:
        """No message of a client is longer."""
        numbers = self.state_size + self.num_tokens + self.horizon * self.action_size
        return math.prod(self.image_shape) + 4 * numbers + MAX_TEXT_BYTES + _OVERHEAD_BYTES


# --- messages of a client ---


@dataclass(frozen=True, slots=True)
class Hello:
    """A client begins. What it says of itself has to fit the server; None = it does not care.

    Attributes:
        client: a name for the server's log.
        token: random bytes that stay the same while the client lives: if its connection breaks, and the server has not
            noticed, the next one gets its old place. Empty = a place of its own each time.
        model_hash: sha256 of the weights that it was made for, hex.
        image_shape, state_size, action_size: of its robot.
        dt_s: its control period [s].
    """

    client: str = ""
    token: bytes = b""
    model_hash: str | None = None
    image_shape: tuple[int, ...] | None = None
    state_size: int | None = None
    action_size: int | None = None
    dt_s: float | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """Plan for this observation.

    Attributes:
        id: the answer has the same; a larger one replaces those before it.
        episode: another number than before = a new episode begins.
        remaining_ns: until the deadline, on the client's clock, when this was sent; may be negative.
        network_ns: what the way here and back takes, as the client has measured it.
        observation: its stamp is the client's clock, and only sent back.
        history: see `ChunkHistory`.
    """

    id: int
    episode: int
    remaining_ns: int
    network_ns: int
    observation: Observation
    history: ChunkHistory | None


class Ping(NamedTuple):
    """Are you there? ``padding`` bytes make it as long as a request, to measure its way."""

    sent_ns: int
    padding: int = 0


class Bye(NamedTuple):
    """The sender ends in an orderly way (both directions)."""


# --- messages of a server ---


@dataclass(frozen=True, slots=True)
class Welcome:
    """The client is served, and this is by what.

    Attributes:
        mode, engine, drafter, rule, controller: names of the plugins behind it.
        precision: of the engine. is_exact: the output equals the target's own decoding.
        model_hash: sha256 of the weights, hex.
        dt_s: control period that the policy was made for [s].
        sizes, space: of the policy and of its actions.
        costs: what the engine's and the drafter's calls cost on the server; None = not measured.
    """

    mode: str
    engine: str
    drafter: str
    rule: str
    controller: str
    precision: str
    is_exact: bool
    model_hash: str
    dt_s: float
    sizes: Sizes
    space: ActionSpace
    costs: Costs | None


class Pong(NamedTuple):
    """I am. ``sent_ns`` as in the ping; ``busy_ns``: how long the plan in hand has been under way, 0 = none is."""

    sent_ns: int
    busy_ns: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The chunk for a request, or why there is none.

    Times in ``chunk`` and ``record`` are the server's, measured from the arrival of the request; only the observation's
    stamp is the client's. Which clock reading of its own the arrival was, the client knows: see `RemotePlanner`.

    Attributes:
        id: the request's.
        overtaken_by: id of the newer request that took this one's place; no chunk then. None = there is a chunk.
        chunk, record: the plan, and how it was made.
        queue_ns: from arrival to the start of planning. held_ns: from arrival to the moment this was sent.
    """

    id: int
    overtaken_by: int | None
    chunk: ActionChunk | None
    record: PlanRecord | None
    queue_ns: int
    held_ns: int


class Refused(NamedTuple):
    """Not like this. ``is_final``: saying hello again does not help."""

    message: str
    is_final: bool


class Unknown(NamedTuple):
    """Who are you? The server was restarted, or has not heard of the client for too long: say hello again."""


Request = Hello | Ask | Ping | Bye
Reply = Welcome | Answer | Pong | Refused | Unknown | Bye


def encode(message: Request | Reply) -> bytes:
    """A message as bytes, ready to be sent in one frame."""
    name, write = _WRITERS[type(message)]
    packed: bytes = msgpack.packb({"vla": PROTOCOL, "type": name, **write(message)}, use_bin_type=True)
    return packed


def decode_request(frame: bytes | memoryview, sizes: Sizes) -> Request:
    """What a client sent.

    Args:
        frame: one frame, as it came.
        sizes: of the policy that is served.

    Raises:
        WrongVersion: of another protocol.
        BadMessage: says what is wrong, where, and what is valid.
    """
    name, tree = _open(frame, sizes.max_request_bytes)
    read = _REQUESTS.get(name)
    if read is None:
        raise BadMessage(f"type {name!r} from a client; valid: {', '.join(_REQUESTS)}")
    request: Request = read(tree, sizes)
    return request


def decode_reply(frame: bytes | memoryview, sizes: Sizes | None) -> Reply:
    """What a server sent.

    Args:
        frame: one frame, as it came.
        sizes: what it said in its welcome; None before that.

    Raises:
        WrongVersion, BadMessage: as `decode_request`.
    """
    name, tree = _open(frame, MAX_REPLY_BYTES)
    read = _REPLIES.get(name)
    if read is None:
        raise BadMessage(f"type {name!r} from a server; valid: {', '.join(_REPLIES)}")
    reply: Reply = read(tree, sizes)
    return reply


# --- opening a frame ---


def _open(frame: bytes | memoryview, most_bytes: int) -> tuple[str, dict[str, Any]]:
    """Type and fields of a frame whose size and version are right."""
    if len(frame) > most_bytes:
        raise BadMessage(f"message of {len(frame)} bytes; valid: at most {most_bytes}")
    try:
        tree = msgpack.unpackb(
            frame, raw=False, strict_map_key=True, object_pairs_hook=_without_twins, max_bin_len=most_bytes,
            max_str_len=MAX_TEXT_BYTES, max_array_len=1024, max_map_len=256, max_ext_len=0,
        )  # fmt: skip
    except BadMessage:
        raise
    except Exception as error:  # whatever a stranger's bytes make the parser say
        raise BadMessage(f"message is not msgpack within its limits ({type(error).__name__}: {error})") from None
    if not isinstance(tree, dict):
        raise BadMessage(f"message is a {type(tree).__name__}; valid: a map")
    if type(tree.get("vla")) is not int or tree["vla"] != PROTOCOL:
        raise WrongVersion(tree.get("vla"))
    name = tree.get("type")
    if not isinstance(name, str):
        raise BadMessage(f"type is {_show(name)}; valid: a name")
    return name, {key: value for key, value in tree.items() if key not in ("vla", "type")}


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):  # two parsers could read it differently
        raise BadMessage("a key occurs twice in one map; valid: once")
    return tree


def _only(tree: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    """A map with exactly these keys."""
    if not isinstance(tree, dict):
        raise BadMessage(f"{where} is {_show(tree)}; valid: a map")
    if tree.keys() != set(names):
        missing, foreign = sorted(set(names) - tree.keys()), sorted(set(tree) - set(names))
        shown = ", ".join(_show(name) for name in foreign[:4])
        raise BadMessage(f"{where}: missing {missing}, unknown [{shown}]; valid: {', '.join(names) or 'no fields'}")
    return tree


def _int(tree: Tree, key: str, low: int, high: int) -> int:
    value = tree[key]
    if type(value) is not int or not low <= value <= high:
        raise BadMessage(f"{key} is {_show(value)}; valid: a whole number, {low}..{high}")
    return value


def _number(tree: Tree, key: str, low: float, high: float) -> float:
    value = tree[key]
    if type(value) not in (int, float) or not low <= value <= high:
        raise BadMessage(f"{key} is {_show(value)}; valid: a number, {low}..{high}")
    return float(value)


def _flag(tree: Tree, key: str) -> bool:
    value = tree[key]
    if not isinstance(value, bool):
        raise BadMessage(f"{key} is {_show(value)}; valid: true or false")
    return value


def _text(tree: Tree, key: str) -> str:
    value = tree[key]
    if not isinstance(value, str):  # how long it may be, the parser has checked
        raise BadMessage(f"{key} is {_show(value)}; valid: a text of at most {MAX_TEXT_BYTES} bytes")
    return value


def _array(tree: Tree, key: str, dtype: str, shape: tuple[int | tuple[int, int], ...]) -> npt.NDArray[Any]:
    """An array of this dtype; each side is a number, or the least and the most that it may be."""
    sizes = ", ".join(f"{side[0]}..{side[1]}" if isinstance(side, tuple) else str(side) for side in shape)
    value, valid = tree[key], f"an array of {dtype}, [{sizes}]"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data"}:
        raise BadMessage(f"{key} is {_show(value)}; valid: {valid}")
    found, sides, data = value["dtype"], value["shape"], value["data"]
    if found != dtype or not isinstance(sides, list) or len(sides) != len(shape) or not isinstance(data, bytes):
        raise BadMessage(f"{key} is {_show(found)} {_show(sides)}; valid: {valid}")
    for side, wanted in zip(sides, shape, strict=True):
        low, high = wanted if isinstance(wanted, tuple) else (wanted, wanted)
        if type(side) is not int or not low <= side <= high:
            raise BadMessage(f"{key} has the shape {_show(sides)}; valid: {valid}")
    num_bytes = math.prod(sides) * np.dtype(dtype).itemsize
    if len(data) != num_bytes:
        raise BadMessage(f"{key} has {len(data)} bytes; valid: {num_bytes}, as its shape {sides} says")
    return np.frombuffer(data, dtype).reshape(sides).copy()


def _packed(array: npt.NDArray[Any], dtype: str) -> dict[str, Any]:
    """The inverse of `_array`."""
    plain = np.ascontiguousarray(array, dtype)
    return {"dtype": dtype, "shape": list(plain.shape), "data": plain.data.cast("B") if plain.size else b""}


def _finite(array: npt.NDArray[Any], key: str) -> npt.NDArray[Any]:
    if not np.isfinite(array).all():
        raise BadMessage(f"{key} has a number that is not finite; valid: finite numbers")
    return array


def _token_ids(tree: Tree, key: str, sizes: Sizes) -> npt.NDArray[Any]:
    tokens = _array(tree, key, "<i4", ((0, sizes.num_tokens),))
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < sizes.vocab_size:
        raise BadMessage(f"{key} has an id outside the domain; valid: 0..{sizes.vocab_size - 1}")
    return tokens


def _show(value: object) -> str:
    """A value for an error: short, whatever was sent."""
    if isinstance(value, list) and len(value) <= 8 and all(type(item) is int for item in value):
        return str(value)
    if isinstance(value, bytes | dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _of_known_sizes(sizes: Sizes | None) -> Sizes:
    if sizes is None:
        raise BadMessage("an answer before the welcome; valid: after it")
    return sizes


def _cut(text: str) -> str:
    """As many characters as fit."""
    return text.encode()[:MAX_TEXT_BYTES].decode(errors="ignore")


# --- each message, both ways ---


def _write_hello(m: Hello) -> Tree:
    return {
        "client": _cut(m.client), "token": m.token, "model_hash": m.model_hash, "state_size": m.state_size,
        "action_size": m.action_size, "image_shape": None if m.image_shape is None else list(m.image_shape),
        "dt_s": m.dt_s,
    }  # fmt: skip


def _read_hello(tree: Any, sizes: Sizes) -> Hello:
    _only(tree, ("client", "token", "model_hash", "image_shape", "state_size", "action_size", "dt_s"), "hello")
    if not isinstance(tree["token"], bytes) or len(tree["token"]) > MAX_TOKEN_BYTES:
        raise BadMessage(f"token is {_show(tree['token'])}; valid: at most {MAX_TOKEN_BYTES} bytes")
    shape = tree["image_shape"]
    if shape is not None:
        is_shape = isinstance(shape, list) and len(shape) <= 8
        if not is_shape or not all(type(side) is int and 0 <= side <= 65_536 for side in shape):
            raise BadMessage(f"image_shape is {_show(shape)}; valid: null, or at most 8 whole numbers")
    return Hello(
        client=_text(tree, "client"),
        token=tree["token"],
        model_hash=None if tree["model_hash"] is None else _text(tree, "model_hash"),
        image_shape=None if shape is None else tuple(shape),
        state_size=None if tree["state_size"] is None else _int(tree, "state_size", 0, 65_536),
        action_size=None if tree["action_size"] is None else _int(tree, "action_size", 0, 65_536),
        dt_s=None if tree["dt_s"] is None else _number(tree, "dt_s", 1e-6, 1e6),
    )


_ASK = (
    "id", "episode", "remaining_ns", "network_ns", "images", "state", "instruction", "stamp_ns", "step", "history",
)  # fmt: skip


def _write_ask(m: Ask) -> Tree:
    seen, history = m.observation, m.history
    return {
        "id": m.id, "episode": m.episode, "remaining_ns": int(m.remaining_ns), "network_ns": int(m.network_ns),
        "images": _packed(seen.images, "|u1"), "state": _packed(seen.state, "<f4"), "instruction": seen.instruction,
        "stamp_ns": int(seen.stamp_ns), "step": int(seen.step),
        "history": None if history is None else {
            "tokens": _packed(history.tokens, "<i4"), "consumed": int(history.consumed),
            "num_forced": int(history.num_forced),
            "actions": None if history.actions is None else _packed(history.actions, "<f4"),
        },
    }  # fmt: skip


def _read_ask(tree: Any, sizes: Sizes) -> Ask:
    _only(tree, _ASK, "plan")
    observation = Observation(
        images=_array(tree, "images", "|u1", sizes.image_shape),
        state=_array(tree, "state", "<f4", (sizes.state_size,)),  # may hold NaN: the policy says what that means
        instruction=_text(tree, "instruction"),
        stamp_ns=_int(tree, "stamp_ns", -_INT64, _INT64),
        step=_int(tree, "step", 0, _INT64),
    )
    history = None
    if tree["history"] is not None:
        past = _only(tree["history"], ("tokens", "consumed", "num_forced", "actions"), "history")
        actions = None
        if past["actions"] is not None:
            actions = _finite(_array(past, "actions", "<f4", ((0, sizes.horizon), sizes.action_size)), "actions")
        history = ChunkHistory(
            _token_ids(past, "tokens", sizes), _int(past, "consumed", 0, 2**31 - 1),
            _int(past, "num_forced", 0, sizes.num_tokens), actions,
        )  # fmt: skip
    return Ask(
        id=_int(tree, "id", 0, _INT64),
        episode=_int(tree, "episode", 0, _INT64),
        remaining_ns=_int(tree, "remaining_ns", -_MOST_NS, _MOST_NS),
        network_ns=_int(tree, "network_ns", 0, _MOST_NS),
        observation=observation,
        history=history,
    )


def _write_ping(m: Ping) -> Tree:
    return {"sent_ns": m.sent_ns, "padding": bytes(m.padding)}


def _read_ping(tree: Any, sizes: Sizes) -> Ping:
    _only(tree, ("sent_ns", "padding"), "ping")
    if not isinstance(tree["padding"], bytes):
        raise BadMessage(f"padding is {_show(tree['padding'])}; valid: bytes")
    return Ping(_int(tree, "sent_ns", -_INT64, _INT64), len(tree["padding"]))


def _write_nothing(m: Bye | Unknown) -> Tree:
    return {}


def _read_bye(tree: Any, sizes: Sizes | None) -> Bye:
    _only(tree, (), "bye")
    return Bye()


def _read_unknown(tree: Any, sizes: Sizes | None) -> Unknown:
    _only(tree, (), "unknown")
    return Unknown()


_NAMES = ("mode", "engine", "drafter", "rule", "controller", "precision", "model_hash")
_SIZES = tuple(item.name for item in fields(Sizes))
_LIMITS = ("low", "high", "max_change", "rest")


def _write_welcome(m: Welcome) -> Tree:
    space: dict[str, Any] = {name: _packed(getattr(m.space, name), "<f4") for name in _LIMITS}
    return {
        **{name: _cut(getattr(m, name)) for name in _NAMES}, "is_exact": m.is_exact, "dt_s": m.dt_s,
        "sizes": {**{name: getattr(m.sizes, name) for name in _SIZES}, "image_shape": list(m.sizes.image_shape)},
        "space": {**space, "kinds": [int(kind) for kind in m.space.kinds], "stop_steps": m.space.stop_steps},
        "costs": None if m.costs is None else m.costs.as_json(),
    }  # fmt: skip


def _read_welcome(tree: Any, sizes: Sizes | None) -> Welcome:
    _only(tree, (*_NAMES, "is_exact", "dt_s", "sizes", "space", "costs"), "welcome")
    told = _only(tree["sizes"], _SIZES, "sizes")
    shape = told["image_shape"]
    if not isinstance(shape, list) or len(shape) != 4 or not all(type(s) is int and s <= 65_536 for s in shape):
        raise BadMessage(f"image_shape is {_show(shape)}; valid: four whole numbers")
    numbers = {name: _int(told, name, 1, 1 << 24) for name in _SIZES if name != "image_shape"}
    size = numbers["action_size"]
    limits = _only(tree["space"], (*_LIMITS, "kinds", "stop_steps"), "space")
    arrays = {name: _array(limits, name, "<f4", (size,)) for name in _LIMITS}
    kinds = limits["kinds"]
    is_kinds = isinstance(kinds, list) and len(kinds) == size
    if not is_kinds or not all(type(kind) is int and kind in set(DofKind) for kind in kinds):
        raise BadMessage(f"kinds is {_show(kinds)}; valid: {size} of {[int(kind) for kind in DofKind]}")
    try:
        known = Sizes(image_shape=tuple(shape), **numbers)
        costs = None if tree["costs"] is None else Costs.from_json(tree["costs"], "welcome: costs")
    except BadConfig as error:
        raise BadMessage(str(error)) from None
    return Welcome(
        **{name: _text(tree, name) for name in _NAMES},
        is_exact=_flag(tree, "is_exact"),
        dt_s=_number(tree, "dt_s", 1e-6, 1e6),
        sizes=known,
        space=ActionSpace(
            **arrays, kinds=tuple(DofKind(kind) for kind in kinds), stop_steps=_int(limits, "stop_steps", 1, 1 << 20)
        ),
        costs=costs,
    )


def _write_pong(m: Pong) -> Tree:
    return m._asdict()


def _read_pong(tree: Any, sizes: Sizes | None) -> Pong:
    _only(tree, ("sent_ns", "busy_ns"), "pong")
    return Pong(_int(tree, "sent_ns", -_INT64, _INT64), _int(tree, "busy_ns", 0, _MOST_NS))


def _write_refused(m: Refused) -> Tree:
    return {"message": _cut(m.message), "is_final": m.is_final}


def _read_refused(tree: Any, sizes: Sizes | None) -> Refused:
    _only(tree, ("message", "is_final"), "refused")
    return Refused(_text(tree, "message"), _flag(tree, "is_final"))


_CHUNK_TIMES = ("observation_stamp_ns", "observation_step", "start_ns", "ready_ns", "deadline_ns")
_CHUNK = ("actions", "provenance", "rung", "chunk_id", "instruction", *_CHUNK_TIMES, "tokens", "max_deviation")
_RECORD = ("encode_ns", "decode_ns", "tail_ns", "reason", "num_steps", "num_tokens", "num_verified", "rounds")


def _write_answer(m: Answer) -> Tree:
    chunk, record = m.chunk, m.record
    return {
        "id": m.id, "overtaken_by": m.overtaken_by, "queue_ns": m.queue_ns, "held_ns": m.held_ns,
        "chunk": None if chunk is None else {
            "actions": _packed(chunk.actions, "<f4"), "provenance": _packed(chunk.provenance, "|u1"),
            "rung": int(chunk.rung), "chunk_id": chunk.chunk_id, "instruction": chunk.instruction,
            **{name: int(getattr(chunk, name)) for name in _CHUNK_TIMES},
            "tokens": _packed(chunk.tokens, "<i4"), "max_deviation": float(chunk.max_deviation),
        },
        "record": None if record is None else {
            **{name: int(getattr(record, name)) for name in _RECORD[:-1]},
            "rounds": _packed(np.array(record.rounds, np.int64).reshape(-1, len(Round._fields)), "<i8"),
        },
    }  # fmt: skip


def _read_answer(tree: Any, sizes: Sizes | None) -> Answer:
    _only(tree, ("id", "overtaken_by", "queue_ns", "held_ns", "chunk", "record"), "answer")
    overtaken_by = None if tree["overtaken_by"] is None else _int(tree, "overtaken_by", 0, _INT64)
    if (overtaken_by is None) != (tree["chunk"] is not None) or (tree["chunk"] is None) != (tree["record"] is None):
        raise BadMessage("answer: valid: either a chunk with its record, or the request that overtook it")
    chunk = record = None
    if tree["chunk"] is not None:
        chunk = _read_chunk(tree["chunk"], _of_known_sizes(sizes))
        record = _read_record(tree["record"], chunk)
    return Answer(
        id=_int(tree, "id", 0, _INT64),
        overtaken_by=overtaken_by,
        chunk=chunk,
        record=record,
        queue_ns=_int(tree, "queue_ns", 0, _MOST_NS),
        held_ns=_int(tree, "held_ns", 0, _MOST_NS),
    )


def _read_chunk(tree: Any, sizes: Sizes) -> ActionChunk:
    _only(tree, _CHUNK, "chunk")
    actions = _finite(_array(tree, "actions", "<f4", ((1, sizes.horizon), sizes.action_size)), "actions")
    provenance = _array(tree, "provenance", "|u1", actions.shape)
    if provenance.max() > max(Provenance):
        raise BadMessage(f"provenance has {provenance.max()}; valid: 0..{int(max(Provenance))}")
    return ActionChunk(
        actions=actions,
        provenance=provenance,
        rung=Rung(_int(tree, "rung", 0, max(Rung))),
        chunk_id=_int(tree, "chunk_id", 0, _INT64),
        instruction=_text(tree, "instruction"),
        observation_stamp_ns=_int(tree, "observation_stamp_ns", -_INT64, _INT64),
        observation_step=_int(tree, "observation_step", 0, _INT64),
        start_ns=_int(tree, "start_ns", 0, _MOST_NS),
        ready_ns=_int(tree, "ready_ns", 0, _MOST_NS),
        deadline_ns=_int(tree, "deadline_ns", -2 * _MOST_NS, 2 * _MOST_NS),
        tokens=_token_ids(tree, "tokens", sizes),
        max_deviation=_number(tree, "max_deviation", 0.0, 1e30),
    )


def _read_record(tree: Any, chunk: ActionChunk) -> PlanRecord:
    _only(tree, _RECORD, "record")
    rounds = _array(tree, "rounds", "<i8", ((0, _MOST_ROUNDS), len(Round._fields)))
    return PlanRecord(
        chunk_id=chunk.chunk_id,
        observation_step=chunk.observation_step,
        observation_stamp_ns=chunk.observation_stamp_ns,
        start_ns=chunk.start_ns,
        ready_ns=chunk.ready_ns,
        deadline_ns=chunk.deadline_ns,
        encode_ns=_int(tree, "encode_ns", 0, _MOST_NS),
        decode_ns=_int(tree, "decode_ns", 0, _MOST_NS),
        tail_ns=_int(tree, "tail_ns", 0, _MOST_NS),
        rung=chunk.rung,
        reason=Reason(_int(tree, "reason", 0, max(Reason))),
        num_steps=_int(tree, "num_steps", 0, 1 << 24),
        num_tokens=_int(tree, "num_tokens", 0, 1 << 24),
        num_verified=_int(tree, "num_verified", 0, 1 << 24),
        rounds=tuple(Round(*row) for row in rounds.tolist()),
    )


_WRITERS: dict[type, tuple[str, Callable[[Any], Tree]]] = {
    Hello: ("hello", _write_hello),
    Ask: ("plan", _write_ask),
    Ping: ("ping", _write_ping),
    Bye: ("bye", _write_nothing),
    Welcome: ("welcome", _write_welcome),
    Answer: ("answer", _write_answer),
    Pong: ("pong", _write_pong),
    Refused: ("refused", _write_refused),
    Unknown: ("unknown", _write_nothing),
}
_REQUESTS: dict[str, Callable[[Any, Sizes], Any]] = {
    "hello": _read_hello, "plan": _read_ask, "ping": _read_ping, "bye": _read_bye,
}  # fmt: skip
_REPLIES: dict[str, Callable[[Any, Sizes | None], Any]] = {
    "welcome": _read_welcome, "answer": _read_answer, "pong": _read_pong, "refused": _read_refused,
    "unknown": _read_unknown, "bye": _read_bye,
}  # fmt: skip
