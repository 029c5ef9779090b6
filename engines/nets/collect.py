"""Collect demonstrations in Meta-World: rendered pictures, the arm's own state, and the expert's action at each step.

Actions that are executed carry correlated noise (DART, Laskey et al. 2017, arXiv:1703.09327) and some episodes have a
stretch of random drift, so that the expert shows how to recover; the labels stay clean. With a policy at hand, part of
an episode is driven by it and the expert only labels (DAgger, Ross et al. 2011, arXiv:1011.0686).

One file per episode, written atomically: stop and start again at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vla_spec.atomic import replacing
from vla_spec.robots._metaworld_tasks import TASKS
from vla_spec.robots.metaworld import MetaWorldRobot
from vla_spec.types import Float32, Observation

FRAME_EVERY = 2  # a picture every second control step
MAX_STEPS = 200
STEPS_AFTER_SUCCESS = 10

#: A policy as collection needs it: an observation in, actions float32 [h, 4] out.
Act = Callable[[Observation], Float32]


class Episode(NamedTuple):
    """images uint8 [f, cameras, s, s, 3]; steps int32 [f] (their control steps); state [n, 4]; labels [n, 4]."""

    images: np.ndarray
    steps: np.ndarray
    state: np.ndarray
    labels: np.ndarray
    is_success: bool


def run_episode(robot: MetaWorldRobot, seed: int, policy: Act | None, execute_horizon: int = 4) -> Episode:
    """One episode. With a policy, stretches of it are driven by the policy, the rest by the noisy expert."""
    rng = np.random.default_rng(seed)
    robot.reset(seed)
    scale = rng.uniform(0, 0.4)
    noise = np.zeros(3, np.float32)
    drift_steps = rng.integers(8, 25) if policy is None and rng.random() < 0.35 else 0
    drift = rng.uniform(-1, 1, 3).astype(np.float32)
    drift_start = int(rng.integers(0, 40))
    images, steps, states, labels = [], [], [], []
    planned: Float32 = np.zeros((0, 4), np.float32)
    by_policy = policy is not None
    last = MAX_STEPS
    step = 0
    while step < min(last, MAX_STEPS):
        label = robot.expert_action()
        states.append(robot.state)
        labels.append(label)
        picture = None
        if step % FRAME_EVERY == 0:
            picture = robot.render()
            images.append(picture)
            steps.append(step)
        noise = (0.8 * noise + 0.6 * scale * rng.standard_normal(3)).astype(np.float32)
        action = label.copy()
        if by_policy and policy is not None:
            if len(planned) == 0:
                picture = robot.render() if picture is None else picture
                seen = Observation(picture, robot.state, robot.instruction, 0, step)
                planned = policy(seen)[:execute_horizon]
            action, planned = planned[0], planned[1:]
        else:
            action[:3] += noise
            if drift_start <= step < drift_start + drift_steps:
                action[:3] = drift
        robot.act(action, 0)
        step += 1
        if policy is not None and len(planned) == 0 and rng.random() < (0.03 if by_policy else 0.08):
            by_policy = not by_policy
        if robot.is_success and last == MAX_STEPS:
            last = step + STEPS_AFTER_SUCCESS
    return Episode(np.stack(images), np.array(steps, np.int32), np.stack(states), np.stack(labels), robot.is_success)


def collect_task(
    out: Path,
    task: str,
    seeds: range,
    policy: Act | None = None,
    keep_failures: bool = False,
    progress: Callable[[str, bool], None] | None = None,
) -> None:
    """Write each ``out/task/seed.npz`` that is not there yet. Failed expert episodes are kept without frames."""
    folder = out / task
    folder.mkdir(parents=True, exist_ok=True)
    todo = [seed for seed in seeds if not (folder / f"{seed}.npz").exists()]
    if not todo:
        return
    robot = MetaWorldRobot(task)
    phrasings = TASKS[task].phrasings
    for seed in todo:
        robot.instruction = phrasings[seed % len(phrasings)]
        episode = run_episode(robot, seed, policy)
        good = episode.is_success or keep_failures
        n = len(episode.steps) if good else 0
        with replacing(folder / f"{seed}.npz") as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                images=episode.images[:n],
                steps=episode.steps[:n],
                state=episode.state,
                labels=episode.labels,
            )
        if progress is not None:
            progress(task, episode.is_success)
    robot.close()
