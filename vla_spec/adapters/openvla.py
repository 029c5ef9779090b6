"""OpenVLA's adapter: one picture and an instruction to engine inputs; action tokens to un-normalised actions.

Everything that it knows comes from ``policy.json`` and ``tokenizer.json`` of a folder that `vla-spec export openvla`
wrote. Prompt, token ids and pictures are those that the published processor makes.
Source: Kim et al. 2024 (OpenVLA), arXiv:2406.09246.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from vla_spec import plugins
from vla_spec.adapters._square_pictures import centre_crop, square
from vla_spec.adapters._tokens import inside_domain
from vla_spec.errors import BadConfig, BadModel, BadObservation, MissingDependency, UnknownOption
from vla_spec.interfaces import ActionTokenizer
from vla_spec.types import EngineInputs, Float32, Int32, Observation, TokenDomain

FILE_NAME, TOKENIZER = "policy.json", "tokenizer.json"
#: Share of a picture's area that is kept by the published evaluation of checkpoints tuned with augmented pictures.
CROP_AREA = 0.9
#: Degrees of freedom of an arm: moved, turned, and the gripper. Other numbers of them form one group.
ARM_GROUPS = (0, 0, 0, 1, 1, 1, 2)
KEYS = {
    "adapter", "vision", "resize", "prompt", "max_words", "bos_token", "empty_token", "num_bins", "first_token",
    "statistics", "unnorm_key", "center_crop",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """What the folder leaves open.

    Attributes:
        unnorm_key: data set whose statistics un-normalise the actions; empty = the folder's own choice.
        camera: which of an observation's pictures the model sees.
        center_crop: see only the middle 90 % of it, as checkpoints tuned with augmented pictures expect (those for
            LIBERO, say); None = the folder's own choice.
    """

    unnorm_key: str = ""
    camera: int = 0
    center_crop: bool | None = None

    def __post_init__(self) -> None:
        if self.camera < 0:
            raise BadConfig(f"camera is {self.camera}; valid: 0 or more")


@final
class OpenVLAAdapter:
    """One picture and a sentence; 256-bin tokens back to actions.

    Args:
        policy: ``policy.json``.
        words: the text tokenizer, of the library `tokenizers`.
        tokenizer: how tokens become actions.
        switches: [A], degrees of freedom that are never relaxed.
        options: see `Options`.
    """

    def __init__(
        self, policy: dict[str, Any], words: Any, tokenizer: ActionTokenizer, switches: list[bool], options: Options,
    ) -> None:  # fmt: skip
        self._policy, self._words_of, self._tokenizer, self._options = policy, words, tokenizer, options
        self._size = int(policy["vision"][0]["image_size"])
        self._kinds = list(dict.fromkeys(part["interpolation"] for part in policy["vision"]))
        # One padded picture for all transformers; as published, the colour is the last one's mean.
        self._fill = tuple(int(value * 255) for value in policy["vision"][-1]["mean"])
        is_cropped = policy["center_crop"] if options.center_crop is None else options.center_crop
        self._crop = CROP_AREA if is_cropped else None
        self._domain = _domain(tokenizer, switches)
        self._ids: dict[str, np.ndarray[Any, Any]] = {}

    @property
    def domain(self) -> TokenDomain:
        return self._domain

    @property
    def tokenizer(self) -> ActionTokenizer:
        return self._tokenizer

    def encode(self, observation: Observation) -> EngineInputs:
        """``images`` uint8 [n, s, s, 3], one per way of resizing; ``words`` int64 [1, w].

        Raises:
            BadObservation: says what is wrong, where, and what is valid.
        """
        return {"images": self._pictures(observation.images), "words": self._words(observation.instruction)}

    def decode(self, tokens: Int32) -> Float32:
        """Int32 [m] -> float32 [m // A, A]; a started step is left out.

        Raises:
            BadToken: an id outside the domain, with its position.
        """
        return self._tokenizer.decode(inside_domain(tokens, self._domain))

    def example(self) -> Observation:
        """A grey picture and a short sentence."""
        images = np.full((self._options.camera + 1, self._size, self._size, 3), 128, np.uint8)
        return Observation(images, np.zeros(0, np.float32), "pick up the cup", 0, 0)

    def _pictures(self, images: Any) -> np.ndarray[Any, Any]:
        camera = self._options.camera
        valid = f"uint8 [{camera + 1} or more, height, width, 3]"
        if not isinstance(images, np.ndarray):
            raise BadObservation("images", f"a {type(images).__name__}", valid)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) <= camera:
            raise BadObservation("images", f"{images.dtype} {list(images.shape)}", valid)
        picture = images[camera]
        if not picture.size:
            raise BadObservation("images", f"empty: {list(images.shape)}", valid)
        if self._crop is not None:
            picture = centre_crop(picture, self._crop)
        strategy = str(self._policy["resize"])
        return np.stack([square(picture, self._size, strategy, kind, self._fill) for kind in self._kinds])

    def _words(self, instruction: Any) -> np.ndarray[Any, Any]:
        if not isinstance(instruction, str):
            raise BadObservation("instruction", f"a {type(instruction).__name__}", "a sentence")
        if instruction not in self._ids:
            if not instruction.strip():
                raise BadObservation("instruction", f"empty: {instruction!r}", "a sentence")
            ids = list(self._words_of.encode(self._policy["prompt"].format(instruction=instruction.lower())).ids)
            # Training ended each prompt with the token of an empty word; the tokenizer itself leaves it out.
            if ids[-1] != self._policy["empty_token"]:
                ids.append(self._policy["empty_token"])
            most = int(self._policy["max_words"])
            if len(ids) > most:
                raise BadObservation("instruction", f"{len(ids)} tokens with its prompt", f"at most {most}")
            if (
                len(self._ids) > 256
            ):  # sentences repeat; a robot that invents new ones all the time does not fill memory
                self._ids.clear()
            self._ids[instruction] = np.array([ids], np.int64)
        return self._ids[instruction]


def _domain(tokenizer: ActionTokenizer, switches: list[bool]) -> TokenDomain:
    """One action per chunk: A tokens."""
    size = len(switches)
    group = np.array(ARM_GROUPS if size == len(ARM_GROUPS) else np.array(switches, int), np.int32)
    position = np.arange(size, dtype=np.int32)
    low, high = np.zeros(size, np.int32), np.full(size, tokenizer.vocab_size - 1, np.int32)
    # The two highest tokens mean the same, so the mean width is over one interval less than there are tokens.
    unit = tokenizer.distance(low, high, position) / (tokenizer.vocab_size - 2)
    never_relaxed = np.array(switches, bool)
    unit_per_bin = np.where(never_relaxed, np.float32(1), unit).astype(np.float32)
    return TokenDomain(tokenizer.vocab_size, size, size, group, never_relaxed, unit_per_bin)


def read_policy(path: Path) -> dict[str, Any]:
    """``policy.json`` of an OpenVLA folder, its keys checked.

    Raises:
        BadModel: missing, no JSON, or keys too few or too many.
    """
    try:
        policy = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadModel(f"{path}: no such file; `vla-spec export openvla` writes it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadModel(f"{path}: not JSON: {error}") from None
    found = set(policy) if isinstance(policy, dict) else set()
    if found != KEYS or policy["adapter"] != "openvla" or not policy["vision"]:
        raise BadModel(
            f"{path}: missing keys {sorted(KEYS - found)}, unknown keys {sorted(found - KEYS)}; valid: a policy.json "
            f"of an OpenVLA model"
        )
    return dict(policy)


def choose_statistics(statistics: dict[str, Any], key: str, where: str) -> str:
    """The data set whose statistics un-normalise the actions.

    Raises:
        UnknownOption: the model has no such data set.
        BadConfig: it was trained on several, and none was named.
    """
    if key and key not in statistics:
        raise UnknownOption("unnorm_key", key, statistics, where)
    if not key and len(statistics) > 1:
        raise BadConfig(f"{where}: several data sets; set unnorm_key to one of {', '.join(sorted(statistics))}")
    return key or next(iter(statistics))


def load(model_dir: Path, options: Options | None = None) -> OpenVLAAdapter:
    """The adapter of a model folder, its tokenizers included.

    Raises:
        BadModel: ``policy.json`` or ``tokenizer.json`` is missing or wrong.
        MissingDependency: the library `tokenizers` is not installed.
    """
    options = options or Options()
    path = model_dir / FILE_NAME
    policy = read_policy(path)
    key = choose_statistics(policy["statistics"], options.unnorm_key or policy["unnorm_key"] or "", str(path))
    stored = policy["statistics"][key]
    plugin = plugins.load("tokenizer", "quantile_bins")
    values = {name: tuple(stored[name]) for name in ("q01", "q99", "mask")}
    tokenizer = plugin.build(plugin.options(num_bins=policy["num_bins"], **values), None)  # type: ignore[arg-type]
    words = read_words(model_dir / TOKENIZER)
    return OpenVLAAdapter(policy, words, tokenizer, [not m for m in stored["mask"]], options)


def read_words(path: Path) -> Any:
    """A text tokenizer.

    Raises:
        BadModel: missing or not one.
        MissingDependency: the library `tokenizers` is not installed.
    """
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError as error:
        raise MissingDependency("tokenizers", "pip install 'vla_spec[openvla]'") from error
    if not path.is_file():
        raise BadModel(f"{path}: missing; a model folder has the checkpoint's {TOKENIZER}")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise BadModel(f"{path}: not a tokenizer ({str(error).splitlines()[0][:200]})") from error


def build(options: Options, parts: plugins.Parts) -> OpenVLAAdapter:
    """The adapter comes first: only ``parts.model_dir`` is read, domain and tokenizer are the adapter's to say."""
    if parts.model_dir is None:
        raise BadConfig(f"adapter openvla: needs model_dir, a folder with {FILE_NAME}")
    return load(parts.model_dir, options)
