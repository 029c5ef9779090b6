"""Find the longest accepted path of a token tree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla_spec.types import Bool, Float32, Int32, Verdict

#: Longest draft that `prefix_verdict` answers without making arrays.
_MOST = 1024
_NODES = np.arange(_MOST, dtype=np.int32)
_NOT_RELAXED = np.zeros(_MOST, np.bool_)
_NO_DEVIATION = np.zeros(_MOST, np.float32)
for _shared in (_NODES, _NOT_RELAXED, _NO_DEVIATION):
    _shared.flags.writeable = False


def is_chain(parents: Int32) -> bool:
    """True if node i follows node i - 1 throughout; cheaper than a comparison, since ``parents[i] < i`` always."""
    k = len(parents)
    return int(parents.sum()) == k * (k - 3) // 2  # the sum of -1, 0, ..., k - 2 is the largest there can be


def num_leading(accepted: Bool) -> int:
    """How many True stand before the first False."""
    return len(accepted) if accepted.all() else int(accepted.argmin())


def prefix_verdict(length: int, next_token: int, deviation: Float32 | None = None) -> Verdict:
    """Accept the first ``length`` nodes of a chain; deviation float32 [length], None = all are the target's choice."""
    if length > _MOST:
        zeros = np.zeros(length, np.float32) if deviation is None else deviation
        return Verdict(np.arange(length, dtype=np.int32), next_token, zeros > 0, zeros)
    if deviation is None:
        return Verdict(_NODES[:length], next_token, _NOT_RELAXED[:length], _NO_DEVIATION[:length])
    return Verdict(_NODES[:length], next_token, deviation > 0, deviation)


def depths(parents: Sequence[int]) -> list[int]:
    """Depth of each node, 0 for a node that follows the last committed token."""
    found: list[int] = []
    for parent in parents:
        found.append(found[parent] + 1 if parent >= 0 else 0)
    return found


def longest_path(parents: Sequence[int], is_accepted: Sequence[bool], deviation: Sequence[float]) -> list[int]:
    """The longest path on which every node is accepted; ties go to the least total deviation, then the first.

    Args:
        parents: [k] parent of each node, -1 = root.
        is_accepted: [k] True where the node is accepted given that its parent is.
        deviation: [k] distance of the node's token from the target's choice.

    Returns:
        Nodes, root to leaf.
    """
    length = [0] + [-1] * len(parents)  # slot i + 1 is node i, slot 0 the root; -1 = not reached
    total = [0.0] * (len(parents) + 1)
    leaf = 0
    for node, parent in enumerate(parents):
        if is_accepted[node] and length[parent + 1] >= 0:
            slot = node + 1
            length[slot] = length[parent + 1] + 1
            total[slot] = total[parent + 1] + deviation[node]
            if length[slot] > length[leaf] or (length[slot] == length[leaf] and total[slot] < total[leaf]):
                leaf = slot
    return path_to(leaf - 1, parents)


def path_to(leaf: int, parents: Sequence[int]) -> list[int]:
    """Nodes from the root to ``leaf``, -1 = the empty path."""
    path: list[int] = []
    while leaf >= 0:
        path.append(leaf)
        leaf = parents[leaf]
    path.reverse()
    return path
