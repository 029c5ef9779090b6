"""Find the longest accepted path of a token tree."""

from __future__ import annotations

from collections.abc import Sequence


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
