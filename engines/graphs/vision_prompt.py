"""The prompt graph of an OpenVLA model: pictures and token ids in, the decoder's input rows out.

Written node by node like the decoder, for the same reasons: every weight is a reference into the safetensors file, the
attention is one node, and a model of any size is exported without being loaded.

Vision transformers are timm's (Oquab et al. 2023, arXiv:2304.07193, with the registers of Darcet et al. 2023,
arXiv:2309.16588; Zhai et al. 2023, arXiv:2303.15343); the features are the output of the last block but one, without
the final norm (Karamcheti et al. 2024, arXiv:2402.07865).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnx
from onnx import TensorProto

from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines.graphs.decoder import GraphWriter, Precision


class VisionShape(Protocol):
    """What the graph has to know about one vision transformer."""

    @property
    def width(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def mlp_width(self) -> int: ...
    @property
    def patch(self) -> int: ...
    @property
    def grid(self) -> int: ...
    @property
    def used_blocks(self) -> int: ...
    @property
    def has_class_token(self) -> bool: ...
    @property
    def num_registers(self) -> int: ...
    @property
    def has_layer_scale(self) -> bool: ...
    @property
    def norm_epsilon(self) -> float: ...


class Picture(Protocol):
    """How the pictures of one vision transformer are prepared."""

    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...


def prompt_model(
    vision: Sequence[tuple[VisionShape, Picture, int]], projector: Sequence[int], text_vocab_size: int,
    weights: WeightsFile, precision: Precision = "fp32",
) -> onnx.ModelProto:  # fmt: skip
    """The prompt graph.

    Inputs: images uint8 [n, s, s, 3], squared already; words int64 [1, w], the begin-of-sequence token first.
    Output: embeds fp32 [w + patches, D], the picture's rows after the first word.

    Args:
        vision: transformer, preparation, and which of the n pictures it gets.
        projector: widths of its layers, from the features' to D.
        text_vocab_size: rows of the table that words are looked up in.
        weights: target.safetensors.
        precision: of everything between inputs and output.

    Raises:
        BadModel: a weight is missing or of another shape.
    """
    writer = GraphWriter(weights, precision)
    size = vision[0][0].patch * vision[0][0].grid
    num_pictures = 1 + max(number for *_, number in vision)
    writer.add_input("images", TensorProto.UINT8, [num_pictures, size, size, 3])
    writer.add_input("words", TensorProto.INT64, [1, "w"])
    scaled = _scaled_pictures(writer, num_pictures)
    features = [
        _transformer(writer, f"vision.{v}", shape, picture, scaled[number])
        for v, (shape, picture, number) in enumerate(vision)
    ]
    x = writer.node("Concat", features, "vision.fused", axis=-1) if len(features) > 1 else features[0]
    for i in range(1, len(projector)):
        name = f"projector.fc{i}"
        x = _linear(writer, name, x, projector[i - 1], projector[i])
        if i + 1 < len(projector):
            x = writer.node("Gelu", [x], f"{name}.gelu")
    rows = _words(writer, text_vocab_size, projector[-1])
    writer.node("Concat", [rows[0], x, rows[1]], "embeds.rows", axis=0)
    writer.node("Cast", ["embeds.rows"], "embeds", to=TensorProto.FLOAT)
    writer.add_output("embeds", TensorProto.FLOAT, ["p", projector[-1]])
    return writer.model("prompt")


def _scaled_pictures(writer: GraphWriter, count: int) -> list[str]:
    """Pictures [1, 3, s, s] in [0, 1]."""
    x = writer.node("Cast", ["images"], "images.float", to=writer.type)
    x = writer.node("Transpose", [x], "images.channels", perm=[0, 3, 1, 2])
    x = writer.node("Div", [x, writer.float_constant("images.range", 255.0)], "images.scaled")
    if count == 1:
        return [x]
    names = [f"images.{i}" for i in range(count)]
    writer.split(x, names, [1] * count, axis=0)
    return names


def _words(writer: GraphWriter, vocab_size: int, width: int) -> tuple[str, str]:
    """Embeddings of the first word and of the others; looked up as they are stored, so the table is never cast."""
    table = writer.stored_weight("words.weight", (vocab_size, width))
    x = writer.node("Gather", [table, "words"], "words.stored", axis=0)
    x = writer.node("Cast", [x], "words.embedded", to=writer.type)
    x = writer.node("Reshape", [x, writer.constant("words.shape", np.array([-1, width], np.int64))], "words.rows")
    first, last, axis = (
        writer.constant(f"words.{name}", np.array([value], np.int64))
        for name, value in (("one", 1), ("end", np.iinfo(np.int64).max), ("axis", 0))
    )
    zero = writer.constant("words.zero", np.array([0], np.int64))
    return (
        writer.node("Slice", [x, zero, first, axis], "words.first"),
        writer.node("Slice", [x, first, last, axis], "words.rest"),
    )


def _transformer(writer: GraphWriter, name: str, shape: VisionShape, picture: Picture, pixels: str) -> str:
    """Patch features [grid * grid, width]."""
    width, patches = shape.width, shape.grid**2
    channels = (3, 1, 1)
    mean = writer.float_constant(f"{name}.mean", np.reshape(picture.mean, channels))
    std = writer.float_constant(f"{name}.std", np.reshape(picture.std, channels))
    x = writer.node("Sub", [pixels, mean], f"{name}.centred")
    x = writer.node("Div", [x, std], f"{name}.normalised")
    kernel = writer.weight(f"{name}.patch_embed.proj.weight", (width, 3, shape.patch, shape.patch))
    bias = writer.weight(f"{name}.patch_embed.proj.bias", (width,))
    x = writer.node("Conv", [x, kernel, bias], f"{name}.patches", strides=[shape.patch] * 2)
    flat = writer.constant(f"{name}.patches.shape", np.array([width, patches], np.int64))
    x = writer.node("Reshape", [x, flat], f"{name}.patches.flat")
    x = writer.node("Transpose", [x], f"{name}.patches.rows", perm=[1, 0])
    x = writer.node("Add", [x, _rows(writer, f"{name}.pos_embed", patches, width)], f"{name}.placed")
    extra = [("cls_token", 1)] * shape.has_class_token + [("reg_token", shape.num_registers)] * bool(
        shape.num_registers
    )
    num_extra = sum(count for _, count in extra)
    if extra:
        rows = [_rows(writer, f"{name}.{token}", count, width) for token, count in extra]
        x = writer.node("Concat", [*rows, x], f"{name}.rows", axis=0)
    for i in range(shape.used_blocks):
        x = _block(writer, f"{name}.blocks.{i}", shape, x)
    if num_extra:
        writer.split(x, [f"{name}.extra", f"{name}.features"], [num_extra, patches], axis=0)
        x = f"{name}.features"
    return x


def _block(writer: GraphWriter, name: str, shape: VisionShape, x: str) -> str:
    """One pre-norm layer over rows [n, width]."""
    width, heads = shape.width, shape.num_heads
    y = _linear(writer, f"{name}.attn.qkv", _norm(writer, f"{name}.norm1", x, shape), width, 3 * width)
    parts = [f"{name}.{kind}" for kind in ("query", "key", "value")]
    writer.split(y, parts, [width] * 3, axis=1)
    split = writer.constant(f"vision.heads_{heads}_{width}", np.array([1, -1, heads, width // heads], np.int64))
    turned = [
        writer.node("Transpose", [writer.node("Reshape", [part, split], f"{part}.split")], f"{part}.heads",
                    perm=[0, 2, 1, 3])
        for part in parts
    ]  # fmt: skip
    y = writer.node("Attention", turned, f"{name}.attention", scale=(width // heads) ** -0.5)
    y = writer.node("Transpose", [y], f"{name}.mixed", perm=[0, 2, 1, 3])
    y = writer.node(
        "Reshape", [y, writer.constant(f"vision.flat_{width}", np.array([-1, width], np.int64))], f"{name}.mixed.flat"
    )
    y = _linear(writer, f"{name}.attn.proj", y, width, width)
    x = writer.node("Add", [x, _scale(writer, f"{name}.ls1", y, shape)], f"{name}.attended")
    y = _linear(writer, f"{name}.mlp.fc1", _norm(writer, f"{name}.norm2", x, shape), width, shape.mlp_width)
    y = writer.node("Gelu", [y], f"{name}.gelu")
    y = _linear(writer, f"{name}.mlp.fc2", y, shape.mlp_width, width)
    return writer.node("Add", [x, _scale(writer, f"{name}.ls2", y, shape)], f"{name}.x")


def _scale(writer: GraphWriter, name: str, x: str, shape: VisionShape) -> str:
    if not shape.has_layer_scale:
        return x
    return writer.node("Mul", [x, writer.weight(f"{name}.gamma", (shape.width,))], f"{name}.out")


def _norm(writer: GraphWriter, name: str, x: str, shape: VisionShape) -> str:
    inputs = [x, *(writer.weight(f"{name}.{kind}", (shape.width,)) for kind in ("weight", "bias"))]
    return writer.node("LayerNormalization", inputs, f"{name}.out", axis=-1, epsilon=shape.norm_epsilon)


def _linear(writer: GraphWriter, name: str, x: str, width_in: int, width_out: int) -> str:
    inputs = [x, writer.weight(f"{name}.weight", (width_out, width_in)), writer.weight(f"{name}.bias", (width_out,))]
    return writer.node("Gemm", inputs, f"{name}.out", transB=1)


def _rows(writer: GraphWriter, name: str, rows: int, width: int) -> str:
    """A stored [1, rows, width] as [rows, width]."""
    shape = writer.constant(f"rows_{rows}_{width}", np.array([rows, width], np.int64))
    return writer.node("Reshape", [writer.weight(name, (1, rows, width)), shape], f"{name}.rows")
