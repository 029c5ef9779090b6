"""The TensorRT runtime on doubles of CUDA and TensorRT: values, order of operations, one synchronisation, no leaks."""

import gc
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import fake_tensorrt
from fake_cuda import FakeCuda
from fake_tensorrt import FakePlans, FakeTensorRT, build_fake

from vla_spec.engines._graph_engine import GraphEngine
from vla_spec.engines._trt.runtime import Running, TensorRTRuntime
from vla_spec.engines.onnxruntime import OnnxRuntimeRuntime
from vla_spec.errors import BadConfig, BadModel, DeviceError, NoDevice, SlowPath

MODEL = Path(__file__).parents[1] / "models" / "metaworld" / "small"
pytestmark = pytest.mark.skipif(not (MODEL / "decoder.onnx").exists(), reason="no shipped model here")
TIERS = (1, 2, 4, 8, 16, 32)
TREE = np.array([7, 9, 11, 13, 200, 3], np.int32), np.array([-1, 0, 0, 2, 2, 4], np.int32)
PATH = np.array([0, 2, 4, 5], np.int32)


@pytest.fixture(scope="module")
def inputs():
    with np.load(MODEL / "golden.npz", allow_pickle=False) as golden:
        return {name: golden[name] for name in ("images", "words", "state")}


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    return build_fake(MODEL, tmp_path_factory.mktemp("plans"), None, TIERS)


@pytest.fixture(scope="module")
def plain():
    return GraphEngine(MODEL, OnnxRuntimeRuntime())


def runtime_of(plans, cuda=None, trt=None, **running):
    cuda = cuda or FakeCuda()
    trt = trt or FakeTensorRT(cuda)
    return TensorRTRuntime(MODEL, lambda _: plans, trt.library(), cuda, Running(**running)), cuda, trt


def start(plans, cuda=None, trt=None, **running):
    runtime, cuda, trt = runtime_of(plans, cuda, trt, **running)
    try:
        return GraphEngine(MODEL, runtime), cuda, trt
    except BaseException:
        runtime.close()
        raise


def chain(engine, tokens):
    return engine.step(np.array(tokens, np.int32), np.arange(-1, len(tokens) - 1, dtype=np.int32))


def play(engine, inputs):
    """A prompt, a chain with a part of it kept, a tree with a path kept, a token: everything that is returned."""
    seen = [engine.prefill(inputs).logits.copy()]
    seen.append(chain(engine, range(5)).logits.copy())
    engine.commit(np.arange(2, dtype=np.int32))
    seen.append(engine.step(*TREE).logits.copy())
    engine.commit(PATH)
    seen.append(chain(engine, [5]).logits.copy())
    seen.append(np.array(engine.features))
    return seen


@pytest.mark.parametrize("is_rtx", [True, False])
@pytest.mark.parametrize("mode", ["always", "never"])
def test_gives_the_reference_s_numbers_captured_or_not(plans, plain, inputs, is_rtx, mode):
    cuda = FakeCuda()
    engine, _, _ = start(plans, cuda, FakeTensorRT(cuda, is_rtx), cuda_graphs=mode)
    wanted = play(plain, inputs)
    for _ in range(3):  # plain and captured, replayed, replayed
        for found, expected in zip(play(engine, inputs), wanted, strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert (cuda.count("launch") > 0) == (mode == "always")


def test_a_round_is_one_launch_and_one_wait(plans, inputs):
    engine, cuda, _ = start(plans)
    engine.prefill(inputs)
    chain(engine, range(8))
    cuda.forget()
    chain(engine, range(8))
    assert cuda.calls == ["launch", "record", "wait"]
    # Inputs lie together, outputs lie together: one copy each way.
    kinds = [name.split()[0] for name in cuda.done]
    assert kinds == ["host_to_device", "engine", "device_to_host"]


def test_the_first_round_of_a_size_is_plain_then_captured(plans, inputs):
    engine, cuda, trt = start(plans)
    engine.prefill(inputs)
    runs = sum(context.num_runs for context in trt.contexts)
    cuda.forget()
    chain(engine, range(16))
    after = cuda.calls[cuda.calls.index("wait") :]
    assert after == ["wait", "begin_capture", "copy", "copy", "end_capture", "instantiate", "destroy_graph"]
    assert cuda.calls.index("record") < cuda.calls.index("wait")
    assert sum(context.num_runs for context in trt.contexts) == runs + 1, "capturing must not run the engine"


def test_an_uncaptured_round_copies_runs_copies_and_waits_once(plans, inputs):
    engine, cuda, _ = start(plans, cuda_graphs="never")
    engine.prefill(inputs)
    chain(engine, range(4))
    cuda.forget()
    chain(engine, range(4))
    assert cuda.calls == ["copy", "copy", "record", "wait"]
    assert [name.split()[0] for name in cuda.done] == ["host_to_device", "engine", "device_to_host"]


def test_committing_a_chain_costs_nothing_a_tree_one_copy_per_moved_run(plans, inputs):
    engine, cuda, _ = start(plans)
    engine.prefill(inputs)
    chain(engine, range(6))
    cuda.forget()
    engine.commit(np.arange(4, dtype=np.int32))
    assert cuda.calls == []
    engine.step(*TREE)
    cuda.forget()
    engine.commit(PATH)  # row 0 lies right, row 2 moves, rows 4 and 5 move together
    assert cuda.calls == ["copy_2d", "copy_2d"]
    n, _, heads, _, width = engine.spec.state_shape
    chain(engine, [1])
    assert cuda.done[0] == f"copy_2d {width * 4}x{n * heads}"
    assert cuda.done[1] == f"copy_2d {2 * width * 4}x{n * heads}"


def test_a_step_writes_its_rows_and_a_commit_moves_rows_and_nothing_else(plans, inputs):
    engine, _, _ = start(plans)
    state = engine._state
    state.clear()
    engine.prefill(inputs)
    start_ = engine.length
    before = state.read()
    assert before.shape == (*np.array(state.shape)[[0, 2, 3]], state.shape[-1] * 4)
    engine.step(*TREE)
    after = state.read()
    changed = np.flatnonzero((before != after).any((0, 1, 3)))
    assert changed.tolist() == list(range(start_, start_ + 8)), "six nodes, padded to eight"
    engine.commit(PATH)
    moved = state.read()
    np.testing.assert_array_equal(moved[:, :, start_ : start_ + 4], after[:, :, start_ + PATH])
    np.testing.assert_array_equal(moved[:, :, :start_], before[:, :, :start_])


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("rows", [5, 8])
def test_rows_move_in_any_shape_as_numpy_would(heads, rows):
    """Also where a tensor is no multiple of 256 bytes, so that there is room between tensors."""
    from vla_spec.engines._trt.cache_state import DeviceState, state_bytes
    from vla_spec.engines._trt.lane import Lane

    cuda = FakeCuda()
    lane = Lane(cuda, 0, 0, False)
    shape = (6, 1, heads, rows, 8)
    state = DeviceState(shape, 2, lane)
    assert state.size == state_bytes(shape, 2) == cuda.used
    assert all(address % 256 == 0 for address in state.addresses)
    assert (state.read() == 0).all()
    rng = np.random.default_rng(0)
    for address in state.addresses:
        cuda.view(address, heads * rows * 16)[:] = rng.integers(0, 256, heads * rows * 16)
    for start_ in range(rows):
        for count in range(rows - start_ + 1):
            kept = np.sort(rng.choice(np.arange(start_, rows), count, replace=False)).astype(np.int32)
            wanted = state.read().copy()
            wanted[:, :, start_ : start_ + count] = wanted[:, :, kept]
            cuda.forget()
            state.move(start_, kept)
            assert cuda.count("copy_2d") <= count, "one copy per row at most, whatever the shape"
            np.testing.assert_array_equal(state.read(), wanted)
    lane.close()
    assert cuda.live == {}


def test_sizes_between_tiers_share_the_next_one(plans, inputs):
    engine, _, trt = start(plans)
    engine.prefill(inputs)
    for k in (5, 6, 7, 8):
        chain(engine, range(k))
    decoder = [context for context in trt.contexts if "mask" in context.shapes]
    # tied by the golden check and the steps: prompt, tree, chain, of 8 rows each; then nothing new
    assert sorted({context.shapes["mask"][2] for context in decoder}) == [8]


def test_contexts_share_scratch_memory_and_profiles_fit(plans, inputs):
    engine, _, trt = start(plans)
    engine.prefill(inputs)
    for k in TIERS:
        chain(engine, range(k))
    decoder = [context for context in trt.contexts if "mask" in context.shapes]
    assert len({context.scratch for context in decoder}) == 1
    for context in decoder:
        assert TIERS[context.profile] == context.shapes["mask"][2]


def test_cache_is_written_in_place_and_starts_at_zero(plans):
    engine, cuda, trt = start(plans)
    assert engine.length
    context = next(context for context in trt.contexts if "mask" in context.shapes)
    for i in range(2):
        assert context.addresses[f"past_key_{i}"] == context.addresses[f"present_key_{i}"]
    shape = context.shapes["past_key_0"]
    last_row = cuda.view(context.addresses["past_key_0"], 4 * int(np.prod(shape))).view(np.float32).reshape(shape)
    assert (last_row[:, :, -1] == 0).all()


def test_aux_streams_have_the_lane_s_priority(plans):
    cuda = FakeCuda()
    engine, _, trt = start(plans, cuda, FakeTensorRT(cuda, num_aux_streams=2))
    assert engine.runtime.graphs
    for context in trt.contexts:
        assert {cuda.streams[stream]["priority"] for stream in context.aux_streams} == {-5}


def test_drafters_get_a_stream_of_their_own_with_less_priority(plans, inputs):
    engine, cuda, _ = start(plans)
    aside = engine.runtime.aside()
    drafter = GraphEngine(MODEL, aside)
    assert cuda.streams[engine.runtime.lane.stream]["priority"] == -5
    assert cuda.streams[aside.lane.stream]["priority"] == 0
    wanted = play(engine, inputs)
    for found, expected in zip(play(drafter, inputs), wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("wait", "blocking"), [("spin", False), ("block", True)])
def test_wait_says_how_the_host_waits(plans, wait, blocking):
    engine, cuda, _ = start(plans, wait=wait)
    assert cuda.events[engine.runtime.lane.done]["blocking"] is blocking


@pytest.mark.parametrize("mode", ["always", "never"])
def test_time_on_the_device_is_between_two_events_and_changes_nothing(plans, inputs, mode):
    engine, cuda, _ = start(plans, cuda_graphs=mode)
    engine.prefill(inputs)
    scores = chain(engine, range(4)).logits.copy()
    call, before, num_events = engine._buffers[4].call, engine._state.read(), len(cuda.events)
    cuda.forget()
    assert call.time_on_device(3) == [250.0] * 3
    once = ["record", "launch", "record", "wait"] if mode == "always" else ["record", "copy", "copy", "record", "wait"]
    assert cuda.calls == ["event", "event", *once * 3, "destroy_event", "destroy_event"]
    assert len(cuda.events) == num_events
    np.testing.assert_array_equal(engine._state.read(), before)
    np.testing.assert_array_equal(chain(engine, range(4)).logits, scores)


def test_another_thread_gets_the_device_first(plans, inputs):
    import threading

    engine, cuda, _ = start(plans)
    engine.prefill(inputs)
    chain(engine, [1])
    cuda.forget()
    thread = threading.Thread(target=chain, args=(engine, [1]))
    thread.start()
    thread.join()
    assert cuda.calls[:2] == ["num_devices", "use"]
    cuda.forget()
    chain(engine, [1])
    chain(engine, [1])
    assert cuda.count("use") == 1, "back in this thread, once"


# --- what it refuses ---


def test_one_tier_is_batch_invariant_several_are_not(plans):
    many, one = FakePlans(plans.folder, "fp16", TIERS), FakePlans(plans.folder, "fp16", (16,))
    cuda = FakeCuda()
    trt = FakeTensorRT(cuda)
    assert not runtime_of(many, cuda, trt)[0].is_batch_invariant
    assert runtime_of(one, cuda, trt)[0].is_batch_invariant
    assert runtime_of(FakePlans(plans.folder, "fp16", (16, 45)), cuda, trt)[0].is_batch_invariant, "45 is the prompt's"
    assert runtime_of(plans, cuda, trt)[0].is_batch_invariant, "fp32"


def test_what_can_t_be_captured_is_refused_unless_allowed(plans, plain, inputs):
    cuda = FakeCuda()
    with pytest.raises(SlowPath, match="REQUIRE_USER_ALLOCATION"):
        start(plans, cuda, FakeTensorRT(cuda, capturable=False))
    cuda = FakeCuda()
    engine, _, _ = start(plans, cuda, FakeTensorRT(cuda, capturable=False), cuda_graphs="if_possible")
    for found, expected in zip(play(engine, inputs), play(plain, inputs), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert cuda.count("launch") == 0
    assert all(call.slow_reason for graph in engine.runtime.graphs for call in graph.calls)


@pytest.mark.parametrize("method", ["begin_capture", "end_capture", "instantiate"])
def test_a_capture_that_fails_is_told_and_the_stream_stays_usable(plans, plain, inputs, method):
    for mode in ("always", "if_possible"):
        cuda = FakeCuda()
        cuda.fail[method] = ["cudaErrorStreamCaptureUnsupported"] * 1000
        if mode == "always":
            with pytest.raises(SlowPath, match="cudaErrorStreamCaptureUnsupported"):
                start(plans, cuda, cuda_graphs=mode)
            continue
        engine, _, _ = start(plans, cuda, cuda_graphs=mode)
        for found, expected in zip(play(engine, inputs), play(plain, inputs), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_an_enqueue_that_fails_in_a_capture_ends_the_capture(plans):
    cuda = FakeCuda()
    trt = FakeTensorRT(cuda)
    trt.refuse.add("enqueue while capturing")
    with pytest.raises(SlowPath, match="made to fail"):
        start(plans, cuda, trt)
    assert cuda.count("begin_capture") == cuda.count("end_capture")
    gc.collect()
    assert cuda.live == {}


def test_a_failing_enqueue_is_a_device_error(plans, inputs):
    engine, _, trt = start(plans, cuda_graphs="never")
    trt.refuse.add("enqueue")
    with pytest.raises(DeviceError, match="made to fail"):
        engine.prefill(inputs)


def test_a_failing_launch_is_a_device_error(plans, inputs):
    engine, cuda, _ = start(plans)
    engine.prefill(inputs)
    cuda.fail["launch"] = ["cudaErrorIllegalAddress"]
    with pytest.raises(DeviceError, match="cudaErrorIllegalAddress"):
        engine.prefill(inputs)


def test_a_cache_that_would_be_copied_is_refused(plans):
    cuda = FakeCuda()
    with pytest.raises(SlowPath, match="not written in place"):
        start(plans, cuda, FakeTensorRT(cuda, in_place=False))
    gc.collect()
    assert cuda.live == {}


@pytest.mark.parametrize("is_rtx", [True, False])
def test_a_plan_of_another_device_is_refused(plans, tmp_path, is_rtx):
    build_fake(MODEL, tmp_path, None, TIERS, sm=86)
    cuda = FakeCuda()
    with pytest.raises(BadModel, match="compute capability" if is_rtx else "deserializeCudaEngine"):
        start(FakePlans(tmp_path), cuda, FakeTensorRT(cuda, is_rtx))
    gc.collect()
    assert cuda.live == {}


@pytest.mark.parametrize("is_rtx", [True, False])
def test_a_truncated_plan_is_refused(plans, tmp_path, is_rtx):
    build_fake(MODEL, tmp_path, None, TIERS)
    file = tmp_path / "decoder.plan"
    file.write_bytes(file.read_bytes()[:-10])
    cuda = FakeCuda()
    with pytest.raises(BadModel, match=r"decoder\.plan"):
        start(FakePlans(tmp_path), cuda, FakeTensorRT(cuda, is_rtx))
    gc.collect()
    assert cuda.live == {}


def test_a_missing_plan_is_refused(tmp_path):
    cuda = FakeCuda()
    with pytest.raises(BadModel, match="can't be read"):
        start(FakePlans(tmp_path), cuda)
    gc.collect()
    assert cuda.live == {}


def test_sizes_that_were_not_built_for_are_named(plans, tmp_path):
    build_fake(MODEL, tmp_path, None, (1, 4))
    claims_more = FakePlans(tmp_path, tiers=(1, 4, 8))
    with pytest.raises(BadModel, match=r"embeds of shape \[8, 96\]; valid: \[1, 96\]; \[4, 96\]"):
        start(claims_more)
    with pytest.raises(BadModel, match="8 rows are more than the largest"):
        start(FakePlans(tmp_path, tiers=(1, 4)))


@pytest.mark.parametrize("what", ["allocate", "allocate_pinned", "stream", "event", "context", "use"])
def test_trouble_at_any_point_leaves_nothing_behind(plans, what):
    """The nth call of a function fails, for every n that loading makes."""
    for n in range(40):
        cuda = FakeCuda()
        trt = FakeTensorRT(cuda)
        if what == "context":
            if n:
                break
            trt.refuse.add("context")
        else:
            cuda.fail[what] = [None] * n + ["cudaErrorMemoryAllocation"]
        try:
            engine, _, _ = start(plans, cuda, trt)
        except DeviceError:
            pass
        else:
            assert n > 0
            engine.runtime.close()
            return
        gc.collect()
        assert cuda.live == {}, n
    assert what == "context"


def test_out_of_memory_says_how_much_is_free(plans):
    cuda = FakeCuda(memory=100_000)
    with pytest.raises(DeviceError, match=r"out of memory.*are free"):
        start(plans, cuda)


def test_no_gpu_is_one_sentence(plans):
    with pytest.raises(NoDevice, match="no NVIDIA GPU"):
        start(plans, FakeCuda(num_devices=0))
    with pytest.raises(NoDevice, match="no device 3; valid: 0 to 0"):
        start(plans, device=3)


@pytest.mark.parametrize(
    "wrong", [{"wait": "sleep"}, {"cuda_graphs": "yes"}, {"priority": "top"}, {"drafter_priority": "?"}, {"device": -1}]
)
def test_options_are_checked(wrong):
    with pytest.raises(BadConfig, match="valid"):
        Running(**wrong)


# --- the end ---


def test_closing_frees_everything_and_later_use_is_an_error(plans, inputs):
    engine, cuda, trt = start(plans)
    aside = engine.runtime.aside()
    play(engine, inputs)
    play(GraphEngine(MODEL, aside), inputs)
    aside.close()
    engine.runtime.close()
    engine.runtime.close()
    for kind in ("device_blocks", "streams", "events", "graphs", "execs"):
        assert not getattr(cuda, kind), kind
    with pytest.raises(DeviceError, match="closed"):
        engine.prefill(inputs)
    with pytest.raises(DeviceError, match="closed"):
        engine.runtime.aside().close() or engine.runtime.empty((1,), np.float32)
    engine.features[:] += 1  # host memory is still there for whoever holds it
    del engine, aside
    gc.collect()
    assert cuda.live == {}
    assert trt.contexts


def test_forgetting_the_engine_frees_everything(plans, inputs):
    engine, cuda, _ = start(plans)
    play(engine, inputs)
    del engine
    gc.collect()
    assert cuda.live == {}


def test_a_call_keeps_its_runtime_alive(plans, inputs):
    cuda = FakeCuda()
    runtime, _, _ = runtime_of(plans, cuda)
    arrays = {name: runtime.empty(value.shape, value.dtype) for name, value in inputs.items()}
    arrays["embeds"] = runtime.empty((8, 96), np.float32)
    call = runtime.open(MODEL / "prompt.onnx").tie(arrays)
    del runtime
    gc.collect()
    for name, value in inputs.items():
        arrays[name][...] = value
    call.run()
    assert np.isfinite(arrays["embeds"]).all()
    assert np.abs(arrays["embeds"]).max() > 0
    del call, arrays
    gc.collect()
    assert cuda.live == {}


def test_a_lost_device_keeps_closing_from_failing(plans):
    engine, cuda, _ = start(plans)
    cuda.fail["free"] = ["cudaErrorDeviceUnavailable"]
    cuda.fail["synchronize"] = ["cudaErrorDeviceUnavailable"]
    engine.runtime.close()
    assert cuda.count("free") > 1, "one that failed keeps the others from nothing"


# --- kernels that TensorRT-RTX compiled ---


def test_compiled_kernels_are_kept_beside_the_plan(tmp_path):
    plans = build_fake(MODEL, tmp_path, None, TIERS)
    engine, _, trt = start(plans)
    assert trt.loaded_kernels == []
    engine.runtime.save_kernels()
    assert (tmp_path / "decoder.kernels").read_bytes() == trt.kernels
    _, _, trt = start(plans)
    assert trt.loaded_kernels == [trt.kernels] * 2
    cuda = FakeCuda()
    engine, _, _ = start(plans, cuda, FakeTensorRT(cuda, is_rtx=False))
    engine.runtime.save_kernels()  # TensorRT has none
    assert sorted(file.suffix for file in tmp_path.iterdir()).count(".kernels") == 2


def test_kernels_that_can_t_be_written_are_no_error(plans, monkeypatch):
    engine, _, _ = start(plans)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    engine.runtime.save_kernels()
    assert not list(plans.folder.glob("*.kernels"))


def test_the_double_is_strict():
    """What the order tests rely on."""
    cuda = FakeCuda()
    stream = cuda.stream(0)
    device, host = cuda.allocate(1024), cuda.allocate_pinned(1024)
    from vla_spec.engines._trt.cuda import CopyKind

    with pytest.raises(AssertionError, match="page-locked"):
        cuda.copy(device, device, 8, CopyKind.HOST_TO_DEVICE, stream)
    with pytest.raises(AssertionError, match="device"):
        cuda.copy(device + 1020, host, 8, CopyKind.HOST_TO_DEVICE, stream)
    cuda.pinned_blocks[host][:] = 3
    cuda.copy(device, host, 8, CopyKind.HOST_TO_DEVICE, stream)
    assert (cuda.view(device, 8) == 0xFF).all(), "nothing happens before somebody waits"
    cuda.synchronize(stream)
    assert (cuda.view(device, 8) == 3).all()
    cuda.free(device)
    with pytest.raises(AssertionError):
        cuda.fill(device, 0, 8, stream)
    assert fake_tensorrt.read_plan(b"no plan") is None
