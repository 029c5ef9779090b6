"""What a checkpoint says about itself: config.json, preprocessor_config.json and dataset_statistics.json, checked.

The published config.json leaves out what equals the defaults of the library that wrote it, so those defaults are here:
`VISION_BACKBONES` for the two vision transformers, and the defaults of a Llama configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_spec.errors import BadModel

CONFIG, PREPROCESSOR, STATISTICS, TOKENIZER = (
    "config.json", "preprocessor_config.json", "dataset_statistics.json", "tokenizer.json"
)  # fmt: skip
DINO, SIGLIP, SIGLIP_384 = (
    "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224", "vit_so400m_patch14_siglip_384"
)  # fmt: skip
#: vision_backbone_id -> timm models and picture sizes, as the published configuration class has them.
VISION_BACKBONES: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "dinosiglip-vit-so-224px": ((DINO, SIGLIP), (224, 224)),
    "dinosiglip-vit-so-384px": ((DINO, SIGLIP_384), (384, 384)),
    "siglip-vit-so400m": ((SIGLIP,), (224,)),
    "siglip-vit-so400m-384px": ((SIGLIP_384,), (384,)),
    "dinov2-vit-l": ((DINO,), (224,)),
}
RESIZE_STRATEGIES = ("resize-naive", "resize-crop", "letterbox")
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest")
#: What a Llama text_config means where it says nothing (transformers, LlamaConfig).
LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "vocab_size": 32000,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
    "rope_scaling": None, "bos_token_id": 1,
}  # fmt: skip
#: Keys that a miniature checkpoint may set on its vision transformers; published ones have none.
VISION_OVERRIDES = ("embed_dim", "depth", "num_heads", "mlp_ratio")


@dataclass(frozen=True, slots=True)
class VisionPart:
    """One of the (at most two) vision transformers and how pictures are prepared for it.

    Attributes:
        timm_id: timm's name of the model.
        image_size: pictures are image_size x image_size.
        mean, std: [3], of the channels, which are in [0, 1].
        interpolation: of the resize.
        overrides: sizes that differ from timm's, for miniature checkpoints.
    """

    timm_id: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    overrides: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class OpenVLAConfig:
    """A checkpoint's configuration.

    Attributes:
        vision: the vision transformers, in the order in which their features are concatenated.
        is_fused: whether the projector is the one for fused features (three layers, not two).
        resize: how a picture becomes square, one of `RESIZE_STRATEGIES`.
        num_layers, num_heads, num_kv_heads, head_width, hidden_width, mlp_width: of the Llama backbone.
        norm_epsilon, rope_theta: of the same.
        text_vocab_size: rows of the embedding table, padding included.
        padded_by: rows of it that are padding; action tokens end before them.
        num_bins: bins per degree of freedom.
        bos_token: id of the first token of every prompt.
        is_v01: whether prompts are those of the first version (Vicuna's chat form).
        statistics: dataset -> ``{"q01": [A], "q99": [A], "mask": [A]}``.
        is_fine_tuned: whether the statistics came with a file of their own.
    """

    vision: tuple[VisionPart, ...]
    is_fused: bool
    resize: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    hidden_width: int
    mlp_width: int
    norm_epsilon: float
    rope_theta: float
    text_vocab_size: int
    padded_by: int
    num_bins: int
    bos_token: int
    is_v01: bool
    statistics: Mapping[str, Mapping[str, list[Any]]]
    is_fine_tuned: bool

    @property
    def first_action_token(self) -> int:
        """Text id of action token 0: the bins are the last ids of the vocabulary before its padding."""
        return self.text_vocab_size - self.padded_by - self.num_bins

    @staticmethod
    def from_folder(folder: Path) -> OpenVLAConfig:
        """Read a checkpoint folder's JSON files; no weights.

        Raises:
            BadModel: files missing, no JSON, or something that this loader does not support; says what is valid.
        """
        config = read_json(folder / CONFIG)
        where = folder / CONFIG
        if config.get("model_type") != "openvla":
            raise BadModel(f"{where}: model_type is {config.get('model_type')!r}; valid: 'openvla'")
        vision = _vision(config, read_json(folder / PREPROCESSOR), folder)
        llm = str(config.get("llm_backbone_id", "vicuna-v15-7b"))
        text = config.get("text_config")
        is_llama = llm.startswith(("llama2", "vicuna"))
        if not isinstance(text, dict) or text.get("model_type", "llama") != "llama" or not is_llama:
            raise BadModel(
                f"{where}: llm_backbone_id {llm!r}; valid: llama2-* or vicuna-*, with a text_config of a Llama"
            )
        values = {**LLAMA_DEFAULTS, **{k: v for k, v in text.items() if k in LLAMA_DEFAULTS}}
        rope = text.get("rope_parameters") or {}
        theta = rope.get("rope_theta", values["rope_theta"])
        refused = [
            f"{key} {values[key]!r}"
            for key, valid in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False),
                               ("tie_word_embeddings", False), ("rope_scaling", None))
            if values[key] != valid
        ]  # fmt: skip
        if refused or rope.get("rope_type", "default") != "default":
            raise BadModel(f"{where}: text_config has {refused or rope}; valid: a plain Llama")
        statistics, is_fine_tuned = _statistics(config, folder)
        heads = int(values["num_attention_heads"])
        found = OpenVLAConfig(
            vision=vision,
            is_fused=bool(config.get("use_fused_vision_backbone", len(vision) == 2)),
            resize=str(config.get("image_resize_strategy", "letterbox")),
            num_layers=int(values["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(values["num_key_value_heads"] or heads),
            head_width=int(values["head_dim"] or values["hidden_size"] // heads),
            hidden_width=int(values["hidden_size"]),
            mlp_width=int(values["intermediate_size"]),
            norm_epsilon=float(values["rms_norm_eps"]),
            rope_theta=float(theta),
            text_vocab_size=int(values["vocab_size"]),
            padded_by=int(config.get("pad_to_multiple_of", 64)),
            num_bins=int(config.get("n_action_bins", 256)),
            bos_token=int(values["bos_token_id"]),
            is_v01="vicuna" in llm,
            statistics=statistics,
            is_fine_tuned=is_fine_tuned,
        )
        fault = found._fault()
        if fault:
            raise BadModel(f"{where}: {fault}")
        return found

    def _fault(self) -> str:
        if self.resize not in RESIZE_STRATEGIES:
            return f"image_resize_strategy {self.resize!r}; valid: {', '.join(RESIZE_STRATEGIES)}"
        if self.is_fused != (len(self.vision) == 2):
            return (
                f"use_fused_vision_backbone {self.is_fused} with {len(self.vision)} vision backbones; valid: 2 if fused"
            )
        if len({part.image_size for part in self.vision}) != 1:
            return f"image_sizes {[part.image_size for part in self.vision]}; valid: one size for all"
        if self.num_bins < 2 or self.first_action_token < 1:
            return (
                f"n_action_bins {self.num_bins} do not fit into a vocabulary of {self.text_vocab_size} padded by "
                f"{self.padded_by}"
            )
        if self.num_heads % self.num_kv_heads or self.head_width % 2:
            return f"{self.num_heads} heads, {self.num_kv_heads} key-value heads of width {self.head_width}"
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadModel: missing, or not one.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadModel(f"{path}: missing; an OpenVLA checkpoint folder has it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadModel(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise BadModel(f"{path}: a {type(values).__name__}; valid: an object")
    return values


def _vision(config: dict[str, Any], preprocessor: dict[str, Any], folder: Path) -> tuple[VisionPart, ...]:
    """config.json says which transformers, preprocessor_config.json how their pictures are prepared."""
    where = folder / CONFIG
    default = VISION_BACKBONES.get(str(config.get("vision_backbone_id", "siglip-vit-so400m")), ((), ()))
    ids = tuple(config.get("timm_model_ids", default[0]))
    sizes = tuple(config.get("image_sizes", default[1]))
    known = {name for names, _ in VISION_BACKBONES.values() for name in names}
    if not ids or not set(ids) <= known or len(ids) > 2 or len(sizes) != len(ids):
        raise BadModel(
            f"{where}: timm_model_ids {list(ids)} with image_sizes {list(sizes)}; valid: one or two of "
            f"{', '.join(sorted(known))}, a size each"
        )
    if any(config.get("timm_override_act_layers") or ()):
        raise BadModel(f"{where}: timm_override_act_layers {config['timm_override_act_layers']}; valid: null for each")
    overrides = config.get("timm_overrides") or [{}] * len(ids)
    if len(overrides) != len(ids) or any(set(o) - set(VISION_OVERRIDES) for o in overrides):
        raise BadModel(f"{where}: timm_overrides {overrides}; valid: {', '.join(VISION_OVERRIDES)} for each model")
    parts = []
    where = folder / PREPROCESSOR
    strategy = config.get("image_resize_strategy", "letterbox")
    if preprocessor.get("image_resize_strategy", strategy) != strategy:
        raise BadModel(
            f"{where}: image_resize_strategy {preprocessor['image_resize_strategy']!r}, {CONFIG} says {strategy!r}"
        )
    for i, (name, size) in enumerate(zip(ids, sizes, strict=True)):
        try:
            mean, std = tuple(map(float, preprocessor["means"][i])), tuple(map(float, preprocessor["stds"][i]))
            interpolation = str(preprocessor["interpolations"][i])
            shape = list(preprocessor["input_sizes"][i])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise BadModel(
                f"{where}: means, stds, interpolations or input_sizes lack picture {i} ({error!r})"
            ) from error
        if shape != [3, size, size]:
            raise BadModel(f"{where}: input_sizes[{i}] is {shape}; valid: {[3, size, size]}, as {CONFIG} says")
        if interpolation not in INTERPOLATIONS or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise BadModel(
                f"{where}: picture {i} has interpolation {interpolation!r}, mean {mean}, std {std}; valid: one of "
                f"{', '.join(INTERPOLATIONS)} and three numbers each"
            )
        parts.append(VisionPart(name, int(size), mean, std, interpolation, tuple(sorted(overrides[i].items()))))
    return tuple(parts)


def _statistics(config: dict[str, Any], folder: Path) -> tuple[dict[str, dict[str, list[Any]]], bool]:
    """A fine-tuned checkpoint's dataset_statistics.json takes the place of config.json's norm_stats."""
    has_file = (folder / STATISTICS).is_file()
    where = folder / (STATISTICS if has_file else CONFIG)
    raw = read_json(where) if has_file else config.get("norm_stats")
    if not isinstance(raw, dict) or not raw:
        raise BadModel(f"{where}: no statistics of actions; valid: norm_stats, or a {STATISTICS} beside it")
    found: dict[str, dict[str, list[Any]]] = {}
    for key, value in raw.items():
        try:
            action = value["action"]
            low, high = [float(v) for v in action["q01"]], [float(v) for v in action["q99"]]
            mask = [bool(v) for v in action.get("mask", [True] * len(low))]
        except (KeyError, TypeError, ValueError) as error:
            raise BadModel(f"{where}: {key!r} has no action q01 and q99 ({error!r})") from error
        if not low or not len(low) == len(high) == len(mask) or any(a > b for a, b in zip(low, high, strict=True)):
            raise BadModel(f"{where}: {key!r} has q01 {low}, q99 {high}, mask {mask}; valid: one each, q01 <= q99")
        found[key] = {"q01": low, "q99": high, "mask": mask}
    return found, has_file
