"""The network in PyTorch, from the tensors of a model folder: what the graphs are checked against.

Vision transformers are timm's own modules; the decoder is written out, so that its layers can be loaded, used and
dropped one at a time: a model of any size computes its golden logits in the memory of one layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_spec.engines._decoder_spec import DecoderSpec
from vla_spec.engines._model_files import WEIGHTS, ModelFiles
from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines.nets.openvla.config import VisionPart
from vla_spec.engines.nets.openvla.timm_models import create

LAYER_WEIGHTS = ("norm1", "qkv", "out", "norm2", "gate", "up", "down")


class Layer(NamedTuple):
    """Weights of one layer, fp32."""

    norm1: Tensor | None  # None: the layer gets its rows as they are
    qkv: Tensor
    out: Tensor
    norm2: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def read(weights: WeightsFile, name: str) -> Tensor:
    """A tensor in single precision."""
    return torch.from_numpy(weights.read(name))


def read_layer(weights: WeightsFile, prefix: str) -> Layer:
    """Layer ``prefix``; its first norm may be missing."""
    names = {kind: f"{prefix}.{kind}.weight" for kind in LAYER_WEIGHTS}
    return Layer(**{k: read(weights, n) if n in weights.tensors else None for k, n in names.items()})  # type: ignore[arg-type]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Zhang and Sennrich 2019, arXiv:1910.07467."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def rotated(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotary positions (arXiv:2104.09864) of x [heads, n, width]; halves are turned against each other."""
    half = x.shape[-1] // 2
    angle = position[:, None].double() * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cosine, sine = angle.cos().float(), angle.sin().float()
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


Keep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def run_layer(spec: DecoderSpec, layer: Layer, x: Tensor, position: Tensor, mask: Tensor, keep: Keep) -> Tensor:
    """One Llama layer (Touvron et al. 2023, arXiv:2307.09288) over rows x [n, D].

    Args:
        spec: sizes.
        layer: weights.
        x: residual stream.
        position: int64 [n].
        mask: bool [n, all], True = may look.
        keep: new keys and values [kv heads, n, width] -> all that the mask speaks about.
    """
    assert spec.rope_theta is not None
    n, heads, groups, width = len(x), spec.num_heads, spec.num_kv_heads, spec.head_width
    y = x if layer.norm1 is None else rms_norm(x, layer.norm1, spec.norm_epsilon)
    joined = functional.linear(y, layer.qkv)
    query, key, value = (
        part.view(n, -1, width).transpose(0, 1)
        for part in joined.split([heads * width, groups * width, groups * width], -1)
    )
    query, key = rotated(query, position, spec.rope_theta), rotated(key, position, spec.rope_theta)
    keys, values = (t.repeat_interleave(heads // groups, 0) for t in keep(key, value))
    scores = query @ keys.transpose(1, 2) * width**-0.5
    mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values
    x = x + functional.linear(mixed.transpose(0, 1).reshape(n, -1), layer.out)
    y = rms_norm(x, layer.norm2, spec.norm_epsilon)
    return x + functional.linear(functional.silu(functional.linear(y, layer.gate)) * functional.linear(y, layer.up),
                                 layer.down)  # fmt: skip


class Prompt(nn.Module):
    """images uint8 [n, s, s, 3], words int64 [1, w] -> embeds [w + patches, D].

    Args:
        folder: a model folder.
        is_kept: keep the vision transformers in memory from one call to the next.
    """

    def __init__(self, folder: Path, is_kept: bool) -> None:
        super().__init__()
        self._kept: dict[int, Any] | None = {} if is_kept else None
        self.weights = WeightsFile.open(folder / WEIGHTS)
        values = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
        self.parts = [VisionPart(**{**p, "overrides": tuple(map(tuple, p["overrides"]))}) for p in values["vision"]]
        kinds = list(dict.fromkeys(part.interpolation for part in self.parts))
        self.numbers = [kinds.index(part.interpolation) for part in self.parts]

    def forward(self, images: Tensor, words: Tensor) -> tuple[Tensor]:
        features = torch.cat([self._features(v, images) for v in range(len(self.parts))], -1)
        x = features
        names = sorted(n for n in self.weights.tensors if n.startswith("projector.") and n.endswith(".weight"))
        for i, name in enumerate(names):
            x = functional.linear(x, read(self.weights, name), read(self.weights, name.replace("weight", "bias")))
            if i + 1 < len(names):
                x = functional.gelu(x)
        embedded = read(self.weights, "words.weight")[words[0]]
        return (torch.cat((embedded[:1], x, embedded[1:])),)

    def _features(self, v: int, images: Tensor) -> Tensor:
        """Patch features of one transformer."""
        part, model = self.parts[v], self._transformer(v)
        pixels = images[self.numbers[v]].permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (part.mean, part.std))
        features: Tensor = model.get_intermediate_layers(((pixels - mean) / std)[None], n=[len(model.blocks) - 1])[0]
        return features[0]

    def _transformer(self, v: int) -> Any:
        if self._kept is not None and v in self._kept:
            return self._kept[v]
        part = self.parts[v]
        model = create(part, "meta")
        model.blocks = model.blocks[:-1]  # the last one's features are not used, nor are its weights in the folder
        needed = {n.removeprefix(f"vision.{v}."): n for n in self.weights.tensors if n.startswith(f"vision.{v}.")}
        model.load_state_dict({k: read(self.weights, n) for k, n in needed.items()}, strict=False, assign=True)
        if self._kept is not None:
            self._kept[v] = model
        return model


class Decoder(nn.Module):
    """embeds [k, D], position int64 [k], mask bool [1, 1, k, R], write_index int64 [1], cache -> logits, features."""

    def __init__(self, files: ModelFiles) -> None:
        super().__init__()
        self.spec, weights = files.decoder, WeightsFile.open(files.path / WEIGHTS)
        self.layers = [read_layer(weights, f"blocks.{i}") for i in range(self.spec.num_layers)]
        self.norm, self.head = read(weights, "final_norm.weight"), read(weights, "head.weight")

    def forward(
        self, embeds: Tensor, position: Tensor, mask: Tensor, write_index: Tensor, cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, taps, start = embeds, [], int(write_index)
        for i, layer in enumerate(self.layers):
            x = run_layer(self.spec, layer, x, position, mask[0, 0], _Cached(cache[2 * i : 2 * i + 2, 0], start))
            if i + 1 in self.spec.taps:
                taps.append(x)
        x = rms_norm(x, self.norm, self.spec.norm_epsilon)
        return functional.linear(x, self.head), torch.cat((*taps, x), -1)


class _Cached:
    """Writes rows behind ``start`` of a cache [2, heads, R, width] and returns all of it."""

    def __init__(self, cache: Tensor, start: int) -> None:
        self._cache, self._start = cache, start

    def __call__(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        end = self._start + key.shape[1]
        self._cache[0, :, self._start : end], self._cache[1, :, self._start : end] = key, value
        return self._cache[0], self._cache[1]


Named = dict[str, tuple[str, tuple[int | None, ...]]]


def reference_module(file: Path) -> tuple[nn.Module | None, Named, Named]:
    """The network behind a graph of this folder, and its inputs and outputs (dtype, shape; None = dynamic)."""
    files = ModelFiles.describe(file.parent)
    spec = files.decoder
    if file.stem == "prompt":
        prompt = Prompt(file.parent, is_kept=True)
        size = prompt.parts[0].image_size
        inputs: Named = {
            "images": ("uint8", (1 + max(prompt.numbers), size, size, 3)), "words": ("int64", (1, None)),
        }  # fmt: skip
        return prompt, inputs, {"embeds": ("float32", (None, spec.hidden_width))}
    if file.stem == "decoder":
        inputs = {
            "embeds": ("float32", (None, spec.hidden_width)), "position": ("int64", (None,)),
            "mask": ("bool", (1, 1, None, spec.rows)), "write_index": ("int64", (1,)),
        }  # fmt: skip
        outputs: Named = {
            "logits": ("float32", (None, spec.vocab_size)), "features": ("float32", (None, spec.feature_width)),
        }  # fmt: skip
        return Decoder(files), inputs, outputs
    return None, {}, {}


@torch.inference_mode()
def golden(folder: Path, inputs: dict[str, np.ndarray], tokens: np.ndarray, parents: np.ndarray) -> dict[str, Any]:
    """What the reference says about a prompt and about a forest of tokens behind it, layer by layer.

    Args:
        folder: a model folder, complete but for its golden inputs.
        inputs: images and words.
        tokens: int32 [n], ids of action tokens.
        parents: int32 [n], -1 = follows the prompt.

    Returns:
        ``prefill`` fp32 [1, V] about the first token, ``tree`` fp32 [n, V].
    """
    files = ModelFiles.describe(folder)
    spec, weights = files.decoder, WeightsFile.open(folder / WEIGHTS)
    (prompt,) = Prompt(folder, is_kept=False)(*(torch.from_numpy(inputs[name]) for name in ("images", "words")))
    p, n = len(prompt), len(tokens)
    x = torch.cat((prompt, read(weights, files.token_embedding)[torch.from_numpy(tokens).long()]))
    mask = torch.zeros(p + n, p + n, dtype=torch.bool)
    mask[:p, :p] = torch.ones(p, p, dtype=torch.bool).tril()
    position = torch.arange(p + n)
    for i, parent in enumerate(parents.tolist()):
        row = p + i
        mask[row], position[row] = (mask[p + parent], position[p + parent] + 1) if parent >= 0 else (mask[p - 1], p)
        mask[row, row] = True
    for i in range(spec.num_layers):
        x = run_layer(spec, read_layer(weights, f"blocks.{i}"), x, position, mask, lambda k, v: (k, v))
    x = rms_norm(x[p - 1 :], read(weights, "final_norm.weight"), spec.norm_epsilon)
    logits = functional.linear(x, read(weights, "head.weight")).numpy()
    return {"prefill": logits[:1], "tree": logits[1:]}
