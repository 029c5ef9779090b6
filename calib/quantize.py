"""Quantise a decoder graph: what its activations reach on recorded observations, which cut-off is best, the files.

The range of every activation is chosen by what it does to the tokens: each way of choosing is tried on observations
that were not calibrated on, and the one whose distributions are nearest to the unquantised ones wins.
"""

from __future__ import annotations

import errno
import fnmatch
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vla_spec.atomic import replacing
from vla_spec.calib.activation_ranges import LIBRARY_METHODS, Magnitudes, check_method, migration_factor
from vla_spec.engines._graph_engine import GraphEngine
from vla_spec.engines._graph_runtime import Array, Call, State, TensorSpec
from vla_spec.engines._host_state import HostState
from vla_spec.engines._model_files import DECODER_GRAPH, WEIGHTS, ModelFiles
from vla_spec.engines._quantized_files import hash_file, names_of, write_manifest
from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines.onnxruntime import OnnxRuntimeGraph, OnnxRuntimeRuntime
from vla_spec.engines.verify import greedy
from vla_spec.errors import BadConfig, BadModel, MissingDependency
from vla_spec.interfaces import Engine
from vla_spec.progress import Reporter
from vla_spec.trace import write_json
from vla_spec.types import EngineInputs, Float32, Int32

FORMAT = 1
PRECISIONS = ("int8", "fp8")
#: Observations that another library calibrates on: it keeps every activation of every call.
LIBRARY_OBSERVATIONS = 45
#: Folder of a drafter that is a model of its own.
SMALL_MODEL = "small"
#: Ways to choose ranges that are tried unless others are asked for.
METHODS = ("99.9", "99.99", "99.999", "max", "mse")
#: What every number of a calibration file means.
MEANING = {
    "clips": "activation tensor -> largest magnitude that is represented",
    "migrations": "activation tensor -> what its channels are divided by, and the weights behind it multiplied with",
    "kept": "weights that stay in floating point",
    "token_agreement": "share of tokens whose largest logit is the same, both models fed the unquantised one's tokens",
    "divergence": "mean Kullback-Leibler divergence of the quantised distribution from the unquantised one [nats]",
    "difference_max": "largest difference of a logit, in standard deviations of the unquantised logits",
    "outlier_ratio": "an activation's largest magnitude over the largest of its median channel",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to quantise.

    Attributes:
        precision: "int8", or "fp8" (for TensorRT; other runtimes only imitate it).
        ranges: how the cut-off of every activation is chosen, see `Magnitudes.clip`.
        migration: strength of `migration_factor`, 0 = none.
        keep: patterns of weights that stay in floating point, as in ``head.*``.
    """

    precision: str = "int8"
    ranges: str = "mse"
    migration: float = 0.0
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_precision(self.precision)
        check_method(self.ranges)
        if not 0 <= self.migration < 1:
            raise BadConfig(f"migration {self.migration}; valid: 0 (none) to below 1")


def check_precision(precision: str) -> None:
    """Raises BadConfig for a precision that can't be quantised to."""
    if precision not in PRECISIONS:
        raise BadConfig(f"precision {precision!r}; valid: {', '.join(PRECISIONS)}")


def calibration_file(model_dir: Path, precision: str) -> Path:
    """Where a model folder keeps its calibration."""
    return model_dir / f"quantization-{precision}.json"


class Quality(NamedTuple):
    """How far a quantised model is from its original; see `MEANING`."""

    token_agreement: float
    divergence: float
    difference_max: float
    num_rows: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """Everything that a quantised graph is written from, beside the model itself.

    Attributes:
        weights_sha256: of the model's weights.
        graph_sha256: of decoder.onnx.
        recipe: how it was chosen.
        clips: activation tensor -> largest magnitude that is represented; a product whose activation is not in it
            stays in floating point.
        kept: weights that do, by the recipe's patterns, although their activation is in it.
        migrations: activation tensor -> factors, see `migration_factor`.
        quality: on observations that were not calibrated on.
        evidence: observations, other recipes that were tried, command, date, versions.
    """

    weights_sha256: str
    graph_sha256: str
    recipe: Recipe
    clips: dict[str, float]
    kept: tuple[str, ...] = ()
    migrations: dict[str, list[float]] = field(default_factory=dict)
    quality: Quality | None = None
    evidence: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As stored."""
        quality = None if self.quality is None else self.quality._asdict()
        return {"format": FORMAT, "kind": "quantization", **asdict(self), "quality": quality, "meaning": MEANING}

    @classmethod
    def read(cls, file: Path) -> Calibration:
        """Inverse of writing `to_json`.

        Raises:
            BadModel: no such file, or not one of these.
        """
        if not file.is_file():
            raise BadModel(f"{file}: missing; `vla-spec calibrate quantization {file.parent}` writes it")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if values["format"] != FORMAT or values["kind"] != "quantization":
                raise ValueError(f"format {values['format']!r}; valid: {FORMAT}")
            recipe = values["recipe"]
            quality = values["quality"]
            out = cls(
                str(values["weights_sha256"]),
                str(values["graph_sha256"]),
                Recipe(
                    str(recipe["precision"]), str(recipe["ranges"]), float(recipe["migration"]), tuple(recipe["keep"])
                ),
                {str(name): float(clip) for name, clip in values["clips"].items()},
                tuple(map(str, values["kept"])),
                {str(name): [float(x) for x in factor] for name, factor in values["migrations"].items()},
                None if quality is None else Quality(**quality),
                dict(values["evidence"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadModel(f"{file}: not a calibration of `vla-spec calibrate quantization` ({error!r})") from error
        return out

    def check(self, files: ModelFiles, where: str) -> None:
        """Raises BadModel if this is another model's."""
        if self.weights_sha256 != files.weights_sha256 or self.graph_sha256 != hash_file(files.path / DECODER_GRAPH):
            raise BadModel(
                f"{where}: of another model (weights {self.weights_sha256[:12]}…, {files.path} has "
                f"{files.weights_sha256[:12]}… or another {DECODER_GRAPH}); valid: calibrate this one"
            )


class Observed(NamedTuple):
    """What the unquantised model did on the observations."""

    magnitudes: dict[str, Magnitudes]  # by activation tensor
    calls: list[dict[str, Array]]  # inputs of the graph, if they were to be kept


@final
class Study:
    """One model folder, its reference engine, and quantised variants of its decoder. Needs ONNX and ONNX Runtime.

    Args:
        model_dir: a model folder; nothing is written to it before `write`.
        num_tokens: T, tokens of a chunk.
        num_threads: of ONNX Runtime.

    Raises:
        BadModel: the folder is no model, or its decoder has nothing to quantise.
        MissingDependency: no ``onnx`` here.
    """

    def __init__(self, model_dir: Path, num_tokens: int, num_threads: int = 1) -> None:
        self._onnx = import_onnx()
        self.files = ModelFiles.open(model_dir)
        self.num_tokens, self._num_threads = num_tokens, num_threads
        self._weights = WeightsFile.open(model_dir / WEIGHTS)
        self._model = load_graph(model_dir / DECODER_GRAPH)
        self.reference = GraphEngine(model_dir, OnnxRuntimeRuntime(num_threads))
        from vla_spec.engines.graphs.quantized import find_linears

        self._linears = find_linears(self._model, self._weights)

    def tokens_of(self, inputs: Sequence[EngineInputs], progress: Reporter) -> list[Int32]:
        """The unquantised model's own chunks, int32 [T] each."""
        progress.phase("decoding", len(inputs))
        out = []
        for one in inputs:
            out.append(greedy(self.reference, one, self.num_tokens))
            progress.step()
        return out

    def observe(
        self, inputs: Sequence[EngineInputs], tokens: Sequence[Int32], progress: Reporter, num_kept: int = 0
    ) -> Observed:  # fmt: skip
        """Activations of prefill and of the decoding steps, the policy fed its own tokens.

        Args:
            inputs: what the adapter makes of observations.
            tokens: the model's own chunks for them.
            progress: told about each observation.
            num_kept: observations, evenly spread, of which the graph's inputs are kept, for other libraries.

        Raises:
            BadConfig: no observations.
            BadModel: an activation that is not finite; names the tensor and the observation.
        """
        from vla_spec.engines.graphs.quantized import activations_of, observed_model

        if not inputs:
            raise BadConfig("observations 0; valid: at least one")
        widths = activations_of(self._linears, self._weights)
        magnitudes = {name: Magnitudes(name, width) for name, width in widths.items()}
        calls: list[dict[str, Array]] = []
        kept = {int(i) for i in np.linspace(0, len(inputs) - 1, min(num_kept, len(inputs))).round()}
        observed_graph = observed_model(self._model, self._weights)
        engine = self._engine(observed_graph, magnitudes)
        keeping = self._engine(observed_graph, magnitudes, calls) if kept else engine
        progress.phase("observing", len(inputs))
        for i, (one, chunk) in enumerate(zip(inputs, tokens, strict=True)):
            try:
                forced_rows(keeping if i in kept else engine, one, chunk)
            except BadModel as error:
                raise BadModel(f"observation {i}: {error}") from error
            progress.step()
        return Observed(magnitudes, calls)

    def calibrate(self, observed: Observed, recipe: Recipe) -> Calibration:
        """Choose every range.

        Raises:
            BadConfig: a pattern that keeps nothing, or one that keeps everything.
        """
        kept = [linear.stored for linear in self._linears if _matches(linear.stored, recipe.keep)]
        idle = [pattern for pattern in recipe.keep if not fnmatch.filter([w.stored for w in self._linears], pattern)]
        if idle or len(kept) == len(self._linears):
            names = ", ".join(linear.stored for linear in self._linears[:5])
            raise BadConfig(
                f"keep {idle[0] if idle else recipe.keep}: {'no' if idle else 'every'} weight; has {names} …"
            )
        readers: dict[str, list[str]] = {}
        for linear in self._linears:
            if linear.stored not in kept:
                readers.setdefault(linear.activation, []).append(linear.stored)
        clips, migrations = {}, {}
        theirs: dict[str, float] = {}
        if recipe.ranges in LIBRARY_METHODS:
            from vla_spec.calib.modelopt_ranges import modelopt_clips

            theirs = modelopt_clips(
                self._model, self._weights, self._linears, observed.calls, recipe.precision, recipe.ranges
            )
        for name, stored in readers.items():
            magnitudes = observed.magnitudes[name]
            if recipe.migration:
                weights = np.concatenate([self._weights.read(one) for one in stored])
                factor = migration_factor(magnitudes.channel_max, weights, recipe.migration)
                migrations[name] = [float(f"{x:.5g}") for x in factor]
                # Outliers are gone by then, so nothing is cut off.
                clips[name] = float((magnitudes.channel_max / np.array(migrations[name])).max())
            else:
                clips[name] = theirs[name] if theirs else magnitudes.clip(recipe.ranges)
        graph_sha256 = hash_file(self.files.path / DECODER_GRAPH)
        assert graph_sha256 is not None
        return Calibration(self.files.weights_sha256, graph_sha256, recipe, clips, tuple(kept), migrations)

    def engine(self, calibration: Calibration) -> GraphEngine:
        """The quantised model, in memory; its golden inputs are not checked."""
        model, _ = quantize(self._model, self._weights, calibration)
        return self._engine(model, {})

    def wanted(self, inputs: Sequence[EngineInputs], tokens: Sequence[Int32]) -> list[Float32]:
        """Logits of the unquantised model about these tokens, fp32 [T, V] each."""
        return [forced_rows(self.reference, one, chunk) for one, chunk in zip(inputs, tokens, strict=True)]

    def quality(
        self, engine: Engine, inputs: Sequence[EngineInputs], tokens: Sequence[Int32], wanted: Sequence[Float32]
    ) -> Quality:  # fmt: skip
        """Of an engine, on these observations."""
        got = [forced_rows(engine, one, chunk) for one, chunk in zip(inputs, tokens, strict=True)]
        return compare(np.concatenate(wanted), np.concatenate(got))

    def _engine(
        self, model: Any, magnitudes: dict[str, Magnitudes], calls: list[dict[str, Array]] | None = None
    ) -> GraphEngine:  # fmt: skip
        runtime = RewrittenRuntime(
            self._num_threads, self.files.path / DECODER_GRAPH, model.SerializeToString(), magnitudes, calls
        )
        return GraphEngine(self.files.path, runtime, is_checked=False)


class Tried(NamedTuple):
    """One recipe and what it does."""

    recipe: Recipe
    quality: Quality


def choose(
    study: Study, inputs: Sequence[EngineInputs], held_out: Sequence[EngineInputs], recipes: Sequence[Recipe],
    progress: Reporter,
) -> tuple[Calibration, list[Tried]]:  # fmt: skip
    """Try every recipe; the one with the smallest divergence wins.

    Args:
        study: the model.
        inputs: what is calibrated on.
        held_out: what recipes are compared on.
        recipes: at least one.
        progress: told about each observation and each recipe.

    Raises:
        BadConfig: no observations, or a recipe that keeps nothing or everything.
        BadModel: activations that are not finite.
    """
    if not held_out:
        raise BadConfig("held-out observations 0; valid: at least one")
    is_library_asked = any(recipe.ranges in LIBRARY_METHODS for recipe in recipes)
    kept = LIBRARY_OBSERVATIONS if is_library_asked else 0
    observed = study.observe(inputs, study.tokens_of(inputs, progress), progress, kept)
    tokens = study.tokens_of(held_out, progress)
    wanted = study.wanted(held_out, tokens)
    progress.phase("comparing", len(recipes))
    tried, fitted = [], []
    for recipe in recipes:
        calibration = study.calibrate(observed, recipe)
        quality = study.quality(study.engine(calibration), held_out, tokens, wanted)
        tried.append(Tried(recipe, quality))
        fitted.append(replace(calibration, quality=quality))
        progress.step(recipe.ranges)
    best = fitted[int(np.argmin([one.quality.divergence for one in tried]))]
    evidence = {
        "tried": [{**asdict(one.recipe), "keep": list(one.recipe.keep), **one.quality._asdict()} for one in tried],
        "outliers": {name: magnitudes.summary() for name, magnitudes in observed.magnitudes.items()},
        "versions": {name: str(importlib.import_module(name).__version__) for name in ("onnx", "onnxruntime", "numpy")},
    }
    return replace(best, evidence=evidence), tried


def print_tried(tried: Sequence[Tried], best: Calibration, console: Console) -> None:
    """One line per recipe."""
    table = Table(
        box=SIMPLE_HEAD, title=f"{best.recipe.precision}, on {tried[0].quality.num_rows} tokens", title_justify="left"
    )
    for name in ("ranges", "same token", "divergence [nats]", "largest difference [sd]", ""):
        table.add_column(name, justify="left" if name in ("ranges", "") else "right")
    for recipe, quality in tried:
        table.add_row(
            recipe.ranges, f"{100 * quality.token_agreement:.2f} %", f"{quality.divergence:.2e}",
            f"{quality.difference_max:.3f}", "taken" if recipe == best.recipe else "",
        )  # fmt: skip
    console.print(table)


def compare(wanted: Float32, got: Float32) -> Quality:
    """Rows of logits, fp32 [n, V] each."""
    p, q = _log_softmax(wanted), _log_softmax(got)
    agreement = float((wanted.argmax(1) == got.argmax(1)).mean())
    divergence = float((np.exp(p) * (p - q)).sum(1).mean())
    difference = float(np.abs(wanted - got).max() / wanted.std())
    return Quality(agreement, divergence, difference, len(wanted))


def forced_rows(engine: Engine, inputs: EngineInputs, tokens: Int32) -> Float32:
    """Logits about given tokens, [T, V]: the prompt, then as many tokens a call as the engine takes."""
    rows = [engine.prefill(inputs).logits[-1:].copy()]
    for start in range(0, len(tokens) - 1, engine.max_step):
        part = tokens[start : min(start + engine.max_step, len(tokens) - 1)]
        chain = np.arange(-1, len(part) - 1, dtype=np.int32)
        rows.append(engine.step(part, chain).logits.copy())
        engine.commit(chain + 1)
    return np.concatenate(rows)


def quantize(model: Any, weights: WeightsFile, calibration: Calibration) -> tuple[Any, dict[str, npt.NDArray[Any]]]:
    """The quantised graph of a calibration and its new tensors, see `quantized_model`."""
    from vla_spec.engines.graphs.quantized import quantized_model

    migrations = {name: np.array(factor, np.float32) for name, factor in calibration.migrations.items()}
    return quantized_model(
        model, weights, calibration.clips, migrations, calibration.kept, calibration.recipe.precision
    )


def write_quantized(model_dir: Path, calibration: Calibration, where: Path) -> Path:
    """Write ``decoder.int8.onnx`` (or fp8), its weights and its manifest; whole or not at all.

    Args:
        model_dir: the model that was calibrated.
        calibration: of it.
        where: the calibration's file, for errors and provenance.

    Returns:
        The graph.

    Raises:
        BadModel: another model's calibration, no space left, or a folder that can't be written to.
        MissingDependency: no ``onnx`` or ``safetensors`` here.
    """
    onnx = import_onnx()
    try:
        from safetensors.numpy import save
    except ImportError as error:
        raise MissingDependency("safetensors", "pip install 'vla_spec[run]'") from error
    from vla_spec.engines.graphs.quantized import point_to

    files = ModelFiles.open(model_dir)
    calibration.check(files, str(where))
    source = model_dir / DECODER_GRAPH
    graph, weights_file, manifest = names_of(source, calibration.recipe.precision)
    model, tensors = quantize(load_graph(source), WeightsFile.open(model_dir / WEIGHTS), calibration)
    try:
        # The manifest goes first and comes last: without it the other two count for nothing.
        manifest.unlink(missing_ok=True)
        with replacing(weights_file) as temporary:
            temporary.write_bytes(save(tensors, {"weights_sha256": files.weights_sha256}))
        point_to(model, WeightsFile.open(weights_file))
        with replacing(graph) as temporary:
            temporary.write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(str(graph))
        about = {"recipe": asdict(calibration.recipe), "calibration_sha256": hash_file(where)}
        write_manifest(source, calibration.recipe.precision, about)
    except OSError as error:
        for file in (graph, weights_file):
            file.unlink(missing_ok=True)
        reason = "no space left" if error.errno == errno.ENOSPC else error.strerror
        raise BadModel(
            f"{model_dir}: the quantised graph can't be written ({reason}); nothing is left of it"
        ) from error
    return graph


def write_calibration(file: Path, calibration: Calibration) -> None:
    """Write the calibration, whole or not at all."""
    write_json(file, calibration.to_json())


def model_folders(model_dir: Path) -> list[Path]:
    """The folder, and the small drafter's inside it if there is one."""
    small = model_dir / SMALL_MODEL
    return [model_dir, small] if (small / DECODER_GRAPH).is_file() else [model_dir]


def load_graph(file: Path) -> Any:
    """A graph without its external tensors.

    Raises:
        BadModel: missing or no ONNX.
    """
    onnx = import_onnx()
    if not file.is_file():
        raise BadModel(f"{file}: missing; `vla-spec export` writes it")
    try:
        return onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's own type
        raise BadModel(f"{file}: not an ONNX graph, or cut off ({error})") from error


def import_onnx() -> Any:
    """The library that reads and writes graphs.

    Raises:
        MissingDependency: it is not here.
    """
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise MissingDependency("ONNX", "pip install 'vla_spec[train]'") from error


@final
class RewrittenRuntime:
    """ONNX Runtime with another graph in the place of one file. Not thread-safe.

    Args:
        num_threads: of each session.
        file: whose place is taken; external tensors are looked for beside it.
        model: serialised ONNX.
        magnitudes: outputs of it that are counted in every call.
        calls: its inputs are added to this, None = they are not kept.
    """

    name, precision, provider, is_batch_invariant = "onnxruntime", "rewritten", "CPUExecutionProvider", True
    tiers: tuple[int, ...] | None = None

    def __init__(
        self, num_threads: int, file: Path, model: bytes, magnitudes: dict[str, Magnitudes],
        calls: list[dict[str, Array]] | None = None,
    ) -> None:  # fmt: skip
        self._inner, self._num_threads, self._calls = OnnxRuntimeRuntime(num_threads), num_threads, calls
        self._file, self._model, self._magnitudes = file, model, magnitudes

    def open(self, file: Path) -> Any:
        """The rewritten graph, or the one that was asked for."""
        if file != self._file:
            return self._inner.open(file)
        ort = importlib.import_module("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._num_threads, 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
        session = ort.InferenceSession(self._model, options, providers=[self.provider])
        return _CountedGraph(OnnxRuntimeGraph(session), self._magnitudes, self._calls)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Zeroed numpy memory."""
        return self._inner.empty(shape, dtype)

    def state(self, shape: tuple[int, ...]) -> State:
        """Zeroed caches."""
        return self._inner.state(shape)


@final
class _CountedGraph:
    """A graph with further outputs, which are counted after every call."""

    def __init__(
        self, graph: OnnxRuntimeGraph, magnitudes: dict[str, Magnitudes], calls: list[dict[str, Array]] | None
    ) -> None:  # fmt: skip
        self._graph, self._magnitudes, self._calls = graph, magnitudes, calls
        self.inputs: Mapping[str, TensorSpec] = graph.inputs
        self.outputs: Mapping[str, TensorSpec] = graph.outputs

    def tie(
        self, arrays: Mapping[str, Array], state: State | None = None, state_names: Sequence[tuple[str, str]] = ()
    ) -> Call:
        """The same call with buffers of its own for what is counted."""
        rows = len(arrays["embeds"])
        counted = {name: np.zeros((rows, len(m.channel_max)), np.float32) for name, m in self._magnitudes.items()}
        call = self._graph.tie({**arrays, **counted}, state, state_names)
        if self._calls is None:
            return _CountedCall(call, counted, self._magnitudes)
        assert isinstance(state, HostState), "only caches in host memory can be kept"
        read = {name: array for name, array in arrays.items() if name in self.inputs}
        read |= {past: tensor for (past, _), tensor in zip(state_names, state.tensors, strict=True)}
        return _CountedCall(call, counted, self._magnitudes, read, self._calls)


@final
class _CountedCall:
    def __init__(
        self, call: Call, counted: dict[str, Float32], magnitudes: dict[str, Magnitudes],
        read: Mapping[str, Array] | None = None, calls: list[dict[str, Array]] | None = None,
    ) -> None:  # fmt: skip
        self._call, self._counted, self._magnitudes = call, counted, magnitudes
        self._read, self._calls = read or {}, calls

    def run(self) -> None:
        """One forward, then count."""
        if self._calls is not None:
            self._calls.append({name: array.copy() for name, array in self._read.items()})
        self._call.run()
        for name, values in self._counted.items():
            self._magnitudes[name].add(values)


def _log_softmax(logits: Float32) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    out: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    return out


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
