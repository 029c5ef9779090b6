"""What drafters with a network of their own have in common: its graph on the target's runtime, its cache, its sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, final

import numpy as np

from vla_spec.engines._drafter_runtime import runtime_for
from vla_spec.engines._graph_runtime import Array, Call, GraphRuntime
from vla_spec.engines._model_files import ModelFiles
from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines.nets.head_config import TARGET_KEY, HeadConfig
from vla_spec.errors import BadModel
from vla_spec.plugins import Parts
from vla_spec.types import Int32

#: Name as input and as output of the cache tensors, in the order of the state.
CACHE = (("past_key", "present_key"), ("past_value", "present_value"))


class Tied(NamedTuple):
    """A call with its buffers, by the names that they have in the graph."""

    arrays: dict[str, Array]
    call: Call


@final
class HeadGraph:
    """The network of a drafter. Not thread-safe.

    Args:
        file: its graph.
        runtime: what runs it.
        config: its sizes.
        rows: R, of its cache.
        inputs, outputs: name -> dtype and shape, in which a letter stands for a size that a call chooses.
        most: letter -> its largest size.

    Raises:
        BadModel: the graph is missing or of another form.
    """

    def __init__(
        self, file: Path, runtime: GraphRuntime, config: HeadConfig, rows: int,
        inputs: Mapping[str, tuple[type, tuple[int | str, ...]]],
        outputs: Mapping[str, tuple[type, tuple[int | str, ...]]], most: Mapping[str, int],
    ) -> None:  # fmt: skip
        self.config, self.rows = config, rows
        self._runtime, self._most = runtime, dict(most)
        self._graph = runtime.open(file)
        found = {name for name in self._graph.inputs if not name.startswith("past_")}
        if found != set(inputs):
            raise BadModel(
                f"{file}: its inputs are {', '.join(sorted(found))}; valid: {', '.join(sorted(inputs))}; it was "
                f"exported in another form, export it again"
            )
        self._specs = {**inputs, **outputs}
        tiers = runtime.tiers
        self._sizes = {} if tiers is None else {letter: thinned(tiers, n) for letter, n in most.items()}
        self.state = runtime.state((2, 1, config.num_heads, rows, config.head_width))
        self._whole: dict[str, Array] = {}
        self._tied: dict[tuple[int, ...], Tied] = {}
        if self._sizes:
            self._prepare()

    def padded(self, letter: str, size: int) -> int:
        """The smallest size in use that holds so many.

        A runtime with tiers prepares, or captures, each size that is in use, so these are few. Without tiers every size
        is in use.
        """
        return next((known for known in self._sizes.get(letter, ()) if known >= size), size)

    def tied(self, *sizes: int) -> Tied:
        """The call of these sizes, in the order of ``most``; its buffers are reused by every call of these sizes."""
        tied = self._tied.get(sizes)
        if tied is None:
            at = dict(zip(self._most, sizes, strict=True))
            arrays = {name: self._array(name, kind, shape, at) for name, (kind, shape) in self._specs.items()}
            tied = self._tied[sizes] = Tied(arrays, self._graph.tie(arrays, self.state, CACHE))
        return tied

    def _prepare(self) -> None:
        """Run every size once: what a runtime does then, capture it say, must not happen while a robot waits."""
        for sizes in itertools.product(*self._sizes.values()):
            arrays, call = self.tied(*sizes)
            arrays["mask"][:] = True  # a softmax over nothing would be NaN
            call.run()
        self.state.clear()

    def _array(self, name: str, kind: type, shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> Array:
        """Calls of different sizes share memory, except where few sizes occur and neighbours are copied at once."""
        wanted = tuple(sizes[d] if isinstance(d, str) else d for d in shape)
        if self._runtime.tiers is not None:
            return self._runtime.empty(wanted, kind)
        if name not in self._whole:
            largest = tuple(self._most[d] if isinstance(d, str) else d for d in shape)
            self._whole[name] = self._runtime.empty((math.prod(largest),), kind)
        return self._whole[name][: math.prod(wanted)].reshape(wanted)


def thinned(tiers: Sequence[int], most: int) -> tuple[int, ...]:
    """Those below ``most`` that are at least four times the one before, and ``most``: few sizes, little padding."""
    sizes: list[int] = []
    for tier in tiers:
        if tier < most and (not sizes or tier >= 4 * sizes[-1]):
            sizes.append(tier)
    return (*sizes, most)


def open_head(name: str, parts: Parts) -> tuple[Path, HeadConfig, GraphRuntime]:
    """File and sizes of a head in the target's model folder, and what runs it.

    Raises:
        BadModel: no model folder, a file is missing, or it was distilled for another policy.
    """
    if parts.model_dir is None:
        raise BadModel(f"drafter {name} needs a model folder; set `model:` in the configuration")
    file, weights = parts.model_dir / f"{name}.onnx", parts.model_dir / f"{name}.safetensors"
    if not (file.is_file() and weights.is_file()):
        absent = weights if file.is_file() else file
        raise BadModel(f"{absent}: missing; `vla-spec export` writes it after `vla-spec distill`")
    metadata = WeightsFile.open(weights).metadata
    config = HeadConfig.from_json(metadata.get("config", ""), str(weights))
    check_target(weights, metadata, ModelFiles.describe(parts.model_dir).weights_sha256)
    if config.num_bins != parts.domain.vocab_size or config.num_tokens < parts.domain.num_tokens:
        raise BadModel(
            f"{weights}: for {config.num_tokens} tokens of {config.num_bins}; valid: {parts.domain.num_tokens} of "
            f"{parts.domain.vocab_size}"
        )
    return file, config, runtime_for(parts, parts.model_dir)


def check_target(weights: Path, metadata: Mapping[str, str], target_sha256: str) -> None:
    """A head reads the hidden states of one policy; those of another one of the same size mean nothing to it.

    Raises:
        BadModel: the file says another policy, or none.
    """
    found = metadata.get(TARGET_KEY)
    if found != target_sha256:
        says = f"distilled for the policy {found[:12]}…" if found else "does not say for which policy it was distilled"
        raise BadModel(
            f"{weights}: {says}; valid: {target_sha256[:12]}…, the policy of this folder; distill and export it again"
        )


def common_length(a: Int32, b: Int32) -> int:
    """Length of the longest common prefix."""
    shared = min(len(a), len(b))
    differs = np.flatnonzero(a[:shared] != b[:shared])
    return int(differs[0]) if len(differs) else shared
