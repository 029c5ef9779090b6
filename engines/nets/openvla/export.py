"""From a published checkpoint folder to a model folder: weights copied in blocks, graphs written node by node.

The checkpoint's tensors are never in memory together; the golden logits are computed by the reference one layer at a
time. So memory is that of the largest layer in single precision, whatever the number of layers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from vla_spec.adapters.openvla import choose_statistics, load, read_words
from vla_spec.atomic import replacing
from vla_spec.engines._decoder_spec import DecoderSpec
from vla_spec.engines._model_files import GOLDEN, PROMPT_GRAPH, WEIGHTS, ModelFiles
from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines.graphs.vision_prompt import prompt_model
from vla_spec.engines.nets.openvla.checkpoint import Checkpoint
from vla_spec.engines.nets.openvla.config import CONFIG, TOKENIZER, OpenVLAConfig
from vla_spec.engines.nets.openvla.layout import (
    VisionSizes,
    checkpoint_shapes,
    folder_pieces,
    projector_shapes,
)
from vla_spec.engines.nets.openvla.streaming import write_weights
from vla_spec.engines.nets.openvla.timm_models import sizes
from vla_spec.errors import BadConfig, BadModel
from vla_spec.types import Observation

PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
#: openvla-v01-7b, which was built on a chat model.
PROMPT_V01 = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What action should the robot take to {instruction}? ASSISTANT:"
)
#: Text of the token that training put before every action, and its id in the published vocabulary.
EMPTY_WORD, LLAMA_VOCABULARY, LLAMA_EMPTY_TOKEN = "\u2581", 32000, 29871
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What a checkpoint doesn't say.

    Attributes:
        unnorm_key: data set whose statistics un-normalise actions; empty = the only one, or chosen when it is run.
        center_crop: whether pictures are cut to their middle; for checkpoints tuned with augmented pictures.
        max_words: most tokens of a prompt; the cache is that much larger.
        max_step: most tokens of one step; 64 holds the 50-node trees of Spec-VLA.
    """

    unnorm_key: str = ""
    center_crop: bool = False
    max_words: int = 64
    max_step: int = 64

    def __post_init__(self) -> None:
        for name, value, low in (("max_words", self.max_words, 24), ("max_step", self.max_step, 8)):
            if not low <= value <= 2048:
                raise BadConfig(f"{name} is {value}; valid: {low}..2048")


def export_checkpoint(checkpoint: Path, out: Path, options: ExportOptions, say: Say) -> None:
    """Write a model folder; files in it are replaced.

    Args:
        checkpoint: folder in the published Hugging Face layout.
        out: the model folder.
        options: see `ExportOptions`.
        say: told about each stage.

    Raises:
        BadModel: the checkpoint is incomplete, truncated or of another architecture; names files and tensors.
        UnknownOption: it has no statistics under ``unnorm_key``.
        MissingDependency: a library of the extra ``[openvla]`` is not installed.
    """
    config = OpenVLAConfig.from_folder(checkpoint)
    if options.unnorm_key:
        choose_statistics(dict(config.statistics), options.unnorm_key, str(checkpoint))
    empty_token = _check_words(checkpoint, config)
    vision = tuple(sizes(part) for part in config.vision)
    shards = Checkpoint.open(checkpoint)
    shards.check(checkpoint_shapes(config, vision))
    out.mkdir(parents=True, exist_ok=True)
    say(f"{out / WEIGHTS}: copying from {checkpoint}")
    pieces = folder_pieces(config, vision)
    sha = write_weights(out / WEIGHTS, shards, pieces, {"family": "openvla", "source": CONFIG})
    with replacing(out / TOKENIZER) as temporary:
        shutil.copyfile(checkpoint / TOKENIZER, temporary)
    _write_policy(out, config, options, empty_token)
    spec = decoder_spec(config, vision, options)
    _write_graphs(out, config, vision, spec)
    base = sum(v.num_patches for v in vision[:1])
    ModelFiles(out, sha, spec, base, "words", "token.weight", None).write()
    say(f"{out / GOLDEN}: running the reference")
    write_golden(out)


def decoder_spec(config: OpenVLAConfig, vision: tuple[VisionSizes, ...], options: ExportOptions) -> DecoderSpec:
    """The Llama backbone as a decoder; its head gives scores of the action tokens only."""
    num_dofs = max(len(s["q01"]) for s in config.statistics.values())
    return DecoderSpec(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_width=config.head_width,
        hidden_width=config.hidden_width,
        mlp_width=config.mlp_width,
        vocab_size=config.num_bins,
        capacity=vision[0].num_patches + options.max_words + num_dofs,
        max_step=options.max_step,
        norm="rms",
        norm_epsilon=config.norm_epsilon,
        mlp="silu_gated",
        rope_theta=config.rope_theta,
    )


def _check_words(checkpoint: Path, config: OpenVLAConfig) -> int:
    """Id of the empty word; the tokenizer must put the begin-of-sequence token first, as the network was trained."""
    path = checkpoint / TOKENIZER
    words = read_words(path)
    empty = words.token_to_id(EMPTY_WORD)
    first = words.encode("In").ids[:1]
    size = config.text_vocab_size - config.padded_by
    if size == LLAMA_VOCABULARY and empty != LLAMA_EMPTY_TOKEN:
        raise BadModel(
            f"{path}: the empty word is token {empty}; valid: {LLAMA_EMPTY_TOKEN}, as in Llama 2's vocabulary"
        )
    if empty is None or first != [config.bos_token] or words.get_vocab_size(with_added_tokens=False) > size:
        raise BadModel(
            f"{path}: {words.get_vocab_size(with_added_tokens=False)} words, empty word {empty}, prompts start with "
            f"{first}; valid: at most {size} words, an empty word, and [{config.bos_token}] first"
        )
    return int(empty)


def _write_policy(out: Path, config: OpenVLAConfig, options: ExportOptions, empty_token: int) -> None:
    policy: dict[str, Any] = {
        "adapter": "openvla",
        "vision": [asdict(part) for part in config.vision],
        "resize": config.resize,
        "prompt": PROMPT_V01 if config.is_v01 else PROMPT,
        "max_words": options.max_words,
        "bos_token": config.bos_token,
        "empty_token": empty_token,
        "num_bins": config.num_bins,
        "first_token": config.first_action_token,
        "statistics": dict(config.statistics),
        "unnorm_key": options.unnorm_key or None,
        "center_crop": options.center_crop,
    }
    with replacing(out / "policy.json") as temporary:
        temporary.write_text(json.dumps(policy, indent=1) + "\n", encoding="utf-8")


def _write_graphs(out: Path, config: OpenVLAConfig, vision: tuple[VisionSizes, ...], spec: DecoderSpec) -> None:
    from vla_spec.engines.export import write_decoder

    kinds = list(dict.fromkeys(part.interpolation for part in config.vision))
    parts = [(v, part, kinds.index(part.interpolation)) for v, part in zip(vision, config.vision, strict=True)]
    layers = projector_shapes(config, sum(v.width for v in vision))
    widths = [sum(v.width for v in vision)] + [shape[0] for name, shape in layers.items() if name.endswith("bias")]
    model = prompt_model(parts, widths, config.text_vocab_size, WeightsFile.open(out / WEIGHTS))
    with replacing(out / PROMPT_GRAPH) as temporary:
        temporary.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(out / PROMPT_GRAPH))
    write_decoder(out, spec)


def write_golden(out: Path) -> None:
    """Keep what the reference says about a random picture, a sentence, a chain and a tree of random tokens."""
    from vla_spec.adapters.openvla import Options
    from vla_spec.engines.nets.openvla.reference import golden

    values = json.loads((out / "policy.json").read_text(encoding="utf-8"))
    key = values["unnorm_key"] or next(iter(values["statistics"]))
    adapter = load(out, Options(unnorm_key=key))
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (1, 64, 80, 3)).astype(np.uint8)
    inputs = adapter.encode(Observation(picture, np.zeros(0, np.float32), "go", 0, 0))
    num_bins = adapter.domain.vocab_size
    chain = rng.integers(0, num_bins, 6).astype(np.int32), np.arange(-1, 5, dtype=np.int32)
    tree = rng.integers(0, num_bins, 7).astype(np.int32), np.array([-1, 0, 0, 1, 2, 2, 4], np.int32)
    parents = np.concatenate((chain[1], np.where(tree[1] < 0, -1, tree[1] + len(chain[0]))))
    found = golden(out, inputs, np.concatenate((chain[0], tree[0])), parents)
    values = {
        **inputs, "prefill_logits": found["prefill"],
        "chain_tokens": chain[0], "chain_parents": chain[1], "chain_logits": found["tree"][: len(chain[0])],
        "tree_tokens": tree[0], "tree_parents": tree[1], "tree_logits": found["tree"][len(chain[0]) :],
    }  # fmt: skip
    with replacing(out / GOLDEN) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **values)
