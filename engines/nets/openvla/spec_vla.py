"""Spec-VLA's published drafters (EAGLE's layout): reading, checking, and writing into a model folder.

A folder with config.json of a one-layer Llama and ``fc.*``, ``layers.0.*`` and ``embed_tokens.weight``, the latter a
copy of the target's, which takes its place. Published files are PyTorch's zip archives: these are read by its
restricted loader, which makes tensors and nothing else, once, here; the model folder is data only, as always.
Source: https://github.com/PineTreeWss/SpecVLA, `specdecoding/model/cnets.py`, class MMModel.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from vla_spec.atomic import replacing
from vla_spec.engines._decoder_spec import DecoderSpec
from vla_spec.engines._model_files import WEIGHTS, ModelFiles
from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines.graphs.spec_vla_head import spec_vla_head_model
from vla_spec.engines.nets.openvla.checkpoint import SINGLE, Checkpoint, Piece
from vla_spec.engines.nets.openvla.config import CONFIG, LLAMA_DEFAULTS, read_json
from vla_spec.engines.nets.openvla.export import Say
from vla_spec.engines.nets.openvla.layout import Shapes, llama_layer_pieces
from vla_spec.engines.nets.openvla.streaming import write_weights
from vla_spec.errors import BadModel

ARCHIVE = "pytorch_model.bin"
STEM = "spec_vla_head"
EMBEDDING = "embed_tokens.weight"
#: Rows of the drafter's cache behind the committed ones: eight levels of trees ten wide, padded.
SCRATCH = 128


def export_drafter(folder: Path, out: Path, say: Say) -> None:
    """Write spec_vla_head.safetensors and spec_vla_head.onnx into the model folder of its target.

    Args:
        folder: of the drafter.
        out: model folder of the target.
        say: told about each stage.

    Raises:
        BadModel: files are missing or corrupt, or the drafter is of another target; names keys and tensors.
    """
    files = ModelFiles.describe(out)
    config = read_json(folder / CONFIG)
    spec = drafter_spec(config, files.decoder, folder / CONFIG)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        drafter = _open(folder, Path(scratch))
        has_bias = "fc.bias" in drafter.places
        expected = drafter_shapes(spec, has_bias)
        if EMBEDDING in drafter.places:
            expected[EMBEDDING] = drafter[EMBEDDING].shape[:1] + (spec.hidden_width,)
        drafter.check(expected)
        head = WeightsFile.open(out / WEIGHTS)
        joined = Checkpoint(folder, {**drafter.places, "head.weight": head})
        pieces = {"fc.weight": [Piece("fc.weight")]}
        if has_bias:
            pieces["fc.bias"] = [Piece("fc.bias")]
        pieces |= llama_layer_pieces("layers.0.", "blocks.0", has_norm1=False)
        pieces["head.weight"] = [Piece("head.weight")]
        say(f"{out / STEM}.safetensors: copying from {folder}")
        metadata = {"spec": json.dumps(spec.to_json()), "target_sha256": files.weights_sha256}
        write_weights(out / f"{STEM}.safetensors", joined, pieces, metadata)
    model = spec_vla_head_model(spec, WeightsFile.open(out / f"{STEM}.safetensors"))
    with replacing(out / f"{STEM}.onnx") as temporary:
        temporary.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(out / f"{STEM}.onnx"))


def drafter_spec(config: Mapping[str, Any], target: DecoderSpec, where: Path) -> DecoderSpec:
    """Its layer, as a decoder of one layer over the target's rows.

    Raises:
        BadModel: not a one-layer Llama of the target's width.
    """
    values = {**LLAMA_DEFAULTS, **{k: v for k, v in config.items() if k in LLAMA_DEFAULTS}}
    rope = config.get("rope_parameters") or {}
    theta = float(rope.get("rope_theta", values["rope_theta"]))
    heads = int(values["num_attention_heads"])
    valid = {"hidden_size": target.hidden_width, "num_hidden_layers": 1, "hidden_act": "silu", "rope_scaling": None}
    wrong = [f"{key} {values[key]!r} (valid: {value!r})" for key, value in valid.items() if values[key] != value]
    if wrong:
        raise BadModel(f"{where}: not a Spec-VLA drafter for this target: {', '.join(wrong)}")
    return DecoderSpec(
        num_layers=1,
        num_heads=heads,
        num_kv_heads=int(values["num_key_value_heads"] or heads),
        head_width=int(values["head_dim"] or values["hidden_size"] // heads),
        hidden_width=target.hidden_width,
        mlp_width=int(values["intermediate_size"]),
        vocab_size=target.vocab_size,
        capacity=target.capacity,
        max_step=SCRATCH,
        norm="rms",
        norm_epsilon=float(values["rms_norm_eps"]),
        mlp="silu_gated",
        rope_theta=theta,
    )


def drafter_shapes(spec: DecoderSpec, has_bias: bool = True) -> Shapes:
    """Tensors of a drafter but for the embedding table. Layer 0 has no norm in front of its attention."""
    d, head, mlp = spec.hidden_width, spec.head_width, spec.mlp_width
    layer: Shapes = {
        "self_attn.q_proj.weight": (spec.num_heads * head, d),
        "self_attn.k_proj.weight": (spec.num_kv_heads * head, d),
        "self_attn.v_proj.weight": (spec.num_kv_heads * head, d),
        "self_attn.o_proj.weight": (d, spec.num_heads * head),
        "mlp.gate_proj.weight": (mlp, d), "mlp.up_proj.weight": (mlp, d), "mlp.down_proj.weight": (d, mlp),
        "post_attention_layernorm.weight": (d,),
    }  # fmt: skip
    shapes: Shapes = {"fc.weight": (d, 2 * d)}
    if has_bias:
        shapes["fc.bias"] = (d,)
    return shapes | {f"layers.0.{name}": shape for name, shape in layer.items()}


def _open(folder: Path, scratch: Path) -> Checkpoint:
    """The drafter's tensors; an archive of PyTorch's becomes a safetensors file first."""
    if (folder / SINGLE).is_file():
        return Checkpoint.open(folder)
    path = folder / ARCHIVE
    if not path.is_file():
        raise BadModel(f"{folder}: {SINGLE} missing, and {ARCHIVE}; valid: a folder with one of them")
    import torch
    from safetensors.torch import save_file

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        save_file({name: value.contiguous() for name, value in state.items()}, str(scratch / SINGLE))
    except Exception as error:  # whatever a corrupt archive makes of it
        raise BadModel(
            f"{path}: not an archive of tensors ({type(error).__name__}: {str(error).splitlines()[0][:160]})"
        ) from error
    return Checkpoint.open(scratch)
