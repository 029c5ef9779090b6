"""TensorRT engines, built here by the real builder: no GPU is needed to find out what would not build on a robot."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx", reason="needs the extra [train]")
pytest.importorskip("tensorrt_rtx", reason="needs the extra [tensorrt-rtx]")
pytest.importorskip("filelock", reason="needs the extra [tensorrt-rtx]")

from onnx import TensorProto, helper  # noqa: E402
from quantised_decoder import quantise, shift_a_zero_point  # noqa: E402

from vla_spec.cli import main  # noqa: E402
from vla_spec.engines import cache  # noqa: E402
from vla_spec.engines._model_files import ModelFiles  # noqa: E402
from vla_spec.engines._trt import builder, inspection, library, profiles  # noqa: E402
from vla_spec.engines._trt.builder import BuilderOptions  # noqa: E402
from vla_spec.engines._trt.profiles import Size  # noqa: E402
from vla_spec.engines.build import BuildOptions, build_engine, build_graph, prepare_all  # noqa: E402
from vla_spec.errors import BadConfig, BadModel, MissingDependency  # noqa: E402
from vla_spec.progress import Silent  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from engine_builds import openvla_layers, write_random_model  # noqa: E402

MODEL = Path(__file__).parents[1] / "models" / "metaworld"
DEVICES = (86, 89, 120)
RTX = library.open_library("tensorrt-rtx")


def options(precision="fp16", tiers=(1, 8, 32), **more):
    return BuildOptions(precision=precision, tiers=tiers, builder=BuilderOptions(DEVICES, **more))


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def fp16(cache_dir):
    return build_engine(MODEL, options(), Silent(), cache_dir)


@pytest.fixture
def model(tmp_path):
    """A copy of the shipped model that a test may spoil."""
    built = ("*.int8.*", "*.fp8.*")
    return shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("small", "*.npz", *built))


# --- what is built ---------------------------------------------------------------------------------------------------


def check_decoder(entry, spec, precision="fp16"):
    assert entry.summary["kv_updates"] == 2 * spec.num_layers
    assert entry.summary["attentions"] == spec.num_layers
    heavy = {p for kind in entry.summary["precisions"].values() for p in kind}
    assert heavy == ({precision} if precision in ("fp16", "bf16") else {precision, "fp16"})


def test_all_graphs_build_for_three_generations_in_fp16(fp16):
    assert set(fp16.graphs) == {"prompt", "decoder", "commit", "block_head", "feature_head"}
    spec = ModelFiles.describe(MODEL).decoder
    check_decoder(fp16.graphs["decoder"], spec)
    assert fp16.graphs["decoder"].summary["precisions"]["MATRIX_MULTIPLY"] == {"fp16": 4 * spec.num_layers + 1}
    assert not fp16.graphs["decoder"].is_decomposed
    assert fp16.graphs["commit"].summary["kv_updates"] == 2 * spec.num_layers
    assert fp16.graphs["prompt"].summary["precisions"]["CONVOLUTION"] == {"fp16": 7}
    for name in ("block_head", "feature_head"):
        assert set(fp16.graphs[name].summary["precisions"]["MATRIX_MULTIPLY"]) == {"fp16"}
    assert fp16.identity.device == {"sm": list(DEVICES)}
    weights = (MODEL / "target.safetensors").stat().st_size
    assert weights / 2 < len(fp16.read_plan("decoder"))
    assert sum(len(fp16.read_plan(name)) for name in fp16.graphs) == fp16.size


def test_it_is_found_by_a_runtime_and_not_built_again(fp16, cache_dir):
    again = build_engine(MODEL, options(), Silent(), cache_dir)
    assert again.was_cached
    assert again == fp16
    for sm in DEVICES:
        wanted = cache.Wanted("tensorrt-rtx", RTX.version, "fp16", sm)
        assert cache.load(MODEL, wanted, cache_dir) == fp16


def test_one_profile_per_tier_and_one_range_for_each_size_of_the_drafters(fp16):
    assert fp16.identity.profiles["decoder"] == [{"k": [k, k, k]} for k in (1, 8, 32)]
    spec = ModelFiles.describe(MODEL).decoder
    rows, positions = [1, 8, spec.capacity], [1, 32, 32]
    assert fp16.identity.profiles["block_head"] == [{"r": rows, "n": positions}]
    assert fp16.identity.profiles["feature_head"] == [{"n": rows}]


def test_a_drafter_model_of_its_own_builds_and_says_that_no_attention_kernel_fits(cache_dir):
    engine = build_engine(MODEL / "small", options(), Silent(), cache_dir)
    check_decoder(engine.graphs["decoder"], ModelFiles.describe(MODEL / "small").decoder)
    assert engine.graphs["decoder"].is_decomposed  # three heads, one query


def test_bf16_builds(cache_dir):
    engine = build_engine(MODEL / "small", options("bf16", (8, 32)), Silent(), cache_dir)
    check_decoder(engine.graphs["decoder"], ModelFiles.describe(MODEL / "small").decoder, "bf16")
    assert not engine.graphs["decoder"].is_decomposed  # eight queries do have a kernel


@pytest.mark.parametrize(("precision", "devices"), [("int8", DEVICES), ("fp8", (89, 120))])
def test_a_quantised_decoder_builds_and_every_product_is_in_its_precision(precision, devices, model, cache_dir):
    quantise(model, precision)
    wanted = BuildOptions(precision=precision, tiers=(8, 32), builder=BuilderOptions(devices))
    engine = build_engine(model, wanted, Silent(), cache_dir)
    spec, decoder = ModelFiles.describe(model).decoder, engine.graphs["decoder"]
    check_decoder(decoder, spec, precision)
    assert decoder.summary["precisions"]["MATRIX_MULTIPLY"] == {precision: 4 * spec.num_layers + 1}
    assert {f"decoder.{precision}.onnx", f"decoder.{precision}.safetensors"} < set(engine.identity.files)
    assert "decoder.onnx" not in engine.identity.files
    assert engine.identity.quantisation


def test_what_the_builder_is_told_is_part_of_the_key(fp16, cache_dir):
    prepared = prepare_all(MODEL, "fp16")
    files = ModelFiles.describe(MODEL)

    def key(wanted):
        from vla_spec.engines.build import identify

        sizes = {n: profiles.profiles_of(n, g.shapes, files, wanted.tiers) for n, g in prepared.items()}
        return identify(MODEL, prepared, sizes, wanted.tiers, wanted, RTX).key

    assert key(options()) == fp16.key
    others = [
        options("bf16"), options(tiers=(1, 8)), options(workspace_bytes=1 << 28), options(optimization_level=4),
        options(detailed=False), BuildOptions(tiers=(1, 8, 32), builder=BuilderOptions((86,))),
    ]  # fmt: skip
    assert len({fp16.key, *map(key, others)}) == 1 + len(others)


def test_a_decoder_like_openvlas_builds_with_rotary_positions_and_grouped_queries(tmp_path):
    """Its true structure, fewer and narrower layers; also with fewer heads for keys than for queries."""
    for kv_heads in (4, 2):
        spec = dataclasses.replace(
            openvla_layers(2), num_heads=4, num_kv_heads=kv_heads, head_width=64, hidden_width=256, mlp_width=512
        )
        file = write_random_model(spec, tmp_path)
        prepared = builder.prepare(file, "fp16")
        sizes = [{"k": Size.exactly(tier)} for tier in (2, 8, 288)]
        plan = build_graph(RTX, "decoder", prepared, sizes, options())
        assert plan.summary["kv_updates"] == 2 * spec.num_layers
        assert plan.summary["attentions"] == spec.num_layers
        assert plan.summary["precisions"]["MATRIX_MULTIPLY"] == {"fp16": 5 * spec.num_layers + 1}
        assert not plan.is_decomposed


def test_default_tiers_cover_every_step_and_every_prompt(tmp_path):
    fixed = ModelFiles.describe(MODEL)
    assert profiles.default_tiers(fixed) == (1, 2, 4, 8, 16, 32)
    assert profiles.default_tiers(dataclasses.replace(fixed, base_rows=40)) == (1, 2, 4, 8, 16, 32, 40)
    growing = dataclasses.replace(fixed, base_rows=257, counted_input="words", decoder=openvla_layers(1))
    assert profiles.default_tiers(growing) == (1, 2, 4, 8, 16, 32, 273, 289, 320)
    odd = dataclasses.replace(fixed, decoder=dataclasses.replace(fixed.decoder, max_step=12))
    assert profiles.default_tiers(odd) == (1, 2, 4, 8, 12, 13)
    for files in (fixed, growing, odd):
        assert profiles.check_tiers(profiles.default_tiers(files), files)


def test_heavy_models_have_no_tier_of_their_own_for_one_token(tmp_path):
    with (tmp_path / "target.safetensors").open("wb") as file:
        file.truncate(profiles.HEAVY_BYTES)  # takes no room
    assert profiles.default_tiers(dataclasses.replace(ModelFiles.describe(MODEL), path=tmp_path)) == (2, 4, 8, 16, 32)


def test_a_counted_prompt_gets_a_range(tmp_path):
    files = dataclasses.replace(
        ModelFiles.describe(MODEL), base_rows=257, counted_input="words", decoder=openvla_layers(1)
    )
    shapes = {"pixels": (1, 6, 224, 224), "words": (1, "n")}
    assert profiles.profiles_of("prompt", shapes, files, (2, 320)) == ({"n": Size(1, 32, 63)},)
    assert profiles.profiles_of("prompt", {"pixels": (1, 6, 224, 224)}, files, (2, 320)) == ({},)


# --- what is refused -------------------------------------------------------------------------------------------------


def edit_graph(file, change):
    graph = onnx.load(str(file), load_external_data=False)
    change(graph)
    file.write_bytes(graph.SerializeToString())


def build_one(folder, graph="decoder", precision="fp16", sizes=None, tiers=(8,), **more):
    """One graph of a folder, as `build_engine` does it."""
    prepared = builder.prepare(folder / f"{graph}.onnx", precision)
    if sizes is None:
        sizes = profiles.profiles_of(graph, prepared.shapes, ModelFiles.describe(folder), tiers)
    return build_graph(RTX, graph, prepared, sizes, options(precision, tiers, **more))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_graph_that_was_cut_off_is_refused(share, model):
    file = model / "decoder.onnx"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BadModel, match=r"decoder\.onnx: not (an ONNX graph, or cut off|a valid ONNX graph)"):
        build_one(model)


def test_a_missing_graph_is_refused(model):
    (model / "commit.onnx").unlink()
    with pytest.raises(BadModel, match=r"commit\.onnx: missing; `vla-spec export` writes it"):
        build_engine(model, options(), Silent(), model / "cache")


def test_an_opset_without_the_operators_is_refused(model):
    edit_graph(model / "decoder.onnx", lambda m: setattr(m.opset_import[0], "version", 23))
    with pytest.raises(BadModel, match=r"decoder\.onnx: opset 23 has no TensorScatter; valid: 24 or later"):
        build_one(model)


def test_an_opset_that_does_not_exist_is_refused(model):
    edit_graph(model / "decoder.onnx", lambda m: setattr(m.opset_import[0], "version", 999))
    with pytest.raises(BadModel, match=r"decoder\.onnx: opset 999; valid: up to \d+"):
        build_one(model)


def test_an_operator_that_tensorrt_does_not_have_is_named_with_its_node(model):
    def change(graph):
        graph.opset_import.append(helper.make_opsetid("nowhere", 1))
        node = next(n for n in graph.graph.node if n.op_type == "Gelu")
        node.op_type, node.domain = "Unheard", "nowhere"

    edit_graph(model / "decoder.onnx", change)
    with pytest.raises(
        BadModel, match=r"decoder\.onnx: tensorrt-rtx .* can't read it \(node blocks\.0\.gelu, Unheard: "
    ):
        build_one(model)


def test_attention_in_single_precision_is_refused_before_anything_is_built(model):
    with pytest.raises(
        BadConfig, match=r"precision 'fp32'; valid: fp16, bf16, int8, fp8; Attention in fp32 has no kernel"
    ):
        build_one(model, precision="fp32")


def test_the_librarys_own_refusal_of_attention_in_single_precision_is_told(monkeypatch):
    """If it ever has such kernels, this test says so."""
    raw = onnx.load(str(MODEL / "decoder.onnx"), load_external_data=False).SerializeToString()
    graph = builder.prepare(MODEL / "decoder.onnx", "fp16")._replace(model=raw)
    monkeypatch.setattr(builder, "_allow_decomposition", lambda trt, network: False)
    with pytest.raises(BadModel, match=r"can't build it for 86, 89, 120 \(.*Attention operation was not supported"):
        builder.build(RTX, graph, [{"k": Size.exactly(8)}], BuilderOptions(DEVICES))


def test_a_layer_that_stayed_in_single_precision_is_found_and_named(model):
    """TensorRT #4590: what computes in another precision than asked for must not pass unnoticed."""
    file = model / "decoder.onnx"
    half = onnx.load_from_string(builder.prepare(file, "fp16").model)
    node = next(n for n in half.graph.node if n.name == "blocks.3.up.out")
    inner = node.output[0]
    casts = []
    for i, name in enumerate(node.input):
        node.input[i] = f"{name}.single"
        casts.append(helper.make_node("Cast", [name], [f"{name}.single"], to=TensorProto.FLOAT))
    node.output[0] = f"{inner}.single"
    at = list(half.graph.node).index(node)
    nodes = list(half.graph.node)
    nodes[at : at + 1] = [*casts, node, helper.make_node("Cast", [node.output[0]], [inner], to=TensorProto.FLOAT16)]
    del half.graph.node[:]
    half.graph.node.extend(nodes)
    graph = builder.prepare(file, "fp16")._replace(model=half.SerializeToString())
    with pytest.raises(BadModel, match=r"decoder: layers are in fp32 \(blocks\.3\.up\.out.*\); valid: fp16"):
        build_graph(RTX, "decoder", graph, [{"k": Size.exactly(8)}], options())


def test_missing_native_layers_are_found():
    summary = inspection.NetworkSummary(9, 26, 14, {"MATRIX_MULTIPLY": {"fp16": 57}}, {})
    with pytest.raises(
        BadModel, match="26 cache updates and 14 attention layers of the library's own; valid: 28 and 14"
    ):
        inspection.check_summary("decoder", summary, "fp16", 28, 14)
    with pytest.raises(BadModel, match="no layer is quantised"):
        inspection.check_summary("decoder", summary, "int8", 26, 14)


def test_a_zero_point_that_is_not_zero_is_refused_with_its_node(model):
    node = shift_a_zero_point(quantise(model))
    prepared = builder.prepare(model / "decoder.int8.onnx", "int8")
    with pytest.raises(
        BadModel, match=rf"decoder\.int8\.onnx: .*node {re.escape(node)}, Quant.*zero point is not supp"
    ):
        build_graph(RTX, "decoder", prepared, [{"k": Size.exactly(8)}], options("int8"))


def test_a_quantised_graph_of_another_model_is_refused(model):
    quantise(model)
    edit_graph(model / "decoder.onnx", lambda m: setattr(m, "producer_version", "another"))
    with pytest.raises(BadModel, match=r"decoder\.int8\.onnx: made from another decoder\.onnx"):
        build_engine(model, options("int8"), Silent(), model / "cache")


def test_int8_without_a_quantised_graph_is_refused(model):
    with pytest.raises(BadModel, match=r"decoder\.int8\.json: missing; `vla-spec quantize"):
        build_engine(model, options("int8"), Silent(), model / "cache")


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ([{"k": Size(8, 4, 32)}], r"profile 0 of embeds is \[8, 192\], \[4, 192\], \[32, 192\]; valid: 1 <= smallest"),
        ([{"k": Size(0, 4, 32)}], r"profile 0 of embeds is"),
        ([{"k": Size.exactly(8)}, {}, {"m": Size.exactly(8)}], r"profile 2 says nothing about dimension k"),
    ],
)
def test_contradictory_profiles_are_refused(sizes, says, model):
    with pytest.raises(BadConfig, match=says):
        build_one(model, sizes=sizes)


def test_profiles_whose_inputs_contradict_each_other_are_refused_by_the_builder_and_told(model):
    """The drafted positions of the block head have a row each in its mask, whatever their sizes are called."""

    def change(graph):
        mask = next(value for value in graph.graph.input if value.name == "mask")
        mask.type.tensor_type.shape.dim[2].dim_param = "others"

    edit_graph(model / "block_head.onnx", change)
    sizes = [{"r": Size.exactly(4), "n": Size.exactly(5), "others": Size.exactly(6)}]
    with pytest.raises(BadModel, match=r"block_head\.onnx: tensorrt-rtx .* can't build it"):
        build_one(model, "block_head", sizes=sizes)


def test_a_dimension_without_a_known_size_is_refused(model):
    def change(graph):
        graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "rows"

    edit_graph(model / "block_head.onnx", change)
    with pytest.raises(BadConfig, match=r"block_head\.onnx: no profile for its dimension rows; valid: n, r"):
        build_one(model, "block_head")


@pytest.mark.parametrize(
    ("tiers", "says"),
    [
        ((), "tiers empty; valid: ascending numbers from 1 to 77"),
        ((8, 8), "tiers 8,8; valid: ascending"),
        ((0, 8), "tiers 0,8; valid: ascending"),
        ((1, 8, 78), "tiers 1,8,78; valid: ascending numbers from 1 to 77"),
        ((33, 40), "tiers 33,40: none for steps; valid: at least one up to 32"),
        ((1, 8), "tiers 1,8: none for the prompt; valid: at least one from 13 rows on"),
    ],
)
def test_tiers_that_can_not_be_are_refused(tiers, says):
    with pytest.raises(BadConfig) as error:
        profiles.check_tiers(tiers, ModelFiles.describe(MODEL))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("sm", "says"),
    [
        ((), r"sm is not given: tensorrt-rtx .* can't build for it; valid: 75, 80, 86, 89, 120, 121"),
        ((90,), "sm 90: .*need full TensorRT on the device"),
        ((86, 87), "sm 87: .*Orin 87"),
    ],
)
def test_devices_that_need_the_full_library_are_refused(sm, says):
    with pytest.raises(BadConfig, match=says):
        build_engine(MODEL, BuildOptions(builder=BuilderOptions(sm)), Silent())


def test_builder_options_that_can_not_be_are_refused():
    for wrong, says in (
        ({"capabilities": (86, 86)}, "names one twice"),
        ({"workspace_bytes": 5}, "workspace_bytes 5; valid: from 1048576"),
        ({"optimization_level": 6}, "optimization_level 6; valid: 0 to 5"),
    ):
        with pytest.raises(BadConfig, match=says):
            BuilderOptions(**wrong)


def test_weights_that_are_no_part_of_the_model_are_refused(model):
    def change(graph):
        tensor = next(t for t in graph.graph.initializer if t.data_location == TensorProto.EXTERNAL)
        next(entry for entry in tensor.external_data if entry.key == "location").value = "policy.json"

    edit_graph(model / "decoder.onnx", change)
    with pytest.raises(BadModel, match=r"points to 'policy\.json'; valid: target\.safetensors or decoder\.safetensors"):
        build_one(model)


def test_weights_that_were_cut_off_or_changed_are_refused(model):
    file = model / "block_head.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(BadModel, match=r"block_head\.safetensors: cut off, \d+ bytes; block_head\.onnx needs \d+"):
        build_one(model, "block_head")
    file = model / "target.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(BadModel, match=r"target\.safetensors: corrupt or of another model"):
        build_engine(model, options(), Silent(), model / "cache")


# --- the library -----------------------------------------------------------------------------------------------------


def test_a_stub_of_the_library_is_not_taken_for_it(monkeypatch):
    monkeypatch.setattr(library, "_opened", {})
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    with pytest.raises(
        MissingDependency, match=r"tensorrt with Builder, OnnxParser.* \(found a stub without content\)"
    ):
        library.open_library("tensorrt")


def test_a_library_that_is_too_old_names_what_it_lacks(monkeypatch):
    old = types.ModuleType("tensorrt")
    for name in ("Builder", "OnnxParser", "Runtime", "ILogger", "BuilderFlag", "INetworkDefinition", "__version__"):
        setattr(old, name, types.SimpleNamespace())
    old.__version__ = "10.0.1"
    old.LayerType = types.SimpleNamespace(ATTENTION_INPUT=1)
    old.INetworkDefinition.add_attention = None
    monkeypatch.setattr(library, "_opened", {})
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(
        MissingDependency, match=r"LayerType\.KV_CACHE_UPDATE, .*add_attention \(found version 10\.0\.1\)"
    ):
        library.open_library("tensorrt")


def test_a_library_that_is_not_there_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(library, "_opened", {})
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependency, match=r"pip install 'vla_spec\[tensorrt-rtx\]'"):
        library.open_library("tensorrt-rtx")
    with pytest.raises(BadConfig, match="backend 'trt'; valid: tensorrt, tensorrt-rtx"):
        library.open_library("trt")


def test_every_name_that_both_libraries_must_have_is_in_this_one():
    assert RTX.builds_ahead
    assert set(DEVICES) <= set(RTX.capabilities)
    assert all(library._has(RTX.module, name) for name in library.NEEDED)


def test_messages_are_taken_once_and_not_repeated():
    RTX.messages()
    for text in ("first\nline", "second", "second"):
        RTX.log.log(RTX.module.ILogger.ERROR, text)
    RTX.log.log(RTX.module.ILogger.INFO, "chatter")
    assert RTX.messages() == "first line | second"
    assert RTX.messages() == ""


# --- the engine inspector --------------------------------------------------------------------------------------------


def test_the_inspectors_answer_is_read_by_precision():
    text = json.dumps(
        {
            "Layers": [
                {
                    "Name": "gemm", "LayerType": "gemm",
                    "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP16 format"}],
                    "Outputs": [{"Name": "y", "Format/Datatype": "Half"}],
                },
                {
                    "Name": "norm", "LayerType": "kgen",
                    "Inputs": [{"Name": "a", "Format/Datatype": "Row major linear FP32"}],
                    "Outputs": [{"Name": "b", "Format/Datatype": "Float"}],
                },
                {"Name": "shape", "Inputs": [], "Outputs": [{"Name": "i", "Format/Datatype": "Int64"}]},
                "a bare name, as without detailed verbosity",
            ]
        }
    )  # fmt: skip
    assert inspection.read_inspector(text) == inspection.EngineSummary(4, {"fp16": 2, "fp32": 2}, ("norm",))
    for wrong in ("", "[]", '{"Layers": 3}'):
        with pytest.raises(BadModel, match="the engine inspector's answer can't be read"):
            inspection.read_inspector(wrong)


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments):
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return done.value.code


def test_the_command_builds_lists_and_cleans(tmp_path, capsys):
    small = MODEL / "small"
    assert run("build", small, "--sm", "89", "--tiers", "8,32", "--cache", tmp_path) == 0
    out = capsys.readouterr().out
    manifest = Path(out.split()[-1])
    assert manifest.name == "manifest.json"
    assert json.loads(manifest.read_text())["identity"]["device"] == {"sm": [89]}
    assert "SM89" in out
    assert run("build", small, "--sm", "89", "--tiers", "8,32", "--cache", tmp_path) == 0
    assert "found in the cache" in capsys.readouterr().out
    assert run("build", "--list", "--cache", tmp_path) == 0
    assert "1 engines" in capsys.readouterr().out
    assert run("build", MODEL, "--list", "--cache", tmp_path) == 0
    assert "0 engines" in capsys.readouterr().out
    assert run("build", "--clean", "--cache", tmp_path) == 0
    assert capsys.readouterr().out.endswith("1 removed\n")
    assert cache.read_all(tmp_path) == ([], [])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "which model? name its folder"),
        ((MODEL, "--list", "--clean"), "exclude each other"),
        ((MODEL, "--sm", "8.9"), "--sm '8.9': expected numbers"),
        ((MODEL, "--tiers", "few"), "--tiers 'few': expected numbers"),
        ((MODEL, "--sm", "90"), "sm 90"),
        ((MODEL, "--precision", "fp64", "--sm", "89"), "precision 'fp64'; valid: fp16, bf16, int8, fp8"),
        ((MODEL, "--backend", "cuda"), "backend 'cuda'; valid: tensorrt, tensorrt-rtx"),
        (("no/such/model", "--sm", "89"), "no/such/model"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, says, tmp_path, capsys):
    assert run("build", *arguments, "--cache", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
