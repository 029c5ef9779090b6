"""Read and write network weights as safetensors: half precision on disk, single precision in memory."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vla_spec.atomic import replacing
from vla_spec.engines.nets.vla import VLA, VLAConfig
from vla_spec.errors import BadModel

#: Used in training only; not shipped.
TRAINING_ONLY = ("ahead_up.", "ahead_down.", "ahead_position")


def save_half(path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write fp16 weights atomically. safetensors holds data only: no code, no pickle.

    Equal arguments give equal bytes: the file's hash is the model's identity.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(_half_file(weights, metadata))


def _half_file(weights: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    half = {k: v.detach().to(torch.float16).contiguous().clone() for k, v in weights.items()}
    return _sort_metadata(save(half, metadata))


def policy_file(model: VLA, vocabulary: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What target.safetensors holds of a trained policy: its tensors and its header."""
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith(TRAINING_ONLY)}
    return weights, {"config": model.config.to_json(), "vocabulary": json.dumps(vocabulary)}


def policy_sha256(model: VLA, vocabulary: list[str]) -> str:
    """Identity of a policy: the hash that its target.safetensors has once it is exported."""
    return hashlib.sha256(_half_file(*policy_file(model, vocabulary))).hexdigest()


def _sort_metadata(file: bytes) -> bytes:
    """The same safetensors file with the keys of its metadata sorted; the library writes them in random order.

    Layout: uint64 length of the header, a JSON header padded with spaces to a multiple of 8, the tensors. Tensors are
    sorted by the library, and their offsets count from the header's end.
    """
    (size,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + file[8 + size :]


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """fp32 tensors and the metadata.

    Raises:
        BadModel: missing or corrupt.
    """
    try:
        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k).float() for k in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise BadModel(f"{path}: not a readable safetensors file ({error})") from error


def load_model(path: Path) -> VLA:
    """The policy network with shipped weights, in evaluation mode."""
    return _network(*read_weights(path), path)


def load_policy(path: Path) -> tuple[VLA, list[str]]:
    """The averaged weights of a checkpoint (or the weights of a shipped file) and the vocabulary."""
    weights, metadata = read_weights(path)
    prefix = "ema." if any(k.startswith("ema.") for k in weights) else ""
    kept = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    network = _network(kept, metadata, path)
    if "vocabulary" not in metadata:
        raise BadModel(f"{path}: no vocabulary in its header; a checkpoint of `vla-spec train` has one")
    return network, json.loads(metadata["vocabulary"])


def policy_sizes(metadata: dict[str, str], path: Path) -> VLAConfig:
    """The network sizes in the header of a policy's file.

    Raises:
        BadModel: it has none, as the file of a drafter.
    """
    try:
        return VLAConfig.from_json(metadata["config"])
    except (KeyError, ValueError, TypeError) as error:
        raise BadModel(
            f"{path}: not a policy, its header has no sizes of one; checkpoints of `vla-spec train` and "
            f"target.safetensors of a model folder have them"
        ) from error


def _network(weights: dict[str, torch.Tensor], metadata: dict[str, str], path: Path) -> VLA:
    """The network of a file's header with these weights; all but `TRAINING_ONLY` must be there."""
    model = VLA(policy_sizes(metadata, path))
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise BadModel(f"{path}: its weights don't have the sizes that its header says ({error})") from error
    missing = [m for m in missing if not m.startswith(TRAINING_ONLY)]
    if missing or unexpected:
        raise BadModel(f"{path}: missing tensors {missing[:5]}, unexpected tensors {unexpected[:5]}")
    return model.eval()
