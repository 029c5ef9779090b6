"""Tiers and optimisation profiles: for which sizes an engine is built.

A decoder call has k rows, and Attention with a mask is compiled for fixed k only, so there is one profile per tier with
smallest = best = largest; calls of other sizes are padded up by `GraphEngine`. Everything else takes ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from vla_spec.engines._decoder_spec import DecoderSpec
from vla_spec.engines._model_files import WEIGHTS, ModelFiles
from vla_spec.errors import BadConfig

#: From this size of the weights on, steps of one token are padded to two by default: TensorRT lays most matrices out
#: anew for single rows, and an engine that has both layouts is half as large again (docs/engines.md).
HEAVY_BYTES = 1 << 30
#: Steps of the default prompt tiers where the prompt's length is not fixed.
PROMPT_STEP = 16


class Size(NamedTuple):
    """Smallest, best and largest size of one dimension in one profile."""

    low: int
    best: int
    high: int

    @classmethod
    def exactly(cls, size: int) -> Size:
        """A profile for one size."""
        return cls(size, size, size)


#: Name of a dynamic dimension -> its sizes.
Profile = Mapping[str, Size]
#: Shape of an input, dynamic dimensions by name.
SymbolicShape = tuple[int | str, ...]


def default_tiers(files: ModelFiles) -> tuple[int, ...]:
    """Powers of two up to the largest step, then prompts: the one size that there is, or growing steps beyond it."""
    spec, step = files.decoder, files.decoder.max_step
    weights = files.path / WEIGHTS
    is_heavy = step > 1 and weights.is_file() and weights.stat().st_size >= HEAVY_BYTES
    tiers = [2**i for i in range(1 if is_heavy else 0, step.bit_length()) if 2**i <= step]
    if tiers[-1] < step:
        tiers.append(step)
    if files.counted_input is None:
        prompts = [files.base_rows]
    else:
        prompts, more = [], PROMPT_STEP
        while files.base_rows + more < spec.capacity:
            prompts.append(files.base_rows + more)
            more *= 2
        prompts.append(spec.capacity)
    return tuple(tiers + [size for size in prompts if size > step])


def check_tiers(tiers: Sequence[int], files: ModelFiles) -> tuple[int, ...]:
    """The tiers, if the decoder can run them.

    Raises:
        BadConfig: none, not ascending, larger than the cache, none for a single token's step or none for the prompt.
    """
    spec, where = files.decoder, f"tiers {','.join(map(str, tiers)) or 'empty'}"
    valid = f"ascending numbers from 1 to {spec.rows}"
    if not tiers or any(not 1 <= t <= spec.rows for t in tiers) or any(b <= a for a, b in pairwise(tiers)):
        raise BadConfig(f"{where}; valid: {valid}")
    if tiers[0] > spec.max_step:
        raise BadConfig(f"{where}: none for steps; valid: at least one up to {spec.max_step}, the graph's largest step")
    needed = files.base_rows + (1 if files.counted_input else 0)
    if tiers[-1] < needed:
        raise BadConfig(f"{where}: none for the prompt; valid: at least one from {needed} rows on")
    return tuple(tiers)


def check_profile(graph: str, profile: Profile, where: str = "") -> None:
    """Raises BadConfig if sizes contradict each other: 1 <= low <= best <= high."""
    for name, size in profile.items():
        if not 1 <= size.low <= size.best <= size.high:
            raise BadConfig(
                f"{where or graph}: profile of dimension {name} is {tuple(size)}; valid: 1 <= low <= best <= high"
            )


def profiles_of(
    graph: str, shapes: Mapping[str, SymbolicShape], files: ModelFiles, tiers: Sequence[int]
) -> tuple[Profile, ...]:
    """The profiles that a graph is built with; one empty one if nothing in it is dynamic.

    Args:
        graph: its file's stem.
        shapes: of its inputs, dynamic dimensions by name.
        files: the model's description.
        tiers: sizes of decoder calls, checked.

    Raises:
        BadConfig: a dynamic dimension that no profile is known for.
    """
    symbols = {d for shape in shapes.values() for d in shape if isinstance(d, str)}
    kind = graph.partition(".")[0]
    make = _PROFILES.get(kind)
    profiles = make(files, shapes, tiers) if make and symbols else ({},)
    for profile in profiles:
        unknown = sorted(symbols - set(profile))
        if unknown:
            raise BadConfig(
                f"{graph}.onnx: no profile for its dimension {', '.join(unknown)}; valid: "
                f"{', '.join(sorted(profile)) or 'fixed sizes'}"
            )
        check_profile(graph, profile)
    return tuple({name: size for name, size in profile.items() if name in symbols} for profile in profiles)


def _decoder(files: ModelFiles, shapes: Mapping[str, SymbolicShape], tiers: Sequence[int]) -> tuple[Profile, ...]:
    return tuple({"k": Size.exactly(tier)} for tier in tiers)


def _commit(files: ModelFiles, shapes: Mapping[str, SymbolicShape], tiers: Sequence[int]) -> tuple[Profile, ...]:
    step = files.decoder.max_step
    return ({"a": Size(1, min(4, step), step)},)


def _prompt(files: ModelFiles, shapes: Mapping[str, SymbolicShape], tiers: Sequence[int]) -> tuple[Profile, ...]:
    """The counted input adds rows; whatever its dimension is called, it has this many sizes."""
    counted = shapes.get(files.counted_input or "", ())
    most = files.decoder.capacity - files.base_rows
    return ({d: Size(1, min(2 * PROMPT_STEP, most), most) for d in counted[-1:] if isinstance(d, str)},)


def _drafter_rows(spec: DecoderSpec) -> Size:
    """Committed rows that a drafter reads in one call: a few per round, once all of them."""
    return Size(1, min(8, spec.capacity), spec.capacity)


def _block_head(files: ModelFiles, shapes: Mapping[str, SymbolicShape], tiers: Sequence[int]) -> tuple[Profile, ...]:
    """New rows of the target, and positions to draft."""
    most = files.decoder.capacity - files.base_rows
    return ({"r": _drafter_rows(files.decoder), "n": Size(1, most, most)},)


def _feature_head(files: ModelFiles, shapes: Mapping[str, SymbolicShape], tiers: Sequence[int]) -> tuple[Profile, ...]:
    """Rows of the chain, once all of them, or leaves of the tree."""
    return ({"n": _drafter_rows(files.decoder)},)


_PROFILES: dict[str, Callable[[ModelFiles, Mapping[str, SymbolicShape], Sequence[int]], tuple[Profile, ...]]] = {
    "decoder": _decoder,
    "commit": _commit,
    "prompt": _prompt,
    "block_head": _block_head,
    "feature_head": _feature_head,
    "spec_vla_head": _decoder,  # the same mask and cache, so the same sizes
}
#: Graphs of a model folder that engines are built from, in this order; drafters' only where they are there.
GRAPHS = ("prompt", "decoder", "commit", "block_head", "feature_head", "spec_vla_head")
REQUIRED = ("prompt", "decoder", "commit")
