"""Build the index of the drafter `retrieval` from recorded demonstrations: what the target sees, and the chunk for it.

Demonstrations are files of `vla-spec collect`, ``DIR/task/seed.npz``. Each picture goes through the target's prefill;
its last prompt row is the key. The chunk is either the target's own (decoded exactly, so that its tokens are the ones
that the target writes) or the expert's actions, as in HeiSD, arXiv:2603.17573.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vla_spec.assemble import Assembler, Assembly
from vla_spec.config import Config
from vla_spec.drafters._retrieval_index import RetrievalIndex
from vla_spec.errors import BadConfig
from vla_spec.progress import Reporter
from vla_spec.robots._metaworld_tasks import TASKS
from vla_spec.runtime import NO_DEADLINE_NS
from vla_spec.types import Float32, Int32, Observation


class Frame(NamedTuple):
    """One recorded picture: what was seen, and what the expert did from then on, float32 [h, A]."""

    observation: Observation
    actions: Float32


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """What to index.

    Attributes:
        data: folder of demonstrations.
        tasks: None = all that are there.
        seeds: of the episodes; those that are not there are left out.
        every: keep each so-many-th picture of an episode.
        key_size: K.
        chunks: whose actions the drafts are.
    """

    data: Path
    tasks: tuple[str, ...] | None
    seeds: range
    every: int = 2
    key_size: int = 64
    chunks: Literal["target", "demonstration"] = "target"


def build_index(config: Config, plan: IndexPlan, progress: Reporter) -> RetrievalIndex:
    """Read, prefill (and decode), project.

    Args:
        config: an exact mode of the target; its decoder writes the chunks.
        plan: what to index.
        progress: told about every episode.

    Raises:
        BadConfig: no demonstrations, or broken ones.
        VlaSpecError: the mode can't be built.
    """
    files = demonstration_files(plan.data, plan.tasks, plan.seeds)
    assembler = Assembler()
    adapter = assembler.adapter(config)
    horizon = adapter.domain.num_tokens // adapter.domain.tokens_per_step
    first = next((frame for path in files for frame in frames_of(path, plan.every, horizon)), None)
    if first is None:
        raise BadConfig(f"--data {plan.data}: none of {len(files)} episodes has pictures (failed ones have none)")
    assembly = assembler.assemble(config, first.observation)
    if not assembly.rule.exact:
        raise BadConfig(f"mode {config.mode!r} is not exact; the index needs the target's own tokens")
    features: list[Float32] = []
    tokens: list[Int32] = []
    tasks: dict[str, int] = {}
    progress.phase("indexing", len(files))
    for path in files:
        for frame in frames_of(path, plan.every, horizon):
            row, chunk = _entry(assembly, frame, plan.chunks)
            features.append(row)
            tokens.append(chunk)
            tasks[path.parent.name] = tasks.get(path.parent.name, 0) + 1
        progress.step(f"{path.parent.name} {path.stem}")
    stacked = np.stack(features)  # [n, D]
    about: dict[str, Any] = {
        "chunks": plan.chunks, "every": plan.every, "num_episodes": len(files), "entries_by_task": tasks,
        "seeds": [plan.seeds.start, plan.seeds.stop], "key_size": plan.key_size,
    }  # fmt: skip
    size = min(plan.key_size, *stacked.shape)
    return RetrievalIndex.from_features(stacked, np.stack(tokens), size, assembly.engine.info.model_hash, about)


def _entry(assembly: Assembly, frame: Frame, chunks: str) -> tuple[Float32, Int32]:
    inputs = assembly.adapter.encode(frame.observation)
    if chunks == "target":
        decoded = assembly.policy.decoder.decode(inputs, assembly.clock.now_ns() + NO_DEADLINE_NS)
        tokens = decoded.tokens
        num_committed = len(tokens) - 1
    else:
        assembly.engine.prefill(inputs)
        tokens, num_committed = assembly.adapter.tokenizer.encode(frame.actions), 0
    features = assembly.engine.features
    if not isinstance(features, np.ndarray):
        raise BadConfig(f"engine {assembly.engine.info.name!r} gives no features on the host; retrieval needs them")
    # The last decoded token has no row, and rows behind the prompt belong to the tokens before it.
    return features[assembly.engine.length - num_committed - 1].copy(), tokens


def demonstration_files(data: Path, tasks: tuple[str, ...] | None, seeds: range) -> list[Path]:
    """Files of `vla-spec collect`, ``data/task/seed.npz``, of these tasks (None = all there are) and seeds.

    Raises:
        BadConfig: no such folder, task or seed.
    """
    found = sorted(path.name for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
    if not found:
        raise BadConfig(f"--data {data}: no demonstrations (DIR/task/seed.npz); `vla-spec collect` records them")
    missing = sorted(set(tasks or ()) - set(found))
    if missing:
        raise BadConfig(f"--tasks {missing[0]}: not in {data}; have {', '.join(found)}")
    paths = [data / task / f"{seed}.npz" for task in tasks or found for seed in seeds]
    files = [path for path in paths if path.is_file()]
    if not files:
        raise BadConfig(f"--data {data}: no episode with a seed in {seeds.start}..{seeds.stop - 1}")
    return files


def frames_of(path: Path, every: int, horizon: int) -> Iterator[Frame]:
    """Each so-many-th picture of an episode that has ``horizon`` actions behind it.

    Raises:
        BadConfig: not a demonstration, or of an unknown task.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            images, steps, state, labels = (file[name] for name in ("images", "steps", "state", "labels"))
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise BadConfig(f"{path}: not a demonstration of `vla-spec collect` ({error})") from None
    task = TASKS.get(path.parent.name)
    if task is None:
        raise BadConfig(f"{path}: no task named {path.parent.name!r}; have {', '.join(TASKS)}")
    instruction = task.phrasings[int(path.stem) % len(task.phrasings)]
    for i in range(0, len(images), every):
        step = int(steps[i])
        if step + horizon <= len(labels):
            seen = Observation(images[i], state[step].astype(np.float32), instruction, 0, step)
            yield Frame(seen, labels[step : step + horizon].astype(np.float32))
