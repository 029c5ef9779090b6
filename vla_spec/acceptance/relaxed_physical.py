"""Accept drafted tokens within an error budget in metres and radians: a cap per token and a sum per group.

Source: the bin distance of Spec-VLA, arXiv:2507.22424, with the sum per group of HeiSD, arXiv:2603.17573, both taken
through the un-normaliser so that the budget means the same on every robot.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np
import numpy.typing as npt

from vla_spec.acceptance._fitted import FittedTolerance
from vla_spec.acceptance._longest_path import depths, is_chain, path_to, prefix_verdict
from vla_spec.errors import BadConfig
from vla_spec.interfaces import ActionTokenizer
from vla_spec.plugins import Parts
from vla_spec.types import Committed, Draft, Float32, Int32, Scores, TokenDomain, Verdict

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Options:
    """Relaxed acceptance in physical units; 0 = exact.

    Attributes:
        cap: largest accepted distance of one token, one number for all or one per degree of freedom [A]. [m, rad]
        budget: largest sum of distances over one group of the domain, likewise; degrees of freedom that share a
            group must be given the same number. [m, rad]
        relative: added to a token's cap: this share of how far the target's own choice would move it. Fast motions
            tolerate more than fine ones; the budget bounds both. 0 = no. [0..1]
        step_scale: factor on cap, relative share and budget of each control step of the chunk; the last number holds
            for all steps behind it. ``[1, 1, 1, 1, 2]`` is twice as wide behind an execute horizon of 4. [factor]
        fitted: file that `vla-spec calibrate tolerance` wrote: cap, budget and relative are taken from there, what is
            stated beside it is not used. Refused for another model.
        respect_never_relaxed: keep switches (the domain's never-relaxed positions) exact.
    """

    cap: tuple[float, ...] = (0.0005,)
    budget: tuple[float, ...] = (0.001,)
    relative: float = 0.0
    step_scale: tuple[float, ...] = (1.0,)
    fitted: Path | None = None
    respect_never_relaxed: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.relative <= 1:
            raise BadConfig(f"relative must be in [0, 1], got {self.relative}")
        for name, values in (("cap", self.cap), ("budget", self.budget), ("step_scale", self.step_scale)):
            if not values or not min(values) >= 0:
                raise BadConfig(f"{name} must be numbers >= 0, got {values}")


@final
class RelaxedPhysicalRule:
    """``distance <= (cap + relative * |choice|) * tolerance``, ``spent in the group + distance <= budget * tolerance``.

    The target's own choice is its argmax after the (relaxed) prefix and has distance 0: it is always accepted. What a
    group has spent counts the tokens of this chunk that were committed in earlier rounds and the draft's own path.
    Among the longest acceptable paths the one with the least total distance wins; the accepted token is the draft's.
    """

    def __init__(self, options: Options, domain: TokenDomain, tokenizer: ActionTokenizer) -> None:
        num_tokens, num_dofs = domain.num_tokens, domain.tokens_per_step
        for name, values in (("cap", options.cap), ("budget", options.budget)):
            if len(values) not in (1, num_dofs):
                raise BadConfig(f"{name} needs 1 or {num_dofs} numbers, got {len(values)}")
        dof = np.arange(num_tokens) % num_dofs
        step = np.minimum(np.arange(num_tokens) // num_dofs, len(options.step_scale) - 1)
        scale = np.asarray(options.step_scale, np.float64)[step]  # [T]
        cap = np.broadcast_to(np.asarray(options.cap, np.float64), num_dofs)[dof] * scale  # [T]
        relative = options.relative * scale  # [T]
        if options.respect_never_relaxed:
            cap[domain.never_relaxed] = relative[domain.never_relaxed] = 0.0
        budget = np.broadcast_to(np.asarray(options.budget, np.float64), num_dofs)[dof] * scale  # [T]
        previous = np.full(num_tokens, -1, np.int32)  # [T] position before this one in the same group, -1 = none
        last: dict[int, int] = {}
        for position, group in enumerate(domain.group.tolist()):
            before = last.get(group, -1)
            if before >= 0 and budget[before] != budget[position]:
                raise BadConfig(
                    f"budget gives group {group} both {budget[before]} (degree of freedom {dof[before]}) and "
                    f"{budget[position]} (degree of freedom {dof[position]}); one group has one budget"
                )
            previous[position] = before
            last[group] = position
        self._check_units(domain, tokenizer)
        self._check_cap(cap, domain.unit_per_bin)
        self._tokenizer = tokenizer
        self._groups: list[int] = domain.group.tolist()
        self._members = {group: np.flatnonzero(domain.group == group).tolist() for group in set(self._groups)}
        self._place = self._places(tokenizer, domain)
        self._slack = self._slacks(tokenizer, domain)
        self._cap_of = self._cap_table(cap, relative, tokenizer, domain)
        self._budgets: list[float] = budget.tolist()
        self._previous: list[int] = previous.tolist()
        self._is_exact = not (cap.any() or relative.any()) or not budget.any()

    @property
    def exact(self) -> bool:
        """Only if cap and relative cap, or the budget, are 0 everywhere."""
        return self._is_exact

    def judge(
        self,
        draft: Draft,
        scores: Scores,
        committed: Committed,
        rng: np.random.Generator,
        tolerance: float = 1.0,
    ) -> Verdict:
        """See `AcceptanceRule.judge`; deviations are in the physical unit of each position."""
        choices = scores.logits.argmax(1)  # [k + 1]
        if self._place and is_chain(draft.parents):
            return self._judge_chain(draft, choices.tolist(), committed, tolerance)
        parents: list[int] = draft.parents.tolist()
        positions: Int32 = np.array(depths(parents), np.int32) + np.int32(len(committed.tokens))  # [k]
        node_choices = choices[draft.parents + 1]  # [k] what the target would put in each node's place
        distance: list[float] = self._tokenizer.distance(draft.tokens, node_choices, positions).astype(float).tolist()
        differs: list[bool] = (draft.tokens != node_choices).tolist()

        length = [0] + [-1] * len(parents)  # slot i + 1 is node i, slot 0 the root; -1 = not accepted
        total = [0.0] * (len(parents) + 1)
        spent = [0.0] * len(parents)  # what the node's group has spent once the node is accepted
        leaf = 0
        for node, (parent, position) in enumerate(zip(parents, positions.tolist(), strict=True)):
            if length[parent + 1] < 0:
                continue
            spent[node] = self._spent_before(parent, position, parents, spent, committed)
            off = 0.0
            if differs[node]:
                if position >= len(self._budgets):
                    continue
                off = distance[node]
                spent[node] += off
                if not self._is_within(off, spent[node], position, int(node_choices[node]), tolerance):
                    continue
            slot = node + 1
            length[slot], total[slot] = length[parent + 1] + 1, total[parent + 1] + off
            if length[slot] > length[leaf] or (length[slot] == length[leaf] and total[slot] < total[leaf]):
                leaf = slot
        path = path_to(leaf - 1, parents)
        off_path = np.array([distance[node] if differs[node] else 0.0 for node in path], np.float32)
        return Verdict(np.array(path, np.int32), int(choices[leaf]), off_path > 0, off_path)

    def _judge_chain(self, draft: Draft, choices: list[int], committed: Committed, tolerance: float) -> Verdict:
        """The same for a draft without branches. Plain numbers: few tokens differ, and each array costs a look-up."""
        m = len(committed.tokens)
        spent: dict[int, float] = {}  # group -> what this path has spent in it
        deviation: list[float] = []
        is_relaxed = False
        for position, (token, choice) in enumerate(zip(draft.tokens.tolist(), choices, strict=False), m):
            off = 0.0
            if token != choice:
                if position >= len(self._budgets):
                    break
                place = self._place[position]
                off = abs(place[token] - place[choice])
                group = self._groups[position]
                before = spent.get(group)
                if before is None:
                    before = self._committed(group, committed)
                if not self._is_within(off, before + off, position, choice, tolerance):
                    break
                spent[group], is_relaxed = before + off, True
            deviation.append(off)
        length = len(deviation)
        return prefix_verdict(length, choices[length], np.array(deviation, np.float32) if is_relaxed else None)

    def _is_within(self, off: float, spent: float, position: int, choice: int, tolerance: float) -> bool:
        """The rule for a token that is not the target's choice; a distance too small to see is no licence."""
        slack = self._slack[position]
        is_near = 0.0 < off <= self._cap_of[position][choice] * tolerance + slack
        return is_near and spent <= self._budgets[position] * tolerance + slack

    def _spent_before(
        self, parent: int, position: int, parents: list[int], spent: list[float], committed: Committed
    ) -> float:
        """What the group of ``position`` has spent on the path to ``parent`` and on committed tokens."""
        before = self._previous[position] if position < len(self._previous) else -1
        if before < 0:
            return 0.0
        if before < len(committed.tokens):
            return self._committed(self._groups[before], committed)
        for _ in range(position - before - 1):  # one step up where groups are runs of positions
            parent = parents[parent]
        return spent[parent]

    def _committed(self, group: int, committed: Committed) -> float:
        """What a group has spent on tokens of earlier rounds."""
        m = len(committed.tokens)
        return sum(float(committed.deviation[at]) for at in self._members[group] if at < m)

    @staticmethod
    def _places(tokenizer: ActionTokenizer, domain: TokenDomain) -> list[list[float]]:
        """[T][V]: where each token lies on its axis. Empty if distances are not those of points on an axis."""
        tokens = np.arange(domain.vocab_size, dtype=np.int32)
        places: list[list[float]] = []
        for position in range(domain.num_tokens):
            at = np.full((len(tokens), len(tokens)), position, np.int32)
            between = tokenizer.distance(tokens[:, None], tokens[None], at).astype(np.float64)  # [V, V]
            place = between[0]
            error = np.abs(np.abs(place[:, None] - place[None]) - between)
            if not (error <= 1e-5 * between + 1e-6 * place.max()).all():
                return []
            places.append(place.tolist())
        return places

    @staticmethod
    def _slacks(tokenizer: ActionTokenizer, domain: TokenDomain) -> list[float]:
        """[T]: a thousandth of the narrowest bin; a sum that equals its budget on paper must not fail by rounding."""
        low = np.arange(domain.vocab_size - 1, dtype=np.int32)
        at = np.arange(domain.num_tokens, dtype=np.int32)[:, None]
        slack: list[float] = (tokenizer.distance(low, low + 1, at).astype(np.float64).min(axis=1) * 1e-3).tolist()
        return slack

    @staticmethod
    def _cap_table(cap: Floats, relative: Floats, tokenizer: ActionTokenizer, domain: TokenDomain) -> list[list[float]]:
        """[T][V]: cap of each position for each choice of the target."""
        tokens = np.arange(domain.vocab_size, dtype=np.int32)
        still = tokenizer.encode(np.zeros((1, domain.tokens_per_step), np.float32))  # [A], the tokens of no motion
        table = np.repeat(cap[:, None], domain.vocab_size, axis=1)
        for position in np.flatnonzero(relative):
            at = np.full_like(tokens, position)
            table[position] += relative[position] * tokenizer.distance(tokens, still[at % len(still)], at)
        rows: list[list[float]] = table.tolist()
        return rows

    @staticmethod
    def _check_units(domain: TokenDomain, tokenizer: ActionTokenizer) -> None:
        """Refuse to run if the tokenizer and the domain disagree about the physical size of a bin."""
        positions = np.flatnonzero(~domain.never_relaxed).astype(np.int32)
        first, last = np.zeros_like(positions), np.full_like(positions, domain.vocab_size - 1)
        mean_bin = tokenizer.distance(first, last, positions) / np.float32(domain.vocab_size - 1)
        stated = domain.unit_per_bin[positions]
        wrong = np.flatnonzero(~np.isclose(mean_bin, stated, rtol=0.05, atol=0.0))
        if len(wrong):
            at = wrong[0]
            raise BadConfig(
                f"one bin at chunk position {positions[at]} is {mean_bin[at]:.3g} for the tokenizer but "
                f"{stated[at]:.3g} for the adapter's domain (unit_per_bin); a tolerance in physical units needs both "
                f"to agree: set the tokenizer's unit"
            )

    @staticmethod
    def _check_cap(cap: Floats, unit_per_bin: Float32) -> None:
        """Refuse a tolerance that is meant to relax and can't: most likely it is in another unit."""
        positions = np.flatnonzero(cap)
        if len(positions) and (cap[positions] < unit_per_bin[positions] * (1 - 1e-6)).all():
            at = int(np.argmin(unit_per_bin[positions] - cap[positions]))
            raise BadConfig(
                f"cap {cap[positions][at]:.3g} is less than one bin ({unit_per_bin[positions][at]:.3g}) everywhere and "
                f"would relax nothing; state it in the tokenizer's physical unit, or set 0 for exact"
            )


def build(options: Options, parts: Parts) -> RelaxedPhysicalRule:
    """Needs the domain's groups and the tokenizer's distance; a fitted tolerance needs the target, to be checked."""
    if options.fitted is not None:
        fitted = FittedTolerance.from_file(options.fitted)
        fitted.check_model(parts.target, options.fitted)
        options = replace(options, cap=fitted.cap, budget=fitted.budget, relative=fitted.relative)
    return RelaxedPhysicalRule(options, parts.domain, parts.tokenizer)
