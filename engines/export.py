"""Write a trained policy as a model folder: weights once, ONNX graphs that point into them, golden inputs.

The weights are in half precision. The graphs are exported in fp32 with every large weight replaced by "external
half-precision tensor, then Cast", which ONNX Runtime folds when it loads. So a policy ships as two bytes per parameter
for all engines together.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from vla_spec.atomic import replacing
from vla_spec.engines._decoder_spec import DecoderSpec
from vla_spec.engines._graph_engine import GraphEngine
from vla_spec.engines._model_files import (
    COMMIT_GRAPH,
    DECODER_GRAPH,
    GOLDEN,
    PROMPT_GRAPH,
    WEIGHTS,
    ModelFiles,
    hash_weights,
)
from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines.graphs.block_head import block_head_model
from vla_spec.engines.graphs.commit import commit_model
from vla_spec.engines.graphs.decoder import decoder_model
from vla_spec.engines.graphs.feature_head import feature_head_model
from vla_spec.engines.nets.block_head import BlockHead
from vla_spec.engines.nets.feature_head import FeatureHead
from vla_spec.engines.nets.graphs import Prompt
from vla_spec.engines.nets.head_config import TARGET_KEY, HeadConfig
from vla_spec.engines.nets.levels import NUM_BINS, TOKENIZER_HIGH, TOKENIZER_LOW
from vla_spec.engines.nets.vla import VLA
from vla_spec.engines.nets.weights import load_model, policy_file, save_half

OPSET = 17
SMALL = 64  # weights of fewer elements stay in the graph


def point_to_weights(graph_file: Path, weights_file: Path, prefix: str, out: Path) -> None:
    """Replace the graph's weights by references into a safetensors file; written atomically."""
    model = onnx.load(graph_file)
    index = WeightsFile.open(weights_file).tensors
    kept, casts = [], []
    for tensor in model.graph.initializer:
        name = tensor.name.removeprefix(prefix)
        if name not in index or np.prod(tensor.dims) < SMALL:
            kept.append(tensor)
            continue
        offset, length, shape, _ = index[name]
        assert shape == tuple(tensor.dims), f"{name}: {shape} {tensor.dims}"
        half = onnx.TensorProto(
            name=f"{tensor.name}.half", data_type=onnx.TensorProto.FLOAT16, dims=shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )  # fmt: skip
        for key, value in (("location", weights_file.name), ("offset", offset), ("length", length)):
            half.external_data.add(key=key, value=str(value))
        kept.append(half)
        casts.append(onnx.helper.make_node("Cast", [half.name], [tensor.name], to=onnx.TensorProto.FLOAT))
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(casts + nodes)
    temporary = out.with_suffix(".tmp")
    temporary.write_bytes(model.SerializeToString())
    temporary.replace(out)
    onnx.checker.check_model(str(out))


def export_graph(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], input_names: list[str], output_names: list[str],
    dynamic: dict[str, dict[int, str]], weights_file: Path, out: Path, prefix: str = "model.",
) -> None:  # fmt: skip
    """Trace a module and write it to ``out`` with its weights in ``weights_file``."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = Path(folder) / "raw.onnx"
        # Without constant folding the weights keep their names, which is how they are found in the safetensors file.
        torch.onnx.export(
            module, inputs, str(raw), input_names=input_names, output_names=output_names, dynamic_axes=dynamic,
            opset_version=OPSET, do_constant_folding=False, dynamo=False,
        )  # fmt: skip
        point_to_weights(raw, weights_file, prefix, out)


def decoder_spec(model: VLA) -> DecoderSpec:
    """The embedded policy's decoder, as the graph's writer needs it."""
    c = model.config
    third = c.num_layers // 3
    return DecoderSpec(
        num_layers=c.num_layers,
        num_heads=c.num_heads,
        num_kv_heads=c.num_heads,
        head_width=c.width // c.num_heads,
        hidden_width=c.width,
        mlp_width=c.mlp_width,
        vocab_size=c.num_bins,
        capacity=c.prompt_length + c.num_tokens,
        taps=(third, 2 * third) if third else (),
        prompt_attention="full",
    )


def write_decoder(out: Path, spec: DecoderSpec) -> None:
    """Write decoder.onnx and commit.onnx into a folder that has target.safetensors already."""
    weights = WeightsFile.open(out / WEIGHTS)
    for name, model in ((DECODER_GRAPH, decoder_model(spec, weights)), (COMMIT_GRAPH, commit_model(spec))):
        with replacing(out / name) as temporary:
            temporary.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(out / name))


def export_policy(model: VLA, vocabulary: list[str], out: Path, golden_inputs: dict[str, np.ndarray]) -> None:
    """Write policy.json, engine.json, target.safetensors, the graphs and golden.npz into ``out``.

    Args:
        model: trained network.
        vocabulary: words by id.
        out: the folder; made if it is not there.
        golden_inputs: images uint8 [1, cameras, s, s, 3], words int64 [1, w], state float32 [1, s].
    """
    out.mkdir(parents=True, exist_ok=True)
    config = model.config
    save_half(out / WEIGHTS, *policy_file(model, vocabulary))
    policy: dict[str, Any] = {
        "image_size": config.image_size,
        "num_cameras": config.num_cameras,
        "state_size": config.state_size,
        "horizon": config.horizon,
        "action_size": config.action_size,
        "max_words": config.max_words,
        "vocabulary": vocabulary,
        "tokenizer": {
            "name": "uniform_bins",
            "vocab_size": NUM_BINS,
            "low": [TOKENIZER_LOW] * config.action_size,
            "high": [TOKENIZER_HIGH] * config.action_size,
            "unit": [0.01, 0.01, 0.01, 1.0],  # an action of 1 moves the arm's target by 1 cm; the gripper is a switch
        },
        "never_relaxed_dofs": [3],
        "groups": [0, 0, 0, 1],
        "state_low": [-1.0, -0.5, -0.5, -0.5],
        "state_high": [1.0, 1.5, 1.5, 1.5],
    }
    with replacing(out / "policy.json") as temporary:
        temporary.write_text(json.dumps(policy, indent=1) + "\n", encoding="utf-8")
    export_graphs(out, golden_inputs)


def export_graphs(out: Path, golden_inputs: dict[str, np.ndarray]) -> None:
    """Write everything that follows from target.safetensors: engine.json, the graphs and golden.npz."""
    model = load_model(out / WEIGHTS)  # what is exported is what was written: rounded to half precision
    tensors = tuple(torch.from_numpy(golden_inputs[k]) for k in ("images", "words", "state"))
    with torch.inference_mode():
        export_graph(
            Prompt(model), tensors, ["images", "words", "state"], ["embeds"], {}, out / WEIGHTS, out / PROMPT_GRAPH
        )
    spec = decoder_spec(model)
    write_decoder(out, spec)
    ModelFiles(out, hash_weights(out), spec, model.config.prompt_length, None, "token.weight", "position").write()
    write_golden(out, golden_inputs)


def write_golden(out: Path, inputs: dict[str, np.ndarray]) -> None:
    """Run the reference engine on the golden inputs and keep what it says."""
    from vla_spec.engines.pytorch import PyTorchRuntime

    engine = GraphEngine(out, PyTorchRuntime(), is_checked=False)
    rng = np.random.default_rng(0)
    chain = rng.integers(0, NUM_BINS, 6).astype(np.int32)
    tree = rng.integers(0, NUM_BINS, 7).astype(np.int32)
    golden = dict(inputs)
    golden["prefill_logits"] = engine.prefill(inputs).logits
    for name, tokens, parents in (
        ("chain", chain, np.arange(-1, 5, dtype=np.int32)),
        ("tree", tree, np.array([-1, 0, 0, 1, 2, 2, 4], np.int32)),
    ):
        golden |= {f"{name}_tokens": tokens, f"{name}_parents": parents}
        golden[f"{name}_logits"] = engine.step(tokens, parents).logits.copy()
    with replacing(out / GOLDEN) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **golden)  # type: ignore[arg-type]


def export_head(name: str, head: BlockHead | FeatureHead, out: Path) -> None:
    """Write the weights and the graph of a drafter's head into the folder of the policy that it was distilled for."""
    target = hash_weights(out)
    save_half(out / f"{name}.safetensors", head.state_dict(), {"config": head.config.to_json(), TARGET_KEY: target})
    write_head_graph(name, out)


def write_head_graph(name: str, out: Path) -> None:
    """Write ``name.onnx`` beside its weights.

    Raises:
        BadModel: weights that are missing, corrupt or incomplete.
    """
    weights = WeightsFile.open(out / f"{name}.safetensors")
    config = HeadConfig.from_json(weights.metadata.get("config", ""), str(weights.path))
    model = (block_head_model if name == "block_head" else feature_head_model)(config, weights)
    with replacing(out / f"{name}.onnx") as temporary:
        temporary.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(out / f"{name}.onnx"))
