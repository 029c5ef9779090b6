"""The wire format: what is sent arrives bit for bit, and nothing else is believed."""

import contextlib
import dataclasses
import math

import numpy as np
import pytest
from fake_policy import SPACE
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("msgpack", reason="needs the extra [serve]")

import msgpack

from vla_spec.costs import Costs
from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory
from vla_spec.ladder import Reason
from vla_spec.serving import wire
from vla_spec.serving.wire import (
    PROTOCOL,
    Answer,
    Ask,
    BadMessage,
    Bye,
    Hello,
    Ping,
    Pong,
    Refused,
    Sizes,
    Unknown,
    Welcome,
    WrongVersion,
    decode_reply,
    decode_request,
    encode,
)
from vla_spec.trace import PlanRecord
from vla_spec.types import ActionChunk, Observation, Round, Rung

SIZES = Sizes((2, 4, 5, 3), 4, 8, 4, 32, 4, 256)
RNG = np.random.default_rng(0)


def same(a, b):
    """Equal bit for bit, arrays included."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(
            same(getattr(a, item.name), getattr(b, item.name)) for item in dataclasses.fields(a)
        )
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return type(a) is type(b) and a == b


def observation(instruction="öffne die Schublade", **changes):
    seen = Observation(
        RNG.integers(0, 256, SIZES.image_shape).astype(np.uint8), RNG.random(4).astype(np.float32), instruction, -5, 17
    )
    return dataclasses.replace(seen, **changes)


def ask(history=None, **changes):
    return dataclasses.replace(Ask(3, 1, 50_000_000, 300_000, observation(), history), **changes)


HISTORY = ChunkHistory(np.arange(32, dtype=np.int32), 8, 12, RNG.random((8, 4)).astype(np.float32))
WELCOME = Welcome(
    "exact", "toy", "none", "greedy", "fixed", "fp32", True, "ab" * 32, 0.0125, SIZES, SPACE,
    Costs.constant(1e6, {1: 2e5, 32: 4e5}, {1: 100.0}),
)  # fmt: skip
CHUNK = ActionChunk(
    actions=np.array([[0.1, -1, np.float32(1e-40), 1], [-0.0, 0.5, 3e-8, -1]], np.float32),
    provenance=np.array([[0, 1, 2, 3], [4, 0, 0, 0]], np.uint8),
    rung=Rung.DRAFT_TAIL, chunk_id=2**40, instruction="go", observation_stamp_ns=-(2**60), observation_step=9,
    start_ns=5, ready_ns=70, deadline_ns=-3, tokens=np.array([0, 255, 7], np.int32), max_deviation=0.1 + 0.2,
)  # fmt: skip
RECORD = PlanRecord(
    2**40, 9, -(2**60), 5, 70, -3, 11, 12, 13, Rung.DRAFT_TAIL, Reason.DEADLINE, 2, 3, 1,
    (Round(0, 0, 0, 0, 5, 1, 1, 7, 100, 0), Round(8, 3, 1, 1, 2, 3, 4, 10, 200, 4)),
)  # fmt: skip
REQUESTS = [
    Hello(), Hello("robot", b"\x00\xff" * 8, "ab", (3, 96, 96, 3), 4, 4, 0.0125), Ping(-1, 0), Ping(2**62, 100), Bye(),
    ask(), ask(HISTORY), ask(ChunkHistory(np.empty(0, np.int32), 0)),
    ask(observation=observation(state=np.array([np.nan, np.inf, -0.0, 1], np.float32))),
]  # fmt: skip
REPLIES = [
    WELCOME, dataclasses.replace(WELCOME, costs=None), Pong(5, 0), Refused("no", True), Unknown(), Bye(),
    Answer(3, None, CHUNK, RECORD, 5, 75), Answer(3, 4, None, None, 1, 1),
    Answer(1, None, dataclasses.replace(CHUNK, tokens=np.empty(0, np.int32)), RECORD._replace(rounds=()), 0, 0),
]  # fmt: skip


# --- what is sent arrives ---


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda m: type(m).__name__)
def test_a_request_arrives_bit_for_bit(request_):
    assert same(decode_request(encode(request_), SIZES), request_)


@pytest.mark.parametrize("reply", REPLIES, ids=lambda m: type(m).__name__)
def test_a_reply_arrives_bit_for_bit(reply):
    assert same(decode_reply(encode(reply), SIZES), reply)


def test_a_view_and_big_endian_numbers_arrive_as_the_same_numbers():
    images = np.zeros((2, 4, 5, 6), np.uint8)[..., ::2]
    images[...] = RNG.integers(0, 256, images.shape)
    seen = observation(images=images, state=np.array([1, 2, 3, 4], ">f4"))
    got = decode_request(encode(ask(observation=seen)), SIZES).observation
    assert same(got.images, np.ascontiguousarray(images))
    assert same(got.state, np.array([1, 2, 3, 4], np.float32))
    assert got.images.flags.writeable


@given(st.integers(-(2**63) + 1, 2**63 - 1), st.text(max_size=200), st.integers(0, 32), st.data())
def test_any_valid_request_arrives_bit_for_bit(stamp, words, num_tokens, data):
    tokens = np.array(data.draw(st.lists(st.integers(0, 255), min_size=num_tokens, max_size=num_tokens)), np.int32)
    state = np.array(data.draw(st.lists(st.floats(width=32), min_size=4, max_size=4)), np.float32)
    seen = observation(words, stamp_ns=stamp, state=state)
    sent = ask(ChunkHistory(tokens, data.draw(st.integers(0, 99))), observation=seen)
    if len(words.encode()) <= wire.MAX_TEXT_BYTES:
        assert same(decode_request(encode(sent), SIZES), sent)


def test_the_largest_request_fits_the_limit_that_the_socket_is_given():
    seen = observation("x" * wire.MAX_TEXT_BYTES, stamp_ns=2**62, step=2**62)
    frame = encode(ask(HISTORY, observation=seen, id=2**62, episode=2**62, remaining_ns=-(10**15)))
    assert len(frame) <= SIZES.max_request_bytes
    assert decode_request(frame, SIZES).id == 2**62


# --- what is refused ---


def tree_of(message):
    return msgpack.unpackb(encode(message), raw=False)


def refused(tree, sizes=SIZES):
    with pytest.raises(BadMessage) as caught:
        decode_request(tree if isinstance(tree, bytes) else msgpack.packb(tree), sizes)
    return str(caught.value)


def test_another_version_is_named_with_ours():
    for version in (PROTOCOL + 1, 0, None, "1", 1.0, True):
        with pytest.raises(WrongVersion, match=f"valid: {PROTOCOL}"):
            decode_request(msgpack.packb({**tree_of(Bye()), "vla": version}), SIZES)
    with pytest.raises(WrongVersion, match="protocol version 7"):
        decode_reply(msgpack.packb({"vla": 7, "whatever": 1}), None)


def image(**changes):
    return {**tree_of(ask()), "images": {**tree_of(ask())["images"], **changes}}


@pytest.mark.parametrize(("tree", "words"), [
    (b"", "not msgpack"),
    (b"\x93\x01", "not msgpack"),
    (b"\xc1", "not msgpack"),
    (b"\x80\x80", "not msgpack"),  # two messages in one frame
    (b"\x91" * 3000, "not msgpack"),  # deeply nested
    (b"\xdd\xff\xff\xff\xff", "not msgpack"),  # claims four thousand million elements
    (b"\xc6\xff\xff\xff\xff", "not msgpack"),  # and as many bytes
    (b"\xd6\xff\x00\x00\x00\x00", "not msgpack"),  # an extension type, which some decoder could call code for
    ([1, 2], "a map"),
    (5, "a map"),
    ({"vla": 1}, "type is None"),
    ({"vla": 1, "type": "welcome"}, "from a client; valid: hello, plan, ping, bye"),
    ({"vla": 1, "type": "bye", "more": 1}, "unknown ['more']"),
    ({**tree_of(Hello()), "token": "text"}, "token is 'text'"),
    ({**tree_of(Hello()), "token": bytes(65)}, "token is a bytes of 65; valid: at most 64"),
    ({**tree_of(ask()), "id": -1}, "id is -1"),
    ({**tree_of(ask()), "id": True}, "id is True"),
    ({**tree_of(ask()), "id": 2**64 - 1}, "id is"),
    ({**tree_of(ask()), "id": 1.0}, "id is 1.0"),
    ({**tree_of(ask()), "network_ns": -1}, "network_ns is -1"),
    ({**tree_of(ask()), "remaining_ns": 10**16}, "remaining_ns"),
    ({**tree_of(ask()), "instruction": b"go"}, "instruction is a bytes of 2"),
    (image(dtype="|O8"), "images is '|O8'"),
    (image(dtype="<f4"), "valid: an array of |u1, [2, 4, 5, 3]"),
    (image(shape=[2, 4, 5, 4]), "images has the shape"),
    (image(shape=[2, 4, 15]), "images is"),
    (image(shape=[2, 4, 5, True]), "images has the shape"),
    (image(shape="2453"), "images is"),
    (image(data=b"short"), "images has 5 bytes; valid: 120"),
    (image(data="text"), "images is"),
    (image(more=1), "images is a dict"),
    ({**tree_of(ask()), "history": []}, "history is []"),
    ({**tree_of(ask()), "history": {"tokens": 1}}, "missing ['actions', 'consumed', 'num_forced']"),
])  # fmt: skip
def test_what_is_wrong_is_named(tree, words):
    assert words in refused(tree)


@pytest.mark.parametrize(("history", "words"), [
    (ChunkHistory(np.array([0, 256], np.int32), 0), "tokens has an id outside the domain; valid: 0..255"),
    (ChunkHistory(np.array([-1], np.int32), 0), "tokens has an id outside"),
    (ChunkHistory(np.zeros(33, np.int32), 0), "tokens has the shape [33]"),
    (ChunkHistory(np.zeros(4, np.int32), -1), "consumed is -1"),
    (ChunkHistory(np.zeros(4, np.int32), 0, 33), "num_forced is 33"),
    (ChunkHistory(np.zeros(4, np.int32), 0, 0, np.full((1, 4), np.nan, np.float32)), "not finite"),
    (ChunkHistory(np.zeros(4, np.int32), 0, 0, np.zeros((9, 4), np.float32)), "actions has the shape [9, 4]"),
])  # fmt: skip
def test_a_history_that_can_not_be_is_refused(history, words):
    """Drafters index tables with its tokens."""
    assert words in refused(encode(ask(history)))


def test_a_long_text_and_an_oversized_message_are_refused():
    assert "not msgpack" in refused(encode(ask(observation=observation("x" * 1025))))
    assert f"valid: at most {SIZES.max_request_bytes}" in refused(bytes(SIZES.max_request_bytes + 1))
    assert "not msgpack" in refused(msgpack.packb({"vla": 1, "type": "ping", "sent_ns": 0, "padding": [0] * 2000}))


def test_a_key_that_occurs_twice_is_refused():
    frame = b"\x83" + b"".join(map(msgpack.packb, ("vla", 1, "type", "bye", "type", "ping")))
    assert "twice" in refused(frame)


def test_a_chunk_before_the_welcome_is_refused():
    with pytest.raises(BadMessage, match="before the welcome"):
        decode_reply(encode(Answer(3, None, CHUNK, RECORD, 5, 75)), None)


@pytest.mark.parametrize(("change", "words"), [
    ({"actions": np.full((1, 4), np.nan, np.float32), "provenance": np.zeros((1, 4), np.uint8)}, "not finite"),
    ({"actions": np.zeros((9, 4), np.float32), "provenance": np.zeros((9, 4), np.uint8)}, "shape [9, 4]"),
    ({"actions": np.zeros((0, 4), np.float32), "provenance": np.zeros((0, 4), np.uint8)}, "shape [0, 4]"),
    ({"actions": np.zeros((1, 5), np.float32), "provenance": np.zeros((1, 5), np.uint8)}, "shape [1, 5]"),
    ({"provenance": np.full((2, 4), 5, np.uint8)}, "provenance has 5"),
    ({"provenance": np.zeros((1, 4), np.uint8)}, "provenance has the shape"),
    ({"rung": 6}, "rung is 6"),
    ({"tokens": np.array([256], np.int32)}, "outside the domain"),
    ({"max_deviation": float("nan")}, "max_deviation is nan"),
    ({"max_deviation": float("inf")}, "max_deviation is inf"),
])  # fmt: skip
def test_a_chunk_that_can_not_be_is_refused(change, words):
    """A robot moves by it."""
    with pytest.raises(BadMessage) as caught:
        decode_reply(encode(Answer(3, None, dataclasses.replace(CHUNK, **change), RECORD, 5, 75)), SIZES)
    assert words in str(caught.value)


def test_an_answer_is_a_chunk_or_overtaken_and_not_both_or_neither():
    for broken in (
        Answer(3, 4, CHUNK, RECORD, 0, 0),
        Answer(3, None, None, None, 0, 0),
        Answer(3, None, CHUNK, None, 0, 0),
    ):
        with pytest.raises(BadMessage, match="either a chunk"):
            decode_reply(encode(broken), SIZES)


@pytest.mark.parametrize(("key", "value", "words"), [
    ("sizes", {**tree_of(WELCOME)["sizes"], "horizon": 0}, "horizon is 0"),
    ("sizes", {**tree_of(WELCOME)["sizes"], "image_shape": [3, 96, 96, 1]}, "sizes are"),
    ("sizes", {**tree_of(WELCOME)["sizes"], "action_size": 5}, "low has the shape [4]"),
    ("space", {**tree_of(WELCOME)["space"], "kinds": [0, 0, 0, 9]}, "kinds"),
    ("costs", {"prefill": {}}, "not a cost table"),
    ("dt_s", 0, "dt_s is 0"),
    ("is_exact", 1, "is_exact is 1"),
])  # fmt: skip
def test_a_welcome_that_can_not_be_is_refused(key, value, words):
    with pytest.raises(BadMessage) as caught:
        decode_reply(msgpack.packb({**tree_of(WELCOME), key: value}), None)
    assert words in str(caught.value)


def test_sizes_are_checked_where_they_are_made():
    with pytest.raises(BadConfig, match="whole numbers from 1"):
        dataclasses.replace(SIZES, horizon=0)


# --- fuzzed ---


def survives(frame):
    """Either a message or BadMessage, from both ends; nothing else."""
    for decode in (lambda: decode_request(frame, SIZES), lambda: decode_reply(frame, SIZES)):
        with contextlib.suppress(BadMessage):
            decode()


@given(st.binary(max_size=400))
def test_random_bytes_never_crash(frame):
    survives(frame)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=20)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(PLAIN, st.sampled_from(["hello", "plan", "ping", "bye", "welcome", "answer", "pong", "refused", "unknown"]))
def test_random_trees_never_crash(tree, name):
    survives(msgpack.packb(tree))
    survives(msgpack.packb({"vla": 1, "type": name, **(tree if isinstance(tree, dict) else {"x": tree})}))


def paths_of(tree, path=()):
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield from paths_of(value, (*path, key))


def with_value(tree, path, value):
    if not path:
        return value
    copied = dict(tree) if isinstance(tree, dict) else list(tree)
    copied[path[0]] = with_value(tree[path[0]], path[1:], value)
    return copied


TREES = [tree_of(message) for message in (*REQUESTS, *REPLIES)]


@given(st.sampled_from(TREES), st.data())
def test_any_value_anywhere_in_a_valid_message_never_crashes(tree, data):
    path = data.draw(st.sampled_from(list(paths_of(tree))))
    survives(msgpack.packb(with_value(tree, path, data.draw(PLAIN))))


@given(st.sampled_from([encode(message) for message in (*REQUESTS, *REPLIES)]), st.data())
def test_flipped_cut_and_inserted_bytes_never_crash(frame, data):
    at = data.draw(st.integers(0, len(frame) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    if kind == "flip":
        frame = frame[:at] + bytes([frame[at] ^ data.draw(st.integers(1, 255))]) + frame[at + 1 :]
    else:
        frame = frame[:at] + (data.draw(st.binary(min_size=1, max_size=8)) + frame[at:] if kind == "insert" else b"")
    survives(frame)


@pytest.mark.parametrize("message", [*REQUESTS, *REPLIES], ids=lambda m: type(m).__name__)
def test_every_truncation_is_refused(message):
    frame = encode(message)
    for length in range(len(frame)):
        with pytest.raises(BadMessage):
            decode_request(frame[:length], SIZES)
        with pytest.raises(BadMessage):
            decode_reply(frame[:length], SIZES)
