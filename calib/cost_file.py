"""Cost tables on disk, ``*.costs.json``: what they hold, what is refused, and how they become `Costs`.

A file holds tables, one per engine and load, each with a drafting column per drafter. It says where its numbers come
from: measured on a device, or published and (partly) derived. A table that does not belong to the engine that is
loaded, or that contradicts itself, is refused in one sentence.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from vla_spec.costs import Costs, Quantiles, costs_of_run
from vla_spec.errors import BadConfig
from vla_spec.trace import write_json

#: Version of the layout.
FORMAT: Final = "vla_spec.costs/1"
SUFFIX = ".costs.json"
#: Levels that are written, as far as the number of samples allows.
LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
#: A median that is smaller than that of a smaller size by more than this share is no noise ...
LARGEST_FALL = 0.10
#: ... unless the difference is less than this [ns], which is a timer's and an interpreter's own jitter.
IGNORED_FALL_NS = 20_000
#: The drafter that drafts nothing.
NO_DRAFTER = "none"
CALIBRATE = "`vla-spec calibrate costs` makes one"

Ns = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Distribution(_Part):
    """Cost of one kind of call [ns].

    Attributes:
        n: calls behind it, warm-up left out; None = published.
        warm_up: calls before these, in no quantile.
        first_call: the very first of them, which loads code and fills caches; None = published.
        quantiles: level in (0, 1) -> ns. A level that ``n`` calls can't tell (p99.9 needs 1 000) must not be there.
        max: the largest; None = published.
        stated: published only: the figure as its source states it.
        derived: published only: the formula that it was derived by, from what.
    """

    n: Annotated[int, Field(ge=1)] | None = None
    warm_up: Annotated[int, Field(ge=0)] = 0
    first_call: Ns | None = None
    quantiles: dict[float, Ns]
    max: Ns | None = None
    stated: str | None = None
    derived: str | None = None

    @model_validator(mode="after")
    def _is_a_distribution(self) -> Distribution:
        levels = sorted(self.quantiles)
        if 0.5 not in self.quantiles:
            raise ValueError("no median; valid: quantiles with 0.5 among them")
        if levels[0] <= 0 or levels[-1] >= 1:
            raise ValueError(f"level {levels[0] if levels[0] <= 0 else levels[-1]:g}; valid: between 0 and 1")
        for low, high in itertools.pairwise(levels):
            if self.quantiles[low] > self.quantiles[high]:
                raise ValueError(
                    f"p{100 * high:g} ({self.quantiles[high]:g} ns) lies below p{100 * low:g} "
                    f"({self.quantiles[low]:g} ns); valid: costs that rise with the level"
                )
        if self.max is not None and self.max < self.quantiles[levels[-1]]:
            raise ValueError(f"max ({self.max:g} ns) lies below p{100 * levels[-1]:g}")
        if self.n is not None:
            for level in levels:
                if not is_supported(level, self.n):
                    needed = round(1 / min(level, 1 - level))
                    raise ValueError(f"p{100 * level:g} from {self.n} samples; valid: {needed} or more")
        return self

    @model_serializer(mode="wrap")
    def _without_blanks(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}

    @property
    def median(self) -> float:
        """p50 [ns]."""
        return self.quantiles[0.5]

    def as_quantiles(self) -> Quantiles:
        """Level -> ns, ascending, the maximum as level 1."""
        levels = {level: float(self.quantiles[level]) for level in sorted(self.quantiles)}
        return levels if self.max is None else {**levels, 1.0: float(self.max)}


class EngineIdentity(_Part):
    """Which engine costs belong to. Published tables say what the publication does.

    Attributes:
        name: plugin, or what the publication ran.
        model_hash: sha256 of the weights; empty = published.
        precision, provider: as the engine reports them.
        num_threads: inside one call; 0 = published.
    """

    name: str
    model_hash: str
    precision: str
    provider: str
    num_threads: int


class DrafterIdentity(_Part):
    """Which drafter, asked for which shape of tree.

    Attributes:
        name: plugin, or what the publication ran.
        options: resolved.
        top_k: children per node.
        depth: longest path, 0 = as long as the draft is large.
    """

    name: str
    options: dict[str, Any] = {}
    top_k: int = 1
    depth: int = 0

    def __str__(self) -> str:
        settings = [f"{key}={value}" for key, value in self.options.items()]
        if self.top_k > 1:
            settings.append(f"top_k={self.top_k}")
        if self.depth:
            settings.append(f"depth={self.depth}")
        return f"{self.name} ({', '.join(settings)})" if settings else self.name


class DraftTable(_Part):
    """Drafting with one drafter.

    Attributes:
        modes: decoding modes that it was calibrated for; for people.
        drafter: which.
        draft: gamma -> cost.
    """

    modes: tuple[str, ...] = ()
    drafter: DrafterIdentity
    draft: dict[int, Distribution]


class Load(_Part):
    """What else the machine did meanwhile.

    Attributes:
        key: what ``runtime.costs_load`` names it by.
        description: in words.
        num_processes: that were started for this.
        other_cores: cores' worth of time that processes other than these and the measurement used; None = unknown.
        stolen_cores: cores' worth of time that the hypervisor gave to others; None = unknown.
    """

    key: str
    description: str
    num_processes: int = 0
    other_cores: float | None = None
    stolen_cores: float | None = None


class EngineTable(_Part):
    """All costs of one engine under one load.

    Attributes:
        load: see `Load`.
        engine: see `EngineIdentity`.
        prefill: of one.
        step: tokens in a chain -> cost; 1 = plain decoding.
        step_tree: tokens in a branching tree -> cost; empty = the engine takes chains only, or it was not published.
        encode, decode: the adapter's share before and after decoding (a whole chunk).
        drafters: a drafting column each.
    """

    load: Load
    engine: EngineIdentity
    prefill: Distribution
    step: dict[int, Distribution]
    step_tree: dict[int, Distribution] = {}
    encode: Distribution
    decode: Distribution
    drafters: Annotated[tuple[DraftTable, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_whole(self) -> EngineTable:
        if 1 not in self.step:
            raise ValueError("step: no cost of size 1, plain decoding; valid: sizes from 1 on")
        for name, cost in (("prefill", self.prefill), ("step of 1 token", self.step[1])):
            if cost.median <= 0:
                raise ValueError(f"{name}: a median of 0 ns; valid: more")
        _check_rise("step", self.step)
        _check_rise("step_tree", self.step_tree)
        for column in self.drafters:
            if not column.draft:
                raise ValueError(f"draft of {column.drafter}: no sizes")
            _check_rise(f"draft of {column.drafter}", column.draft)
        return self

    def distributions(self) -> dict[str, Distribution]:
        """Everything in it, by what it is."""
        return {
            "prefill": self.prefill,
            **{f"step {k}": cost for k, cost in sorted(self.step.items())},
            **{f"tree {k}": cost for k, cost in sorted(self.step_tree.items())},
            **{
                f"{column.drafter.name} {k}{number}": cost
                for number, column in self._numbered()
                for k, cost in sorted(column.draft.items())
            },
            "encode": self.encode,
            "decode": self.decode,
        }

    def _numbered(self) -> Iterator[tuple[str, DraftTable]]:
        """Drafting columns with what tells those of the same drafter apart: nothing for the first, then #2 ..."""
        seen: Counter[str] = Counter()
        for column in self.drafters:
            seen[column.drafter.name] += 1
            count = seen[column.drafter.name]
            yield f" #{count}" if count > 1 else "", column

    def costs(self, column: DraftTable) -> Costs:
        """With one drafter. A drafter that branches gets the costs of branching steps, where they were measured."""
        step = self.step
        if column.drafter.top_k > 1 and self.step_tree:
            smallest = min(self.step_tree)
            step = {k: cost for k, cost in step.items() if k < smallest} | self.step_tree
        return Costs(
            prefill=self.prefill.as_quantiles(),
            step={k: step[k].as_quantiles() for k in sorted(step)},
            draft={k: column.draft[k].as_quantiles() for k in sorted(column.draft)},
            encode=self.encode.as_quantiles(),
            decode=self.decode.as_quantiles(),
        )


class Device(_Part):
    """The machine. Two devices are the same if processor, cores and GPU are.

    Attributes:
        cpu, cores, gpu: None = the publication does not say; gpu None = there is none.
        system, memory: for people.
        governor: of the first core, None = the system does not say (virtual machines do not).
        cpu_mhz: of the first core at the end of the calibration, None = unknown.
        gpu_clocks: as the driver reports them, None = no GPU or no driver.
    """

    cpu: str | None = None
    cores: int | None = None
    gpu: str | None = None
    system: str | None = None
    memory: str | None = None
    governor: str | None = None
    cpu_mhz: float | None = None
    gpu_clocks: str | None = None

    def is_same_as(self, other: Device) -> bool:
        """Processor, cores and GPU agree."""
        return (self.cpu, self.cores, self.gpu) == (other.cpu, other.cores, other.gpu)

    def __str__(self) -> str:
        parts = [self.cpu or "", f"{self.cores} cores" if self.cores else "", self.gpu or ""]
        return ", ".join(part for part in parts if part) or "unknown device"


class CostFile(_Part):
    """One file.

    Attributes:
        format: version of the layout.
        origin: ``measured`` on the device, or ``published`` by others: stated by them or derived from what they state.
        label: one line for tables and titles.
        sources: published only: where the figures are from.
        device: see `Device`.
        created: date and time, ISO 8601; of a published table, when it was written down.
        command: that made it; empty = written by hand.
        libraries: name -> version.
        vla_spec: version of this program.
        unit: of all costs.
        notes: for people.
        tables: one per engine and load.
    """

    format: Literal["vla_spec.costs/1"] = FORMAT
    origin: Literal["measured", "published"]
    label: str
    sources: tuple[str, ...] = ()
    device: Device
    created: str
    command: str = ""
    libraries: dict[str, str] = {}
    vla_spec: str = ""
    unit: Literal["ns"] = "ns"
    notes: tuple[str, ...] = ()
    tables: Annotated[tuple[EngineTable, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _says_where_it_is_from(self) -> CostFile:
        is_measured = self.origin == "measured"
        if is_measured and not (self.device.cpu and self.device.cores):
            raise ValueError("device: measured where? valid: cpu and cores")
        if not is_measured and (not self.sources or "estimate" not in self.label.lower()):
            raise ValueError("a published table needs sources, and a label that calls it an estimate")
        for table in self.tables:
            for name, cost in table.distributions().items():
                if is_measured and (cost.n is None or cost.stated or cost.derived):
                    raise ValueError(f"{name}: measured without a number of samples")
                if not is_measured and (cost.n is not None or bool(cost.stated) == bool(cost.derived)):
                    raise ValueError(f"{name}: a published cost is either stated or derived, and has no samples")
        keys = [(table.engine.model_dump_json(), table.load.key) for table in self.tables]
        if len(set(keys)) < len(keys):
            raise ValueError("two tables of one engine under one load")
        return self


class Wanted(NamedTuple):
    """What a cost table is needed for.

    engine, drafter, device: as loaded. load: key, None = the file's only one. num_tokens: most tokens that one step
    takes. is_other_device_allowed: costs of another machine, or published ones, will do (a virtual clock).
    """

    engine: EngineIdentity
    drafter: DrafterIdentity
    device: Callable[[], Device]
    load: str | None
    num_tokens: int
    is_other_device_allowed: bool


def is_supported(level: float, n: int) -> bool:
    """Enough samples for a quantile: at least one beyond it on either side is to be expected."""
    return n * min(level, 1 - level) >= 1 - 1e-6


def load_costs(path: Path, mode: str, wanted: Wanted) -> Costs:
    """The costs of one mode from a calibration, or from an earlier run's costs.json, which proves nothing.

    Args:
        path: of the file.
        mode: name of the mode; finds a table in a run's costs.json.
        wanted: what a calibration must belong to.

    Raises:
        BadConfig: unreadable, contradictory, or of something else; says what, where and what is valid.
    """
    tree = _read(path)
    if isinstance(tree, dict) and "format" in tree:
        return choose(_parse(tree, path), wanted, path)
    if path.name.endswith(SUFFIX):
        raise BadConfig(f"runtime.costs: {path} has no key `format`; valid: {FORMAT!r}; {CALIBRATE}")
    if wanted.load is not None:
        raise BadConfig(
            f"runtime.costs_load: {wanted.load!r} names a load, and {path} is a run's start-up table without loads; "
            f"leave it out, or name a calibrated table (*{SUFFIX})"
        )
    return costs_of_run(tree, path, mode)


def read_cost_file(path: Path) -> CostFile:
    """A calibration, checked.

    Raises:
        BadConfig: unreadable or contradictory.
    """
    return _parse(_read(path), path)


def write_cost_file(path: Path, file: CostFile) -> None:
    """Write it whole or not at all."""
    write_json(path, file.model_dump(mode="json", exclude_defaults=False))


def choose(file: CostFile, wanted: Wanted, path: Path) -> Costs:
    """The one table that belongs to what is loaded.

    A published table is of another engine by nature: it is taken for what it is, a simulation.

    Raises:
        BadConfig: none does; the message names the first thing that differs.
    """
    where = f"runtime.costs: {path}"
    if file.origin == "published":
        if not wanted.is_other_device_allowed:
            raise BadConfig(
                f"{where} holds published figures ({file.label}), and this run takes real time; valid: "
                f"runtime.clock=virtual, or runtime.allow_other_device=true"
            )
        table = _of_load(file.tables, wanted.load, where)
        return _whole(table, table.drafters[0], wanted, where)
    if not wanted.is_other_device_allowed:
        here = wanted.device()
        if not file.device.is_same_as(here):
            raise BadConfig(
                f"{where} was measured on another device ({file.device}; this is {here}); calibrate here, or allow it "
                f"with runtime.allow_other_device=true or runtime.clock=virtual"
            )
    tables: Sequence[EngineTable] = file.tables
    for name, what in (
        ("name", "engine"),
        ("model_hash", "model"),
        ("precision", "precision"),
        ("provider", "provider"),
        ("num_threads", "number of threads"),
    ):
        value = getattr(wanted.engine, name)
        fitting = [table for table in tables if getattr(table.engine, name) == value]
        if not fitting:
            have = ", ".join(dict.fromkeys(_short(getattr(table.engine, name)) for table in tables))
            raise BadConfig(
                f"{where} belongs to another {what}: it has {have}, loaded is {_short(value)}; calibrate again with "
                f"`vla-spec calibrate costs`"
            )
        tables = fitting
    table = _of_load(tables, wanted.load, where)
    for column in table.drafters:
        if column.drafter == wanted.drafter:
            return _whole(table, column, wanted, where)
    if wanted.drafter.name == NO_DRAFTER:  # the baseline of every comparison: needs no column, drafting is free
        nothing = DraftTable.model_construct(drafter=wanted.drafter, draft={})
        return _whole(table, nothing, wanted, where)
    have = ", ".join(str(column.drafter) for column in table.drafters)
    raise BadConfig(
        f"{where} has no costs of drafter {wanted.drafter}; have {have}; calibrate with this mode in --modes"
    )


def _of_load(tables: Sequence[EngineTable], key: str | None, where: str) -> EngineTable:
    have = ", ".join(dict.fromkeys(table.load.key for table in tables))
    if key is None and len(tables) == 1:
        return tables[0]
    if key is None:
        raise BadConfig(f"{where} has several loads; choose one with runtime.costs_load; have {have}")
    for table in tables:
        if table.load.key == key:
            return table
    raise BadConfig(f"runtime.costs_load: no load {key!r} in {where.removeprefix('runtime.costs: ')}; have {have}")


def _whole(table: EngineTable, column: DraftTable, wanted: Wanted, where: str) -> Costs:
    largest = max(table.step)
    if largest < wanted.num_tokens:
        raise BadConfig(
            f"{where} ends at steps of {largest} tokens, and the engine takes {wanted.num_tokens}; costs are never "
            f"extrapolated: calibrate again"
        )
    return table.costs(column)


def _check_rise(what: str, costs: dict[int, Distribution]) -> None:
    """Larger sizes cost no less, up to noise."""
    if any(size < 1 for size in costs):
        raise ValueError(f"{what}: size {min(costs)}; valid: 1 or more")
    dearest, of_size = 0.0, 0
    for size in sorted(costs):
        fall = dearest - costs[size].median
        if fall > max(LARGEST_FALL * dearest, IGNORED_FALL_NS):
            raise ValueError(
                f"{what}: size {size} costs {costs[size].median / 1e6:.3f} ms and size {of_size} {dearest / 1e6:.3f} "
                f"ms; valid: costs that do not fall with size by more than {LARGEST_FALL:.0%}"
            )
        if costs[size].median > dearest:
            dearest, of_size = costs[size].median, size


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"runtime.costs: {path} can't be read ({type(error).__name__}); {CALIBRATE}") from None
    try:
        return json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise BadConfig(
            f"runtime.costs: {path} can't be read: it is cut off or no JSON (line {error.lineno}: {error.msg}); "
            f"{CALIBRATE}"
        ) from None
    except ValueError as error:
        raise BadConfig(f"runtime.costs: {path} has {error}; valid: finite numbers; {CALIBRATE}") from None


def _refuse(constant: str) -> float:
    raise ValueError(f"the number {constant}")


def _parse(tree: Any, path: Path) -> CostFile:
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        found = tree.get("format") if isinstance(tree, dict) else None
        raise BadConfig(f"runtime.costs: {path} has format {found!r}; valid: {FORMAT!r}; {CALIBRATE}")
    try:
        return CostFile.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise BadConfig(f"runtime.costs: {path}: {f'{at}: ' if at else ''}{message}") from None


def _short(value: object) -> str:
    """A hash by its beginning, everything else as it is."""
    text = str(value)
    return text[:12] if len(text) == 64 else repr(value) if isinstance(value, str) else text
