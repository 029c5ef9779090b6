"""The recipe of a model folder: collect, train, distill, export. All but the last resume where they stopped.

This file only connects the stages; what they do lies beside the nets in `vla_spec.engines.nets` and in
`vla_spec.engines.export`. Libraries for training are imported inside the stages.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

from vla_spec.clock import MonotonicClock
from vla_spec.config import EXTRA_OF_LIBRARY, build_options, find_model, set_key
from vla_spec.decoder import SpeculativeDecoder
from vla_spec.errors import BadConfig, BadModel, MissingDependency, UnknownOption
from vla_spec.progress import Reporter
from vla_spec.robots._metaworld_tasks import TASKS
from vla_spec.types import Float32, Observation

#: Episodes that one process collects before it asks for more work.
EPISODES_PER_JOB = 10

Say = Callable[[str], None]


class Job(NamedTuple):
    """Episodes for one process."""

    out: Path
    task: str
    seeds: range
    policy: Path | None


def collect_demonstrations(
    out: Path, tasks: Sequence[str] | None, seeds: range, processes: int, policy: Path | None, progress: Reporter
) -> None:
    """Record episodes of the scripted experts; files that exist are kept.

    Args:
        out: folder; one file per task and seed.
        tasks: None = all.
        seeds: of each task.
        processes: simulators side by side.
        policy: model folder that drives part of each episode; None = the noisy expert drives.
        progress: told about each job of `EPISODES_PER_JOB` episodes.

    Raises:
        UnknownOption, BadModel, MissingDependency: see the message.
    """
    for task in tasks or ():
        if task not in TASKS:
            raise UnknownOption("task", task, TASKS, "--tasks")
    if policy is not None:
        policy = find_model(policy)
        if not (policy / "policy.json").is_file():
            raise BadModel(f"--policy {policy}: not a model folder; `vla-spec export` writes one")
    # Fail here and not in every process; importing it here would settle how MuJoCo renders.
    if importlib.util.find_spec("metaworld") is None:
        raise MissingDependency("metaworld, which this command needs,", "pip install 'vla_spec[sim]'")
    if policy is not None:
        act_with(policy)
    _make_folder(out)
    for stale in out.glob("*/.*.tmp"):
        stale.unlink(missing_ok=True)
    starts = range(seeds.start, seeds.stop, EPISODES_PER_JOB)
    jobs = [
        Job(out, task, range(start, min(start + EPISODES_PER_JOB, seeds.stop)), policy)
        for start in starts
        for task in tasks or TASKS
    ]
    progress.phase("collecting", len(jobs))
    # Fresh interpreters: an OpenGL context must not be inherited.
    with multiprocessing.get_context("spawn").Pool(processes, _leave_interrupts_to_the_parent) as pool:
        for text in pool.imap_unordered(_collect, jobs):
            progress.step(text)


def train_policy(
    data: Sequence[Path], checkpoint: Path, settings: Sequence[str], say: Say, start_from: Path | None = None
) -> None:
    """Train until the schedule's end; goes on from the checkpoint.

    Args:
        data: folders of demonstrations.
        checkpoint: safetensors file, written often.
        settings: ``KEY=VALUE`` of `TrainOptions`.
        say: told one line now and then.
        start_from: an earlier policy's checkpoint, grown to this network's size. None = from scratch.

    Raises:
        BadConfig, BadModel, MissingDependency: see the message.
        Interrupted: by Ctrl-C; the checkpoint is that of the last whole step.
    """
    with _needs("train"):
        from vla_spec.engines.nets.train import TrainOptions, train
    options = build_options(TrainOptions, _tree(settings), "train")
    if checkpoint.is_dir():
        raise BadConfig(f"--checkpoint {checkpoint}: is a folder; name a file in it, as in policy.safetensors")
    _make_folder(checkpoint.parent)
    _check_data(data)
    if start_from is not None:
        _check_checkpoint(start_from, "vla-spec train", "--start-from")
    with _stop_on_interrupt() as should_stop:
        train(list(data), checkpoint, options, say, start_from, should_stop)


def distill_drafters(
    data: Sequence[Path],
    checkpoint: Path,
    out: Path,
    drafters: Sequence[str] | None,
    settings: Sequence[str],
    say: Say,
) -> None:
    """Train drafters on the policy's own outputs; each goes on from its checkpoint in ``out``.

    Args:
        data: folders of demonstrations: the frames that the policy decodes.
        checkpoint: the trained policy.
        out: one safetensors file per drafter.
        drafters: None = all that can be distilled.
        settings: ``KEY=VALUE`` of `DistillOptions`.
        say: told one line now and then.

    Raises:
        UnknownOption, BadConfig, BadModel, MissingDependency: see the message.
        Interrupted: by Ctrl-C; the checkpoints are those of the last whole step.
    """
    with _needs("train"):
        from vla_spec.engines.nets import distill
        from vla_spec.engines.nets.demonstrations import Demonstrations
        from vla_spec.engines.nets.weights import load_policy
    for name in drafters or ():
        distill.distiller(name)
    options = build_options(distill.DistillOptions, _tree(settings), "distill")
    _check_checkpoint(checkpoint, "vla-spec train")
    _check_data(data)
    _make_folder(out)
    model, vocabulary = load_policy(checkpoint)
    demonstrations = Demonstrations(list(data), model.config.horizon)
    source = distill.target_outputs(model, vocabulary, demonstrations, options, say)
    with _stop_on_interrupt() as should_stop:
        for name in drafters or distill.distillers():
            say(f"distilling {name}")
            distill.distill(name, source, out / f"{name}.safetensors", options, say, should_stop)


def export_model(checkpoint: Path, drafters: Path, out: Path, say: Say, force: bool = False, command: str = "") -> None:
    """Write the model folder: the policy, every drafter that has a checkpoint, and a manifest.

    The folder is as it was until all is written; see `vla_spec.engines._model_export`.

    Args:
        checkpoint: of the trained policy.
        drafters: folder of the drafters' checkpoints.
        out: the model folder.
        say: told what is written, and what is not.
        force: ``out`` may hold a model already.
        command: what was typed, for the manifest.

    Raises:
        BadModel: no trained policy, or a checkpoint that is corrupt or doesn't belong to it.
        BadConfig: ``out`` holds a model and ``force`` is not given, or it can't be written.
        MissingDependency: libraries for training or the simulator (golden inputs are a real picture).
    """
    with _needs("train"):
        from vla_spec.engines import _model_export, _model_manifest, export
        from vla_spec.engines.nets import distill
        from vla_spec.engines.nets.weights import load_policy, policy_sha256
    _check_checkpoint(checkpoint, "vla-spec train")
    _model_export.check_free(out, force)
    model, vocabulary = load_policy(checkpoint)
    identity, networks = policy_sha256(model, vocabulary), {}
    for name in distill.distillers():
        file = drafters / f"{name}.safetensors"
        if not file.is_file():
            stays = f"; the one in {out} stays" if (out / f"{name}.onnx").exists() else ""
            say(f"no {name}: {file} is not there{stays}")
            continue
        networks[name] = distill.distiller(name).build(model)
        distill.restore(networks[name], file, identity)
    inputs = _golden_inputs(model.config, vocabulary)
    with _model_export.writing(out, command, force) as folder:
        export.export_policy(model, vocabulary, folder, inputs)
        for name, network in networks.items():
            distill.distiller(name).export(network.eval(), folder)
    say(f"{out}: policy {identity[:12]}…{''.join(f', {name}' for name in networks)}")
    say(str(out / _model_manifest.MANIFEST))


def act_with(model_dir: Path) -> Callable[[Observation], Float32]:
    """An exported policy as a function: observation to actions float32 [H, A], plain greedy decoding, one thread."""
    from vla_spec import plugins
    from vla_spec.adapters import vla
    from vla_spec.engines._graph_engine import GraphEngine
    from vla_spec.engines.onnxruntime import OnnxRuntimeRuntime

    adapter = vla.load(model_dir)
    engine = GraphEngine(model_dir, OnnxRuntimeRuntime())
    parts = plugins.Parts(adapter.domain, adapter.tokenizer, model_dir, engine)

    def part(kind: str, name: str) -> Any:
        plugin = plugins.load(kind, name)
        return plugin.build(plugin.options(), parts)

    decoder = SpeculativeDecoder(
        engine, part("drafter", "none"), part("rule", "greedy"), part("controller", "fixed"),
        adapter.domain.num_tokens, MonotonicClock().now_ns, np.random.default_rng(0),
    )  # fmt: skip

    def act(observation: Observation) -> Float32:
        return adapter.decode(decoder.decode(adapter.encode(observation), 1 << 62).tokens)

    return act


def _collect(job: Job) -> str:
    """One job, in a process of its own."""
    from vla_spec.engines.nets.collect import collect_task

    policy = act_with(job.policy) if job.policy is not None else None
    done: list[bool] = []
    collect_task(
        job.out, job.task, job.seeds, policy, keep_failures=policy is not None,
        progress=lambda task, is_success: done.append(is_success),
    )  # fmt: skip
    return f"{job.task}: {sum(done)} of {len(done)} solved" if done else f"{job.task}: was there already"


def _leave_interrupts_to_the_parent() -> None:
    """Ctrl-C reaches all processes of a terminal; the one that reports it ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Within it, Ctrl-C makes the yielded function say True, so that a step can end first; a second one interrupts."""
    asked = threading.Event()

    def ask(_signal: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody handle signals
        yield asked.is_set
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _golden_inputs(config: Any, vocabulary: list[str]) -> dict[str, np.ndarray[Any, Any]]:
    """What the robot sees at the start of an episode, as engine inputs."""
    from vla_spec.engines.nets.demonstrations import encode_words
    from vla_spec.robots.metaworld import MetaWorldRobot

    with _needs("sim"):
        robot = MetaWorldRobot(image_size=config.image_size)
    try:
        robot.reset(0)
        seen = robot.observe(0)
    finally:
        robot.close()
    words = encode_words(seen.instruction, vocabulary, config.max_words)
    return {"images": seen.images[None], "words": words[None], "state": seen.state[None]}


def _tree(settings: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for setting in settings:
        tree = set_key(tree, setting)
    return tree


def _check_data(folders: Sequence[Path]) -> None:
    for folder in folders:
        if next(folder.glob("*/*.npz"), None) is None:
            raise BadConfig(f"--data {folder}: no demonstrations there; `vla-spec collect` writes them")


def _check_checkpoint(path: Path, writer: str, option: str = "--checkpoint") -> None:
    if not path.is_file():
        raise BadModel(f"{option} {path}: no such file; `{writer}` writes it")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadConfig(f"{path}: can't be made ({error.strerror}); name a folder that may be written") from None


@contextlib.contextmanager
def _needs(extra: str) -> Iterator[None]:
    """A missing library becomes one sentence that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library not in EXTRA_OF_LIBRARY:
            raise
        raise MissingDependency(f"{library}, which this command needs,", f"pip install 'vla_spec[{extra}]'") from error
