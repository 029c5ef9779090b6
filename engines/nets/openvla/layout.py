"""Which tensors a checkpoint must have, and which tensors of a model folder they become.

Names on the left are Hugging Face's (the published OpenVLA layout), names on the right are those of
`docs/model-folder.md`. Linear layers are stored [out, in] on both sides, so joining query, key and value, and slicing
the head to the action tokens, are concatenations of rows.
"""

from __future__ import annotations

from typing import NamedTuple

from vla_spec.engines.nets.openvla.checkpoint import Piece
from vla_spec.engines.nets.openvla.config import OpenVLAConfig

FEATURIZERS = ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")
LLAMA = "language_model.model."
WORDS = "words.weight"

Shapes = dict[str, tuple[int, ...]]


class VisionSizes(NamedTuple):
    """What one vision transformer looks like, in timm's terms."""

    depth: int
    width: int
    num_heads: int
    mlp_width: int
    patch: int
    grid: int
    has_class_token: bool
    num_registers: int
    has_layer_scale: bool
    norm_epsilon: float
    shapes: Shapes  # of all parameters, by timm's names

    @property
    def num_patches(self) -> int:
        """Feature rows."""
        return self.grid**2

    @property
    def used_blocks(self) -> int:
        """Features are the output of the last block but one."""
        return self.depth - 1


def projector_shapes(config: OpenVLAConfig, vision_width: int) -> Shapes:
    """Two layers, or three that first widen to four times the features where these are fused."""
    d = config.hidden_width
    widths = [vision_width, 4 * vision_width, d, d] if config.is_fused else [vision_width, d, d]
    shapes: Shapes = {}
    for i in range(1, len(widths)):
        shapes[f"projector.fc{i}.weight"] = (widths[i], widths[i - 1])
        shapes[f"projector.fc{i}.bias"] = (widths[i],)
    return shapes


def llama_layer_shapes(config: OpenVLAConfig) -> Shapes:
    """One layer of the backbone, by the names inside it."""
    d, head, mlp = config.hidden_width, config.head_width, config.mlp_width
    return {
        "self_attn.q_proj.weight": (config.num_heads * head, d),
        "self_attn.k_proj.weight": (config.num_kv_heads * head, d),
        "self_attn.v_proj.weight": (config.num_kv_heads * head, d),
        "self_attn.o_proj.weight": (d, config.num_heads * head),
        "mlp.gate_proj.weight": (mlp, d), "mlp.up_proj.weight": (mlp, d), "mlp.down_proj.weight": (d, mlp),
        "input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,),
    }  # fmt: skip


def checkpoint_shapes(config: OpenVLAConfig, vision: tuple[VisionSizes, ...]) -> Shapes:
    """Every tensor of a checkpoint in the published layout."""
    shapes: Shapes = {}
    for prefix, part in zip(FEATURIZERS, vision, strict=False):
        # The layout calls timm's LayerScale.gamma scale_factor: its library renames parameters called gamma.
        shapes |= {prefix + name.replace(".gamma", ".scale_factor"): shape for name, shape in part.shapes.items()}
    shapes |= projector_shapes(config, sum(part.width for part in vision))
    shapes[f"{LLAMA}embed_tokens.weight"] = (config.text_vocab_size, config.hidden_width)
    for i in range(config.num_layers):
        shapes |= {f"{LLAMA}layers.{i}.{name}": shape for name, shape in llama_layer_shapes(config).items()}
    shapes[f"{LLAMA}norm.weight"] = (config.hidden_width,)
    shapes["language_model.lm_head.weight"] = (config.text_vocab_size, config.hidden_width)
    return shapes


def llama_layer_pieces(source: str, target: str, has_norm1: bool = True) -> dict[str, list[Piece]]:
    """Tensors of one Llama layer -> pieces that are joined row by row."""
    attention = [Piece(f"{source}self_attn.{name}_proj.weight") for name in ("q", "k", "v")]
    return {
        **({f"{target}.norm1.weight": [Piece(f"{source}input_layernorm.weight")]} if has_norm1 else {}),
        f"{target}.qkv.weight": attention,
        f"{target}.out.weight": [Piece(f"{source}self_attn.o_proj.weight")],
        f"{target}.norm2.weight": [Piece(f"{source}post_attention_layernorm.weight")],
        f"{target}.gate.weight": [Piece(f"{source}mlp.gate_proj.weight")],
        f"{target}.up.weight": [Piece(f"{source}mlp.up_proj.weight")],
        f"{target}.down.weight": [Piece(f"{source}mlp.down_proj.weight")],
    }


def vision_names(part: VisionSizes) -> list[str]:
    """Names, as timm has them, of what the features need: not the last block, the last norm or the pooling."""
    unused = ("norm.", "attn_pool.", f"blocks.{part.depth - 1}.")
    return [name for name in part.shapes if not name.startswith(unused)]


def folder_pieces(config: OpenVLAConfig, vision: tuple[VisionSizes, ...]) -> dict[str, list[Piece]]:
    """Tensors of target.safetensors -> pieces of the checkpoint, in the order in which they are written."""
    first = config.first_action_token
    actions = first, first + config.num_bins
    pieces: dict[str, list[Piece]] = {WORDS: [Piece(f"{LLAMA}embed_tokens.weight")]}
    for v, (prefix, part) in enumerate(zip(FEATURIZERS, vision, strict=False)):
        for name in vision_names(part):
            pieces[f"vision.{v}.{name}"] = [Piece(prefix + name.replace(".gamma", ".scale_factor"))]
    for name in projector_shapes(config, sum(part.width for part in vision)):
        pieces[name] = [Piece(name)]
    for i in range(config.num_layers):
        pieces |= llama_layer_pieces(f"{LLAMA}layers.{i}.", f"blocks.{i}")
    pieces["final_norm.weight"] = [Piece(f"{LLAMA}norm.weight")]
    pieces["head.weight"] = [Piece("language_model.lm_head.weight", actions)]
    pieces["token.weight"] = [Piece(f"{LLAMA}embed_tokens.weight", actions)]
    return pieces
