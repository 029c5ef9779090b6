"""`vla-spec gpu check` from the command line to its report, on doubles of CUDA and TensorRT; and without a GPU."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("hdrh")

from fake_tensorrt import FakeContext, Place

from vla_spec import cli, gpu_check, gpu_report, plugins
from vla_spec.engines import tensorrt
from vla_spec.errors import BadConfig, MissingDependency, NoDevice
from vla_spec.plugins import Parts

MODEL = Path(__file__).parents[1] / "models" / "metaworld" / "small"
CACHE_BYTES = 2 * 2 * 3 * 72 * 32 * 2  # keys and values, layers, heads, rows, numbers, bytes of a half
pytestmark = pytest.mark.skipif(not (MODEL / "decoder.onnx").exists(), reason="no shipped model here")


@pytest.fixture
def place(tmp_path, monkeypatch):
    return Place(tmp_path, monkeypatch, MODEL)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Something to look at, so that no simulator is needed."""
    plugin = plugins.load("adapter", "vla")
    example = plugin.build(plugin.options(), Parts(None, None, model_dir=MODEL)).example()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, *example.images.shape)).astype(np.uint8)
    state = np.tile(example.state, (8, 1)) + 0.01 * rng.normal(size=(8, len(example.state)))
    file = tmp_path_factory.mktemp("recording") / "seen.npz"
    np.savez(file, images=images, state=state.astype(np.float32), instruction=np.array(example.instruction))
    return file


def check(place, recording, out, *more, code=None):
    arguments = [
        "gpu", "check", "--model", str(MODEL), "--modes", "autoregressive,ngram", "--robot", "replay",
        "--out", str(out), "--calls", "5", "--warm-up", "2", "--observations", "1", "--plans", "3", "--max-steps", "6",
        "--set", f"robot.path={recording}", "--set", f"engine.cache={place.folder}",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as done:
        cli.main([*arguments, *more])
    if code is not None:
        assert done.value.code == code
    file = out / "results.json"
    return json.loads(file.read_text()) if file.is_file() else None


def by_step(results):
    return {step["step"]: step for step in results["steps"]}


def test_everything_from_the_command_line(place, recording, tmp_path):
    out = tmp_path / "out"
    results = check(place, recording, out, code=0)
    steps = by_step(results)
    assert list(steps) == list(gpu_check.STEPS)
    assert all(step["outcome"] in ("pass", "warn") for step in steps.values()), results["steps"]
    assert results["verdict"] in ("pass", "warn")
    assert results["gpu"]["name"] == "Fake GPU"
    assert results["gpu"]["sm"] == 89
    assert results["library"] == "tensorrt-rtx 1.7.1"
    assert set(steps["build"]["facts"]["graphs"]) >= {"prompt", "decoder", "commit"}
    assert steps["load"]["facts"]["half_share"] == {"prompt": 1.0, "decoder": 1.0}
    assert steps["verify"]["facts"]["metrics"]["token_agreement"] > 0.8
    table = steps["tiers"]["facts"]["table"]
    assert [row["call"] for row in table] == ["prefill", *(f"step {k}" for k in (1, 2, 4, 8, 16, 32))]
    for row in table:
        for kind in ("captured", "uncaptured"):
            assert row[kind]["n"] == 5
            assert 0 < row[kind]["min_us"] <= row[kind]["p50_us"] <= row[kind]["p99_us"]
    assert [row.get("device_us") for row in table] == [None, *[250.0] * 6], "the double's events are 0.25 ms apart"
    calls = steps["graphs"]["facts"]["calls"]
    assert all(call["is_captured"] and call["nodes"] == 3 and call["copies"] == [1, 1] for call in calls)
    cache = steps["cache"]["facts"]
    first, last = cache["rows"]
    assert cache["changed_rows"] == list(range(first, first + 8))
    assert last == first + 5
    assert all(steps["streams"]["facts"]["prefills_beside"][name] > 0 for name in ("beside_low", "beside_same"))
    assert [row["mode"] for row in steps["loop"]["facts"]["rows"]] == ["autoregressive", "ngram"]
    assert {row["engine"] for row in steps["loop"]["facts"]["rows"]} == {"tensorrt"}
    assert (out / "loop" / "results.json").is_file()
    assert (out / "profile" / "profile.json").is_file()
    gc.collect()
    assert place.cuda.live == {}
    page = (out / "report.md").read_text()
    for words in ("# GPU check", "Fake GPU", "| step 32 |", "## streams", "beside low", "- **reload_share**"):
        assert words in page
    assert page == gpu_report.render(results), "the page is made of results.json alone"


def test_a_step_that_fails_is_told_and_the_others_go_on(place, recording, tmp_path, monkeypatch):
    def broken(self):
        raise RuntimeError("the driver\nsaid no")

    monkeypatch.setattr(gpu_check.GpuCheck, "_verify", broken)
    monkeypatch.setattr(gpu_check.GpuCheck, "_streams", broken)
    results = check(place, recording, tmp_path / "out", "--skip", "loop,profile,tiers", code=1)
    steps = by_step(results)
    assert results["verdict"] == "fail"
    assert (steps["verify"]["outcome"], steps["verify"]["message"]) == ("fail", "RuntimeError: the driver said no")
    assert steps["graphs"]["outcome"] == steps["cache"]["outcome"] == "pass"
    assert (steps["loop"]["outcome"], steps["loop"]["message"]) == ("skipped", "left out by --skip")


def test_an_engine_that_can_t_be_loaded_skips_what_needs_it(place, recording, tmp_path):
    place.trt.refuse.add("deserialize")
    results = check(place, recording, tmp_path / "out", code=1)
    steps = by_step(results)
    assert steps["build"]["outcome"] in ("pass", "warn")
    assert steps["load"]["outcome"] == "fail"
    assert "can't load it" in steps["load"]["message"]
    for step in gpu_check.STEPS[2:]:
        assert (steps[step]["outcome"], steps[step]["message"]) == ("skipped", "needs the step load"), step
    gc.collect()
    assert place.cuda.live == {}


def test_what_is_not_captured_is_a_warning(place, recording, tmp_path):
    place.trt.capturable = False
    arguments = ("--skip", "loop,profile,streams,verify", "--set", "engine.cuda_graphs=if_possible")
    results = check(place, recording, tmp_path / "out", *arguments, code=0)
    graphs = by_step(results)["graphs"]
    assert graphs["outcome"] == "warn"
    assert "not captured" in graphs["message"]
    assert "REQUIRE_USER_ALLOCATION" in graphs["facts"]["calls"][0]["slow_reason"]


def test_a_cache_that_is_not_written_in_place_fails(place, recording, tmp_path, monkeypatch):
    """The library claims to alias; the memory says otherwise."""
    run, check_cache = FakeContext._run, gpu_check.GpuCheck._cache

    def forgetful(context):
        blocks = [block for block in context.cuda.device_blocks.values() if block.nbytes == CACHE_BYTES]
        saved = [block.copy() for block in blocks]
        run(context)
        for block, content in zip(blocks, saved, strict=True):
            block[:] = content

    def broken(self):
        monkeypatch.setattr(FakeContext, "_run", forgetful)
        return check_cache(self)

    monkeypatch.setattr(gpu_check.GpuCheck, "_cache", broken)
    results = check(place, recording, tmp_path / "out", "--skip", "loop,profile,streams,verify,tiers", code=1)
    cache = by_step(results)["cache"]
    assert (cache["outcome"], "not written in place" in cache["message"]) == ("fail", True)


def test_a_wrong_row_move_fails(place, recording, tmp_path, monkeypatch):
    from vla_spec.engines._trt.cache_state import DeviceState

    move = DeviceState.move
    monkeypatch.setattr(DeviceState, "move", lambda self, start, rows: move(self, start, rows[:-1]))
    results = check(place, recording, tmp_path / "out", "--skip", "loop,profile,streams,verify,tiers", code=1)
    cache = by_step(results)["cache"]
    assert (cache["outcome"], "did not move" in cache["message"]) == ("fail", True)


def test_verification_is_against_the_gates(place, recording, tmp_path, monkeypatch):
    from vla_spec.engines import verify

    monkeypatch.setattr(verify, "read_thresholds", lambda *_: {"cosine_min": verify.Gate(1.5, 1.4, False)})
    results = check(place, recording, tmp_path / "out", "--skip", "loop,profile,streams,tiers", code=1)
    assert "cosine_min is" in by_step(results)["verify"]["message"]


def test_stopping_keeps_what_was_measured(place, recording, tmp_path, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check.GpuCheck, "_graphs", stop)
    results = check(place, recording, tmp_path / "out", "--skip", "verify,tiers", code=130)
    assert results["verdict"] == "unfinished"
    assert [step["step"] for step in results["steps"]] == ["build", "load", "verify", "tiers"]
    gc.collect()
    assert place.cuda.live == {}


@pytest.mark.parametrize(
    "error",
    [
        NoDevice("CUDA: no NVIDIA GPU is visible (see nvidia-smi and CUDA_VISIBLE_DEVICES)"),
        MissingDependency("cuda-bindings", "pip install something"),
    ],
)
def test_without_a_gpu_it_says_so_and_writes_nothing(place, recording, tmp_path, monkeypatch, capsys, error):
    def nothing(library="auto"):
        raise error

    monkeypatch.setattr(tensorrt, "this_machine", nothing)
    assert check(place, recording, tmp_path / "out", code=69) is None
    told = capsys.readouterr().err
    assert "nothing was run" in told
    assert str(error)[:30] in told
    assert "Traceback" not in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there_is_named(place, recording, tmp_path, capsys):
    assert check(place, recording, tmp_path / "out", "--set", "engine.device=4", code=69) is None
    assert "no device 4; valid: 0 to 0" in capsys.readouterr().err


def test_unknown_steps_are_refused(place, recording, tmp_path, capsys):
    assert check(place, recording, tmp_path / "out", "--skip", "tears", code=2) is None
    assert "tears: no such step; valid: build, load" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"calls": 1}, {"warm_up": 0}, {"observations": 0}, {"plans": 0}])
def test_amounts_are_checked(wrong):
    with pytest.raises(BadConfig, match="valid"):
        gpu_check.CheckPlan(MODEL, tensorrt.Options(), (), **wrong)


def test_timing_is_of_the_clock_and_leaves_warm_up_out():
    now = iter(range(0, 10_000, 1000))
    durations = iter([5, 5, 1, 2, 3])  # ticks of the clock inside a call

    def call():
        for _ in range(next(durations)):
            next(now)

    ticks = []

    def now_ns():
        ticks.append(next(now_values))
        return ticks[-1]

    now_values = iter([0, 1000, 5000, 7000, 10_000, 13_000])
    now = iter(range(100))
    timing = gpu_check.time_calls(call, 3, 2, now_ns)
    assert timing.n == 3
    assert timing.warm_up == 2
    assert (timing.min_us, timing.p50_us) == (1.0, 2.0)
    assert timing.p99_us == pytest.approx(2.98)


def test_the_page_escapes_what_would_break_its_tables():
    assert gpu_report.table(("a", "b"), [("x|y", None), (True, 1234.56)]) == [
        "| a | b |", "| --- | --- |", "| x\\|y | - |", "| yes | 1235 |",
    ]  # fmt: skip
