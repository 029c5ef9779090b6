"""The embedded policy's adapter: pictures, words and state to engine inputs; action tokens to actions.

Everything that it knows comes from ``policy.json`` beside the weights. Stateless but for its counters.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from vla_spec import plugins
from vla_spec.adapters._tokens import inside_domain
from vla_spec.errors import BadConfig, BadModel, BadObservation
from vla_spec.interfaces import ActionTokenizer
from vla_spec.types import EngineInputs, Float32, Int32, Observation, TokenDomain

FILE_NAME = "policy.json"
PADDING, UNKNOWN = 0, 1
#: Known words that an error message lists at most.
MAX_WORDS_SHOWN = 24
_NO_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


@dataclass(frozen=True, slots=True)
class Options:
    """Nothing to set: the model's folder says it all."""


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """``policy.json``, as it is stored.

    Attributes:
        image_size: pictures are image_size x image_size.
        num_cameras: pictures per observation.
        state_size: S.
        horizon: H.
        action_size: A.
        max_words: words of an instruction that the model reads; the rest is cut off, and counted.
        vocabulary: the words it knows; 0 is padding, 1 stands for any other word.
        tokenizer: ``{"name": plugin name, ...its options}``.
        never_relaxed_dofs: degrees of freedom that are switches.
        groups: [A], which degrees of freedom share an error budget within one step.
        state_low, state_high: [S], range of the state in training.
    """

    image_size: int
    num_cameras: int
    state_size: int
    horizon: int
    action_size: int
    max_words: int
    vocabulary: tuple[str, ...]
    tokenizer: dict[str, Any]
    never_relaxed_dofs: tuple[int, ...]
    groups: tuple[int, ...]
    state_low: tuple[float, ...]
    state_high: tuple[float, ...]

    @staticmethod
    def from_file(path: Path) -> PolicyConfig:
        """Read and check.

        Raises:
            BadModel: no such file, no JSON, a key too few or too many, or sizes that contradict each other.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BadModel(f"{path}: no such file; a model folder has {FILE_NAME} beside its weights") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BadModel(f"{path}: not JSON: {error}") from None
        names = set(PolicyConfig.__dataclass_fields__)
        if not isinstance(values, dict) or set(values) != names:
            found = set(values) if isinstance(values, dict) else set()
            raise BadModel(
                f"{path}: missing keys {sorted(names - found)}, unknown keys {sorted(found - names)}; "
                f"valid: {', '.join(sorted(names))}"
            )
        stored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        config = PolicyConfig(**stored)
        fault = config._fault()
        if fault:
            raise BadModel(f"{path}: {fault}")
        return config

    def _fault(self) -> str:
        """The first thing that can't be right; empty = nothing."""
        for name in ("image_size", "num_cameras", "state_size", "horizon", "action_size", "max_words"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                return f"{name} is {value!r}; valid: a whole number from 1"
        if not isinstance(self.vocabulary, tuple) or len(self.vocabulary) < 3:
            return "vocabulary has no words; valid: padding, unknown, then at least one word"
        if not isinstance(self.tokenizer, dict) or "name" not in self.tokenizer:
            return f"tokenizer is {self.tokenizer!r}; valid: an object with a name and that tokenizer's options"
        for name, size in (("groups", "action_size"), ("state_low", "state_size"), ("state_high", "state_size")):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != getattr(self, size):
                return f"{name} is {value!r}; valid: a list of {size} = {getattr(self, size)} numbers"
        bad = [dof for dof in self.never_relaxed_dofs if dof not in range(self.action_size)]
        if bad:
            return f"never_relaxed_dofs has {bad}; valid: 0..{self.action_size - 1}"
        if any(low >= high for low, high in zip(self.state_low, self.state_high, strict=True)):
            return f"state_low {self.state_low} must lie below state_high {self.state_high}"
        return ""


@final
class VLAAdapter:
    """Pictures, words and state for the embedded policy; 256-bin tokens back to actions.

    Args:
        config: ``policy.json``.
        tokenizer: how tokens become actions.
    """

    def __init__(self, config: PolicyConfig, tokenizer: ActionTokenizer) -> None:
        self.config, self._tokenizer = config, tokenizer
        self._ids = {word: i for i, word in enumerate(config.vocabulary) if i > UNKNOWN}
        self._low = np.array(config.state_low, np.float32)
        self._high = np.array(config.state_high, np.float32)
        self._domain = _domain(config, tokenizer)
        #: Since construction: instructions that were cut off, observations with a word that is not in the
        #: vocabulary, and observations whose state lay outside the range of training.
        self.num_truncated = self.num_with_unknown_words = self.num_out_of_range = 0

    @property
    def domain(self) -> TokenDomain:
        return self._domain

    @property
    def tokenizer(self) -> ActionTokenizer:
        return self._tokenizer

    @property
    def words(self) -> list[str]:
        """The words it knows, sorted."""
        return sorted(self._ids)

    def encode(self, observation: Observation) -> EngineInputs:
        """``images`` uint8 [1, cameras, h, w, 3], ``words`` int64 [1, max_words], ``state`` float32 [1, S].

        Raises:
            BadObservation: says what is wrong, where, and what is valid.
        """
        return {
            "images": self._images(observation.images),
            "words": self._words(observation.instruction),
            "state": self._state(observation.state),
        }

    def decode(self, tokens: Int32) -> Float32:
        """Int32 [m] -> float32 [m // A, A]; a started step is left out.

        Raises:
            BadToken: an id outside the domain, with its position.
        """
        return self._tokenizer.decode(inside_domain(tokens, self._domain))

    def example(self) -> Observation:
        """Some observation that is valid, for warm-up and for tests: grey pictures, middle state, the first word."""
        c = self.config
        images = np.full((c.num_cameras, c.image_size, c.image_size, 3), 128, np.uint8)
        middle = ((self._low + self._high) / 2).astype(np.float32)
        return Observation(images, middle, c.vocabulary[UNKNOWN + 1], 0, 0)

    def _images(self, images: Any) -> np.ndarray[Any, Any]:
        size = self.config.image_size
        valid = f"uint8 [{self.config.num_cameras}, {size}, {size}, 3]"
        if not isinstance(images, np.ndarray):
            raise BadObservation("images", f"a {type(images).__name__}", valid)
        if images.dtype != np.uint8 or images.shape != (self.config.num_cameras, size, size, 3):
            raise BadObservation("images", f"{images.dtype} {list(images.shape)}", valid)
        return images[None]

    def _words(self, instruction: Any) -> np.ndarray[Any, Any]:
        if not isinstance(instruction, str):
            raise BadObservation("instruction", f"a {type(instruction).__name__}", "a sentence")
        words = instruction.lower().translate(_NO_PUNCTUATION).split()
        if not words:
            raise BadObservation("instruction", f"empty: {instruction!r}", "a sentence")
        ids = [self._ids.get(word, UNKNOWN) for word in words]
        if all(i == UNKNOWN for i in ids):
            known = self.words
            more = f" and {len(known) - MAX_WORDS_SHOWN} more" if len(known) > MAX_WORDS_SHOWN else ""
            raise BadObservation(
                "instruction",
                f"{instruction!r}, of which no word is known",
                f"a sentence of {', '.join(known[:MAX_WORDS_SHOWN])}{more}",
            )
        self.num_with_unknown_words += UNKNOWN in ids
        self.num_truncated += len(ids) > self.config.max_words
        row = np.full((1, self.config.max_words), PADDING, np.int64)
        kept = ids[: self.config.max_words]
        row[0, : len(kept)] = kept
        return row

    def _state(self, state: Any) -> np.ndarray[Any, Any]:
        valid = f"{self.config.state_size} finite numbers"
        if not isinstance(state, np.ndarray):
            raise BadObservation("state", f"a {type(state).__name__}", valid)
        if state.shape != (self.config.state_size,) or state.dtype.kind not in "fiu":
            raise BadObservation("state", f"{state.dtype} {list(state.shape)}", valid)
        if not np.isfinite(state).all():
            where = int(np.argmin(np.isfinite(state)))
            raise BadObservation(f"state[{where}]", f"{state[where]}", valid)
        width = self._high - self._low
        far = (state < self._low - width) | (state > self._high + width)
        if far.any():
            # Further off than the whole range is wide: a unit or an index is wrong, not the arm's pose.
            i = int(far.argmax())
            raise BadObservation(f"state[{i}]", f"{state[i]}", f"about {self._low[i]}..{self._high[i]}")
        self.num_out_of_range += bool(((state < self._low) | (state > self._high)).any())
        return state[None].astype(np.float32)


def _domain(config: PolicyConfig, tokenizer: ActionTokenizer) -> TokenDomain:
    steps, per_step = config.horizon, config.action_size
    num_groups = max(config.groups) + 1
    position = np.arange(steps * per_step, dtype=np.int32)
    is_switch = np.isin(np.arange(per_step), config.never_relaxed_dofs)
    group = np.arange(steps)[:, None] * num_groups + np.array(config.groups)  # [H, A]
    zero = np.zeros_like(position)
    unit = np.abs(tokenizer.distance(zero, zero + 1, position)).astype(np.float32)
    never_relaxed = np.tile(is_switch, steps)
    return TokenDomain(
        vocab_size=tokenizer.vocab_size,
        num_tokens=steps * per_step,
        tokens_per_step=per_step,
        group=group.reshape(-1).astype(np.int32),
        never_relaxed=never_relaxed,
        unit_per_bin=np.where(never_relaxed, np.float32(1), unit),
    )


def load(model_dir: Path) -> VLAAdapter:
    """The adapter of a model folder, its tokenizer included.

    Raises:
        BadModel: ``policy.json`` is missing or wrong.
        UnknownOption: it names a tokenizer that does not exist.
    """
    path = model_dir / FILE_NAME
    config = PolicyConfig.from_file(path)
    options = dict(config.tokenizer)
    plugin = plugins.load("tokenizer", str(options.pop("name")), f"{path}: tokenizer")
    valid = set(plugin.options.__dataclass_fields__)
    if not set(options) <= valid:
        raise BadModel(f"{path}: tokenizer has no option {sorted(set(options) - valid)}; valid: {sorted(valid)}")
    for name in options:
        if name in ("low", "high") and isinstance(options[name], (int, float)):
            options[name] = [options[name]] * config.action_size
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    tokenizer = plugin.build(plugin.options(**values), None)  # type: ignore[arg-type]  # there are no parts yet
    shape = tokenizer.decode(np.zeros(config.action_size, np.int32)).shape
    if shape != (1, config.action_size):
        raise BadModel(f"{path}: tokenizer decodes one step to {list(shape)}; valid: [1, {config.action_size}]")
    return VLAAdapter(config, tokenizer)


def build(options: Options, parts: plugins.Parts) -> VLAAdapter:
    """The adapter comes first: only ``parts.model_dir`` is read, domain and tokenizer are the adapter's to say."""
    if parts.model_dir is None:
        raise BadConfig(f"adapter vla: needs model_dir, a folder with {FILE_NAME}")
    return load(parts.model_dir)
