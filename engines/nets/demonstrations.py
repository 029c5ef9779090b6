"""Demonstrations in memory: every frame with the words, the state and the next H actions that belong to it."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np

from vla_spec.errors import BadConfig
from vla_spec.robots._metaworld_tasks import TASKS

PADDING, UNKNOWN = 0, 1


def split_words(sentence: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"[a-z0-9']+", sentence.lower())


def build_vocabulary() -> list[str]:
    """All words of the training sentences; index 0 is padding, 1 an unknown word."""
    words = {word for task in TASKS.values() for phrase in task.phrasings for word in split_words(phrase)}
    return ["<pad>", "<unk>", *sorted(words)]


def encode_words(sentence: str, vocabulary: list[str], max_words: int) -> np.ndarray:
    """Sentence -> int64 [max_words]."""
    ids = [vocabulary.index(w) if w in vocabulary else UNKNOWN for w in split_words(sentence)][:max_words]
    return np.array(ids + [PADDING] * (max_words - len(ids)), np.int64)


def encode_phrasings(vocabulary: list[str], max_words: int) -> np.ndarray:
    """The training sentences of all tasks, int64 [tasks, phrasings, max_words]."""
    return np.array([[encode_words(p, vocabulary, max_words) for p in task.phrasings] for task in TASKS.values()])


class Demonstrations:
    """All frames of one or more folders of episodes.

    Attributes:
        images: uint8 [N, cameras, s, s, 3]; about 83 kB a frame, so 70,000 frames take 6 GB.
        state: float32 [N, 4]. actions: float32 [N, H, 4], the expert's next H actions (the last one repeated).
        task: int32 [N], index into `TASKS`. is_validation: bool [N].

    Raises:
        BadConfig: no frames in these folders, or a file that is not a demonstration.
    """

    def __init__(self, folders: list[Path], horizon: int, limit: int | None = None) -> None:
        files = []
        for folder in folders:
            for t, name in enumerate(TASKS):
                found = sorted((folder / name).glob("*.npz"), key=_seed)[:limit]
                files += [(file, t, i >= len(found) - 2 and len(found) > 10) for i, file in enumerate(found)]
        count = 0
        for file, _, _ in files:
            try:
                with np.load(file, allow_pickle=False) as data:
                    count += len(data["steps"])
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise BadConfig(
                    f"{file}: not a demonstration ({type(error).__name__}); delete it and `vla-spec collect` it again"
                ) from error
        if not count:
            raise BadConfig(
                f"--data {', '.join(map(str, folders))}: no frames for any of the tasks {', '.join(TASKS)}; "
                f"`vla-spec collect` writes them"
            )
        self.state = np.empty((count, 4), np.float32)
        self.actions = np.empty((count, horizon, 4), np.float32)
        self.task = np.empty(count, np.int32)
        self.episode = np.empty(count, np.int32)
        self.step = np.empty(count, np.int32)
        self.is_validation = np.empty(count, bool)
        self.images = np.empty((0,), np.uint8)
        at = 0
        for e, (file, t, validation) in enumerate(files):
            with np.load(file, allow_pickle=False) as data:
                steps, labels, n = data["steps"], data["labels"], len(data["steps"])
                if not n:
                    continue
                if not self.images.size:
                    self.images = np.empty((count, *data["images"].shape[1:]), np.uint8)
                self.images[at : at + n] = data["images"]
                self.state[at : at + n] = data["state"][steps]
            ahead = np.minimum(steps[:, None] + np.arange(horizon), len(labels) - 1)
            self.actions[at : at + n] = labels[ahead]
            self.task[at : at + n], self.is_validation[at : at + n] = t, validation
            self.episode[at : at + n], self.step[at : at + n] = e, steps
            at += n

    def __len__(self) -> int:
        return len(self.task)


def _seed(file: Path) -> int:
    """Files are named by the seed of their episode."""
    if not file.stem.isdecimal():
        raise BadConfig(f"{file}: not a demonstration; they are named SEED.npz, as in 17.npz")
    return int(file.stem)


def augment(images: np.ndarray, rng: np.random.Generator, shift: int) -> np.ndarray:
    """Shift each picture by up to ``shift`` pixels (edges repeated), scale brightness and contrast. uint8."""
    n, cameras, height, width, _ = images.shape
    out = np.empty_like(images)
    rows, columns = np.arange(height), np.arange(width)
    for i in range(n):
        gain, offset = rng.uniform(0.85, 1.15), rng.uniform(-15, 15)
        table = np.clip(np.arange(256) * gain + offset, 0, 255).astype(np.uint8)
        for c in range(cameras):
            dy, dx = rng.integers(-shift, shift + 1, 2)
            moved = images[i, c]
            if dy or dx:
                moved = moved[np.clip(rows + dy, 0, height - 1)][:, np.clip(columns + dx, 0, width - 1)]
            out[i, c] = table[moved]
    return out
