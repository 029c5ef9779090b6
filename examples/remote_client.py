"""A client of `vla-spec serve` in nothing but ZeroMQ, msgpack and numpy: what any other language would do.

    vla-spec serve --engine toy --mode ngram --bind tcp://127.0.0.1:5555
    python examples/remote_client.py tcp://127.0.0.1:5555

Five plans for made-up observations, each due in 100 ms. docs/serving.md has the table of all messages.
"""

import sys
import time

import msgpack
import numpy as np
import zmq

RUNGS = ("EXACT", "RELAXED", "DRAFT_TAIL", "LAST_CHUNK", "HOLD", "STOP")


def ask(socket, kind, **fields):
    """One message there, one back."""
    socket.send(msgpack.packb({"vla": 1, "type": kind, **fields}))
    if not socket.poll(2000):
        sys.exit("no answer within 2 s")
    return msgpack.unpackb(socket.recv())


def pack(array):
    """An array on the wire."""
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": array.tobytes()}


def main():
    """Say hello, ask five times, say goodbye."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(sys.argv[1])
    anything = dict.fromkeys(("model_hash", "image_shape", "state_size", "action_size", "dt_s"))
    welcome = ask(socket, "hello", client="example", token=b"", **anything)
    assert welcome["type"] == "welcome", welcome
    sizes, history, network_ns = welcome["sizes"], None, 0
    images, state = np.full(sizes["image_shape"], 128, np.uint8), np.zeros(sizes["state_size"], np.float32)
    for number in range(5):
        sent_ns = time.monotonic_ns()
        answer = ask(
            socket, "plan", id=number, episode=0, remaining_ns=100_000_000, network_ns=network_ns, images=pack(images),
            state=pack(state), instruction="go to the goal", stamp_ns=sent_ns, step=4 * number, history=history,
        )  # fmt: skip
        took_ns, chunk = time.monotonic_ns() - sent_ns, answer["chunk"]
        network_ns = max(0, took_ns - answer["held_ns"])  # two durations, each by one clock: hosts need no common time
        actions = np.frombuffer(chunk["actions"]["data"], "<f4").reshape(chunk["actions"]["shape"])  # to be played
        rung, ms = RUNGS[chunk["rung"]], (took_ns / 1e6, network_ns / 1e6)
        print(f"chunk {number}: {rung}, {len(actions)} steps, {ms[0]:.1f} ms, of these network {ms[1]:.1f} ms")
        consumed = 4 * sizes["tokens_per_step"]  # 4 steps are played before the next observation
        history = {"tokens": chunk["tokens"], "consumed": consumed, "num_forced": 0, "actions": None}
    socket.send(msgpack.packb({"vla": 1, "type": "bye"}))


if __name__ == "__main__":
    main()
