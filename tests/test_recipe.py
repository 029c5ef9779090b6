"""The recipe of a model folder: stop and go on, options, and what every wrong input says."""

import os
import pickle
import shutil
import signal
import threading

import numpy as np
import pytest

from vla_spec import errors, recipe
from vla_spec.config import build_options
from vla_spec.errors import BadConfig, BadModel, Interrupted, MissingDependency, UnknownOption

torch = pytest.importorskip("torch", reason="needs the extra [train]")
pytest.importorskip("onnx", reason="needs the extra [train]")

from vla_spec.engines.nets import distill  # noqa: E402
from vla_spec.engines.nets.demonstrations import Demonstrations  # noqa: E402
from vla_spec.engines.nets.train import TrainOptions, train  # noqa: E402
from vla_spec.engines.nets.weights import load_policy, read_weights, save_half  # noqa: E402

TINY = ["num_layers=1", "mlp_width=8", "batch=2", "save_every=1000"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small gain nothing from more, and on a busy machine they wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_episode(file, frames=3, seed=0):
    rng = np.random.default_rng(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    steps = np.arange(frames, dtype=np.int32) * 2
    np.savez(
        file, images=rng.integers(0, 255, (frames, 3, 96, 96, 3), dtype=np.uint8), steps=steps,
        state=rng.random((2 * frames, 4), np.float32), labels=rng.uniform(-1, 1, (2 * frames, 4)).astype(np.float32),
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three episodes of noise."""
    folder = tmp_path_factory.mktemp("demonstrations")
    for seed in range(3):
        write_episode(folder / "drawer-close" / f"{seed}.npz", seed=seed)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Checkpoint of a training that was stopped in its second step, and what it said."""
    checkpoint, said = tmp_path_factory.mktemp("checkpoint") / "policy.safetensors", []
    calls = iter([False, True])
    options = build_options(TrainOptions, recipe._tree([*TINY, "steps=4"]), "train")
    with pytest.raises(Interrupted):
        train([data], checkpoint, options, said.append, should_stop=lambda: next(calls))
    return checkpoint, said


@pytest.fixture
def checkpoint(trained, tmp_path):
    return shutil.copy(trained[0], tmp_path / "policy.safetensors")


def run_training(data, checkpoint, *settings, start_from=None):
    said = []
    recipe.train_policy([data], checkpoint, settings, said.append, start_from)
    return said


def test_a_training_that_is_stopped_leaves_its_last_step_and_goes_on_from_it(trained, checkpoint, data):
    assert trained[1][-1] == f"{trained[0]}: step 2 of 4; the same command goes on from here"
    said = run_training(data, checkpoint, "batch=2", "steps=3")  # sizes are the checkpoint's
    assert said[0] == "resumed at step 2 of 3"
    assert said[-2:] == [
        "validation: no episode is held out; a task with more than 10 episodes holds out 2",
        f"{checkpoint}: step 3, done",
    ]
    network, vocabulary = load_policy(checkpoint)
    assert (network.config.num_layers, network.config.mlp_width) == (1, 8)
    assert len(vocabulary) == network.config.num_words
    before, after = read_weights(trained[0])[0], read_weights(checkpoint)[0]
    assert before.keys() == after.keys()
    assert (after["model.head.weight"] != before["model.head.weight"]).any()
    said = run_training(data, checkpoint, "batch=2", "steps=3", start_from=trained[0])
    assert said[1] == f"{checkpoint} is there already: --start-from {trained[0]} is left out"
    assert said[-1] == f"{checkpoint}: step 3, done"


def test_a_policy_grows_into_a_new_checkpoint(trained, data, tmp_path):
    new = tmp_path / "grown.safetensors"
    run_training(data, new, "num_layers=2", "mlp_width=12", "batch=2", "steps=1", start_from=trained[0])
    assert load_policy(new)[0].config.num_layers == 2
    new.unlink()
    with pytest.raises(BadConfig, match=r"--start-from .*policy.* can't shrink, mlp_width 8 -> 4; valid: .*larger"):
        run_training(data, new, "num_layers=1", "mlp_width=4", start_from=trained[0])
    assert not new.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["num_layers=2"], r"train\.num_layers: .*policy\.safetensors has 1, got 2; .*--start-from"),
        (["mlp_width=9"], r"train\.mlp_width: .*policy\.safetensors has 8, got 9"),
    ],
)
def test_a_checkpoint_of_another_size_is_not_gone_on_from(checkpoint, data, settings, message):
    before = checkpoint.read_bytes()
    with pytest.raises(BadConfig, match=message):
        run_training(data, checkpoint, *settings)
    assert checkpoint.read_bytes() == before


def test_files_that_are_no_checkpoint_are_named(checkpoint, data, tmp_path):
    network, vocabulary = load_policy(checkpoint)
    shipped, drafter, cut = tmp_path / "target.safetensors", tmp_path / "head.safetensors", tmp_path / "cut.safetensors"
    metadata = {"config": network.config.to_json(), "vocabulary": f'["{vocabulary[0]}"]'}
    save_half(shipped, network.state_dict(), metadata)
    save_half(drafter, {"x": torch.zeros(2)}, {"config": '{"width": 192}'})
    cut.write_bytes(checkpoint.read_bytes()[:500])
    for file, error in (
        (shipped, "--checkpoint .*target.*: weights without the state of their training; .*--start-from"),
        (drafter, "head.safetensors: not a policy"),
        (cut, "cut.safetensors: not a readable safetensors file"),
    ):
        with pytest.raises(BadModel, match=error):
            run_training(data, file)
    with pytest.raises(BadConfig, match="is a folder"):
        run_training(data, tmp_path)
    for file, error in (
        (shipped, "--start-from .*target.*: trained with another vocabulary"),
        (drafter, "head.safetensors: not a policy"),
        (cut, "not a readable safetensors file"),
        (tmp_path, "no such file"),
    ):
        with pytest.raises(BadModel, match=error):
            run_training(data, tmp_path / "new.safetensors", start_from=file)
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize(
    "setting",
    ["steps=0", "batch=0", "num_layers=0", "warmup_steps=0", "decay_steps=-1", "save_every=0", "learning_rate=0",
     "weight_decay=-1", "ema=1", "shift=-1", "token_noise=2", "look_ahead_weight=-1", "seed=-1"],
)  # fmt: skip
def test_training_options_are_checked(setting):
    name, value = setting.split("=")
    with pytest.raises(BadConfig, match=rf"^train: {name} must be .*, got {value}"):
        build_options(TrainOptions, recipe._tree([setting]), "train")


@pytest.mark.parametrize(
    "setting",
    ["steps=0", "batch=0", "max_frames=0", "execute_horizon=0", "save_every=0", "learning_rate=-1", "decay=0",
     "seed=-1"],
)  # fmt: skip
def test_distillation_options_are_checked(setting):
    name, value = setting.split("=")
    with pytest.raises(BadConfig, match=rf"^distill: {name} must be .*, got {value}"):
        build_options(distill.DistillOptions, recipe._tree([setting]), "distill")


def test_files_that_are_no_demonstrations_are_named(tmp_path):
    broken, misnamed, other = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    (broken / "drawer-close").mkdir(parents=True)
    (broken / "drawer-close" / "7.npz").write_bytes(b"PK cut off")
    write_episode(misnamed / "drawer-close" / "first.npz")
    write_episode(other / "no-such-task" / "0.npz")
    for folder, message in (
        (broken, r"7\.npz: not a demonstration .*delete it"),
        (misnamed, r"first\.npz: not a demonstration; they are named SEED\.npz"),
        (other, r"no frames for any of the tasks .*drawer-close"),
    ):
        with pytest.raises(BadConfig, match=message):
            Demonstrations([folder], 8)


def test_a_distillation_that_is_stopped_goes_on_and_says_what_does_not_fit(checkpoint, data, tmp_path):
    network, vocabulary = load_policy(checkpoint)
    demonstrations, said = Demonstrations([data], network.config.horizon), []
    options = distill.DistillOptions(steps=3, batch=2, max_frames=9)
    source = distill.target_outputs(network, vocabulary, demonstrations, options, said.append)
    file = tmp_path / "block_head.safetensors"
    with pytest.raises(Interrupted):
        distill.distill("block_head", source, file, options, said.append, lambda: True)
    assert said[-1] == f"{file}: step 1 of 3; the same command goes on from here"
    head = distill.distill("block_head", source, file, options, said.append)
    assert "block_head: resumed at step 1 of 3" in said
    assert said[-1] == f"{file}: step 3, done"
    assert distill.restore(head, file, source.target_sha256) == 3
    with pytest.raises(BadModel, match=f"distilled for the policy {source.target_sha256[:12]}…; valid: 000000000000…"):
        distill.restore(head, file, "0" * 64)
    with pytest.raises(BadModel, match="of another drafter, or distilled for a policy of another size"):
        distill.restore(distill.distiller("feature_head").build(network), file, source.target_sha256)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BadModel, match="not a checkpoint of `vla-spec distill`"):
        distill.restore(head, file, source.target_sha256)
    for options, message in (
        (distill.DistillOptions(max_frames=2), r"distill\.max_frames: 2 frames .*the longest has 3"),
        (distill.DistillOptions(execute_horizon=8), r"distill\.execute_horizon: 8; valid: less than 8"),
    ):
        with pytest.raises(BadConfig, match=message):
            distill.target_outputs(network, vocabulary, demonstrations, options, said.append)


def test_nothing_is_exported_if_one_checkpoint_is_broken(checkpoint, tmp_path):
    drafters, out, said = tmp_path / "drafters", tmp_path / "model", []
    drafters.mkdir()
    (drafters / "small_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadModel, match="small_model"):
        recipe.export_model(checkpoint, drafters, out, said.append)
    assert not out.exists()
    assert said == [f"no {n}: {drafters / n}.safetensors is not there" for n in ("block_head", "feature_head")]


def test_ctrl_c_asks_first_and_interrupts_at_the_second_time():
    before = signal.getsignal(signal.SIGINT)
    with recipe._stop_on_interrupt() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_nobody_asks_to_stop():
    answers = []

    def work():
        with recipe._stop_on_interrupt() as should_stop:
            answers.append(should_stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]


@pytest.mark.parametrize(
    "error",
    [
        BadModel("no weights"),
        UnknownOption("mode", "exat", ["exact", "relaxed"], "modes"),
        MissingDependency("ONNX Runtime", "pip install it"),
        errors.BadObservation("state", "NaN", "numbers"),
    ],
)
def test_errors_cross_from_a_worker_process(error):
    """A pool of processes whose error can't be unpickled hangs for ever."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
