"""Recorded observations to calibrate on: as many of every task, spread over its episodes, with a hash of them.

They come from demonstrations (`vla-spec collect`), or from episodes that the policy itself plays in the simulator; the
latter are what it meets when it runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, final

import numpy as np

from vla_spec.assemble import Assembler
from vla_spec.calib.retrieval import demonstration_files, frames_of
from vla_spec.config import Config
from vla_spec.errors import BadConfig
from vla_spec.evaluation import first_observation, record, task_names
from vla_spec.progress import Reporter
from vla_spec.types import Observation


class Recorded(NamedTuple):
    """One observation, and where it is from."""

    task: str
    seed: int
    observation: Observation


@final
class Observations:
    """Observations of several tasks, as many of each as possible.

    Args:
        items: in any order.
    """

    def __init__(self, items: Sequence[Recorded]) -> None:
        self.items = tuple(items)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def by_task(self) -> dict[str, int]:
        """Task -> how many."""
        tasks = [item.task for item in self.items]
        return {task: tasks.count(task) for task in sorted(set(tasks))}

    @property
    def sha256(self) -> str:
        """Of pictures, states, instructions and where they are from."""
        digest = hashlib.sha256()
        for task, seed, seen in self.items:
            state = np.asarray(seen.state, np.float32)
            head = f"{task} {seed} {seen.step} {seen.instruction} {seen.images.shape} {state.shape}\n"
            digest.update(head.encode())
            digest.update(np.ascontiguousarray(seen.images).tobytes())
            digest.update(state.tobytes())
        return digest.hexdigest()

    def provenance(self) -> dict[str, object]:
        """What a calibration file says about them."""
        seeds = [item.seed for item in self.items]
        return {
            "count": len(self), "by_task": self.by_task, "seeds": [min(seeds), max(seeds)], "sha256": self.sha256,
        }  # fmt: skip


def stratified(pool: Mapping[str, Sequence[Recorded]], count: int) -> Observations:
    """``count`` observations, as many of every task (to one), evenly spaced among the task's own.

    Raises:
        BadConfig: fewer than one of every task, or a task that has too few.
    """
    tasks = sorted(pool)
    if count < len(tasks) or not tasks:
        raise BadConfig(f"observations {count}: valid: at least {max(len(tasks), 1)}, one of every task")
    items: list[Recorded] = []
    for i, task in enumerate(tasks):
        wanted = count // len(tasks) + (i < count % len(tasks))
        have = pool[task]
        if len(have) < wanted:
            raise BadConfig(
                f"observations {count}: {wanted} of task {task or 'without a name'} are needed and {len(have)} are "
                f"recorded; valid: fewer observations or more episodes"
            )
        items += [have[int(j)] for j in np.linspace(0, len(have) - 1, wanted).round()]
    return Observations(items)


def demonstrated_observations(data: Path, tasks: tuple[str, ...] | None, seeds: range, count: int) -> Observations:
    """Of episodes that `vla-spec collect` recorded.

    Raises:
        BadConfig: no such folder, unknown tasks, broken files, or too few observations.
    """
    files = demonstration_files(data, tasks, seeds)
    by_task: dict[str, list[Path]] = {}
    for file in files:
        by_task.setdefault(file.parent.name, []).append(file)
    pool: dict[str, list[Recorded]] = {}
    for task, episodes in by_task.items():
        # Enough of each episode and not more: a picture is large. Any but one may have failed, which leaves it none.
        kept = -(-count // len(by_task))
        pool[task] = []
        for file in episodes:
            frames = [frame.observation for frame in frames_of(file, 1, 0)]
            for i in np.unique(np.linspace(0, len(frames) - 1, kept).round()) if frames else ():
                seen = frames[int(i)]
                pool[task].append(Recorded(task, int(file.stem), replace(seen, images=seen.images.copy())))
    return stratified(pool, count)


def closed_loop_observations(
    assembler: Assembler, config: Config, tasks: Sequence[str] | None, splits: Sequence[tuple[range, int]],
    max_steps: int, progress: Reporter,
) -> list[Observations]:  # fmt: skip
    """Of episodes that this policy plays, in lock step.

    Args:
        assembler: builds robot and policy.
        config: the mode that plays.
        tasks: None = all that the robot has.
        splits: seeds and number of observations of each set.
        max_steps: control steps of an episode.
        progress: told about every episode.

    Raises:
        BadConfig: too few observations.
        VlaSpecError: whatever robot or policy refuse.
    """
    names = task_names(config.robot, tasks)
    example = first_observation(assembler, config.robot, names[0], splits[0][0][0])
    assembly = assembler.assemble(config, example)
    out = []
    for seeds, count in splits:
        pool: dict[str, list[Recorded]] = {}
        # One seed at a time, so that every episode contributes.
        for seed in seeds:
            for one in record(assembler, assembly, names, range(seed, seed + 1), max_steps, count, progress):
                pool.setdefault(one.task, []).extend(Recorded(one.task, one.seed, seen) for seen in one.observations)
        out.append(stratified(pool, count))
    return out
