"""Servers and clients on real sockets, with policies whose engine can be stopped in the middle of a plan."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from fake_policy import DOMAIN, SPACE, A, FakeEngine, H, T, make_policy

from vla_spec.serving.client import ClientOptions, RemotePlanner
from vla_spec.serving.server import PlanServer, ServerOptions
from vla_spec.serving.wire import Sizes, Welcome
from vla_spec.types import Observation

#: Nothing that is waited for takes so long, not even on a busy machine [s].
PATIENCE_S = 20.0
SIZES = Sizes((3, 16, 16, 3), 4, H, A, T, DOMAIN.tokens_per_step, DOMAIN.vocab_size)
WELCOME = Welcome("exact", "fake", "fake", "greedy", "fake", "fp32", True, "ab" * 32, 0.0125, SIZES, SPACE, None)
ANYWHERE = "tcp://127.0.0.1:*"


class RealClock:
    """A clock that goes by itself; what engines are charged has passed already."""

    @staticmethod
    def now_ns():
        return time.monotonic_ns()

    def advance(self, duration_ns):
        pass


@dataclass
class Gate:
    """Plans stop here until it is opened."""

    is_open: threading.Event = field(default_factory=threading.Event)
    #: Released once for each plan that came to the gate.
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def pass_through(self):
        self.arrived.release()
        assert self.is_open.wait(PATIENCE_S), "the gate was never opened"

    def wait_for_arrival(self):
        assert self.arrived.acquire(timeout=PATIENCE_S), "no plan came to the gate"


class GatedEngine(FakeEngine):
    """Stops in its prefill while the gate is closed."""

    gate: Gate | None = None

    def prefill(self, inputs):
        if self.gate is not None:
            self.gate.pass_through()
        return super().prefill(inputs)


def gated_policy(gate=None, offset=0):
    engine = GatedEngine(RealClock(), np.arange(T, dtype=np.int32) + 100 + offset)
    engine.gate = gate
    return make_policy(RealClock(), engine)


@contextmanager
def serving(*policies, bind=ANYWHERE, welcome=WELCOME, keys=None, tell=None, **options):
    """A server that plans in a thread; what it raised is raised at the end."""
    policies = policies or (gated_policy(),)
    server = PlanServer(welcome, policies, ServerOptions(bind, **options), keys, time.monotonic_ns, tell)
    server.start()
    raised = []

    def run():
        try:
            server.run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the server did not end"
        if raised:
            raise raised[0]


@contextmanager
def connected(address, *, hello=None, keys=None, is_connected=True, **options):
    """A client, connected unless it is said otherwise."""
    planner = RemotePlanner(ClientOptions(address, **options), hello, keys)
    try:
        if is_connected:
            planner.connect(PATIENCE_S)
        yield planner
    finally:
        planner.close()


def observation(step=0, instruction="go", image=None, state=None):
    images = np.full((3, 16, 16, 3), step % 256, np.uint8) if image is None else image
    return Observation(images, np.zeros(4, np.float32) if state is None else state, instruction, step * 1000, step)
