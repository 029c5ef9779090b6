"""Checkpoints with random weights in the published layout, of any size, for tests and for measuring export.

Tensors are drawn and written one at a time, in blocks, so even the full size takes little memory.
"""

from __future__ import annotations

import importlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_spec.atomic import replacing
from vla_spec.engines.nets.openvla.checkpoint import INDEX
from vla_spec.engines.nets.openvla.config import (
    CONFIG,
    DINO,
    PREPROCESSOR,
    SIGLIP,
    STATISTICS,
    TOKENIZER,
    OpenVLAConfig,
)
from vla_spec.engines.nets.openvla.layout import Shapes, checkpoint_shapes
from vla_spec.engines.nets.openvla.timm_models import sizes

#: Numbers drawn for a tensor at most.
BLOCK = 1 << 20
#: Statistics of two data sets: an arm's seven numbers, the gripper not normalised.
ARM_STATISTICS: dict[str, Any] = {
    name: {
        "action": {
            "q01": [-0.5 * scale, -0.4, -0.3, -0.1, -0.2, -0.3, 0.0],
            "q99": [0.6 * scale, 0.5, 0.4, 0.2, 0.1, 0.3, 1.0],
            "mask": [True] * 6 + [False],
        },
        "num_transitions": 10,
    }
    for name, scale in (("bridge_orig", 0.05), ("fractal20220817_data", 1.0))
}


@dataclass(frozen=True, slots=True)
class MiniatureOptions:
    """Sizes; the default is a network of 0.3 million parameters with the published one's structure.

    Attributes:
        layers, heads, kv_heads, width, mlp_width: of the Llama backbone.
        vocab_size: words of the tokenizer, without padding.
        padded_by: padding of the embedding table.
        image_size: 14 pixels to a patch.
        vision: sizes of the two transformers in timm's terms; None = timm's own (full size).
        is_fine_tuned: statistics of one data set in a file of their own.
        num_shards: files that the tensors are spread over.
        sharpness: scale of the head's weights; larger = scores further apart.
    """

    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    width: int = 64
    mlp_width: int = 128
    vocab_size: int = 512
    padded_by: int = 64
    image_size: int = 56
    vision: tuple[dict[str, Any], dict[str, Any]] | None = (
        {"embed_dim": 24, "depth": 3, "num_heads": 2}, {"embed_dim": 36, "depth": 3, "num_heads": 3}
    )  # fmt: skip
    is_fine_tuned: bool = False
    num_shards: int = 3
    sharpness: float = 4.0


FULL_SIZE = MiniatureOptions(
    layers=32, heads=32, kv_heads=32, width=4096, mlp_width=11008, vocab_size=32000, image_size=224, vision=None,
    sharpness=1.0,
)  # fmt: skip


def write_checkpoint(folder: Path, options: MiniatureOptions | None = None, seed: int = 0) -> OpenVLAConfig:
    """Write a checkpoint folder; returns its configuration as the loader reads it."""
    options = options or MiniatureOptions()
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / CONFIG, config_json(options))
    _write_json(folder / PREPROCESSOR, preprocessor_json(options))
    if options.is_fine_tuned:
        first = next(iter(ARM_STATISTICS.values()))
        _write_json(folder / STATISTICS, {"libero_goal_no_noops": first})
    write_tokenizer(folder / TOKENIZER, options.vocab_size)
    config = OpenVLAConfig.from_folder(folder)
    shapes = checkpoint_shapes(config, tuple(sizes(part) for part in config.vision))
    write_shards(folder, shapes, options, seed)
    return config


def config_json(options: MiniatureOptions) -> dict[str, Any]:
    """config.json as the published conversion writes it; a Llama's defaults are left out there, too."""
    text = {
        "model_type": "llama", "pad_token_id": options.vocab_size, "torch_dtype": "bfloat16",
        "vocab_size": options.vocab_size + options.padded_by,
    }  # fmt: skip
    if options.width != 4096:
        text |= {
            "hidden_size": options.width, "intermediate_size": options.mlp_width,
            "num_attention_heads": options.heads, "num_key_value_heads": options.kv_heads,
        }  # fmt: skip
    if options.layers != 32:
        text["num_hidden_layers"] = options.layers
    config = {
        "architectures": ["OpenVLAForActionPrediction"], "arch_specifier": "no-align+fused-gelu-mlp",
        "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig",
                     "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction"},
        "hf_llm_id": "meta-llama/Llama-2-7b-hf", "image_resize_strategy": "resize-naive",
        "image_sizes": [options.image_size] * 2, "llm_backbone_id": "llama2-7b-pure", "llm_max_length": 2048,
        "model_type": "openvla", "n_action_bins": 256, "norm_stats": ARM_STATISTICS,
        "output_projector_states": False, "pad_to_multiple_of": options.padded_by,
        "pad_token_id": options.vocab_size, "text_config": text, "timm_model_ids": [DINO, SIGLIP],
        "timm_override_act_layers": [None, None], "torch_dtype": "bfloat16", "use_fused_vision_backbone": True,
        "vision_backbone_id": "dinosiglip-vit-so-224px",
    }  # fmt: skip
    if options.vision is not None:
        config["timm_overrides"] = list(options.vision)
    return config


def preprocessor_json(options: MiniatureOptions) -> dict[str, Any]:
    """preprocessor_config.json as the published processor writes it."""
    size = options.image_size
    means, stds = [[0.485, 0.456, 0.406], [0.5] * 3], [[0.229, 0.224, 0.225], [0.5] * 3]
    return {
        "auto_map": {"AutoImageProcessor": "processing_prismatic.PrismaticImageProcessor"},
        "image_processor_type": "PrismaticImageProcessor", "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, size, size]] * 2, "interpolations": ["bicubic"] * 2, "means": means, "stds": stds,
        "tvf_crop_params": [{"output_size": [size, size]}] * 2, "tvf_do_letterbox": False, "tvf_letterbox_fill": None,
        "tvf_normalize_params": [{"inplace": False, "mean": m, "std": s} for m, s in zip(means, stds, strict=True)],
        "tvf_resize_params": [{"antialias": True, "interpolation": 3, "max_size": None, "size": [size, size]}] * 2,
        "use_fused_vision_backbone": True,
    }  # fmt: skip


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A tokenizer of Llama 2's kind (byte-fallback BPE, spaces as U+2581) over single characters.

    The full vocabulary has its empty word where the published one has it.
    """
    tk = importlib.import_module("tokenizers")
    decoders, normalizers, processors = (
        importlib.import_module(f"tokenizers.{name}") for name in ("decoders", "normalizers", "processors")
    )
    token, models = tk.AddedToken, importlib.import_module("tokenizers.models")

    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    letters = [chr(i) for i in range(33, 127)]
    filler = vocab_size - len(words) - len(letters) - 1
    at = 29871 - len(words) if vocab_size == 32000 else filler
    words += [f"filler{i}" for i in range(at)] + ["\u2581", *letters] + [f"filler{i}" for i in range(at, filler)]
    assert len(words) == vocab_size, f"{len(words)=} {vocab_size=}"
    tokenizer = tk.Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([token(word, normalized=False) for word in ("<unk>", "<s>", "</s>")])
    tokenizer.add_special_tokens([token("<PAD>", normalized=False)])
    with replacing(path) as temporary:
        tokenizer.save(str(temporary))


def write_shards(folder: Path, shapes: Shapes, options: MiniatureOptions, seed: int) -> None:
    """Random bfloat16 tensors in files of about equal size, and their index."""
    total = 2 * sum(math.prod(shape) for shape in shapes.values())
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size >= total / options.num_shards and len(files) < options.num_shards:
            files.append([])
            size = 0
        files[-1].append(name)
        size += 2 * math.prod(shape)
    rng = np.random.default_rng(seed)
    places: dict[str, str] = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        places |= dict.fromkeys(names, file)
        write_random(folder / file, {name: shapes[name] for name in names}, rng, options.sharpness)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def write_random(path: Path, shapes: Shapes, rng: np.random.Generator, sharpness: float = 1.0) -> None:
    """One safetensors file of random bfloat16 tensors, scaled so that activations stay near 1."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            middle, spread = _law(name, shape, sharpness)
            left = math.prod(shape)
            drawn = rng.standard_normal(min(left, BLOCK), np.float32) * np.float32(spread) + np.float32(middle)
            half = (drawn.view(np.uint32) >> 16).astype(np.uint16)
            while left:  # larger tensors repeat what was drawn, each time from another place on
                count = min(left, len(half))
                start = int(rng.integers(len(half))) if count == BLOCK else 0
                file.write(np.roll(half, start)[:count].tobytes())
                left -= count


def _law(name: str, shape: tuple[int, ...], sharpness: float) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's numbers."""
    if len(shape) == 1:
        is_scale = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight", "scale_factor"))
        return (1.0, 0.1) if is_scale else (0.0, 0.1)
    if "embed" in name or "token" in name or name.endswith("latent"):
        return 0.0, 0.5
    gain = sharpness if "lm_head" in name else 1.0
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
