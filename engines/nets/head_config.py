"""Sizes of a drafter head: a small network on the target's hidden states. Needs no PyTorch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from vla_spec.errors import BadModel

if TYPE_CHECKING:
    from vla_spec.engines.nets.vla import VLAConfig

#: Tokens that a head proposes per position or row, best first.
BLOCK_CHOICES, FEATURE_CHOICES = 4, 8
#: Cache rows of the feature head for the tree that is being drafted: its live ones and one level more fit in.
TREE_ROWS = 64
#: Key in a safetensors header: sha256 of the weights of the policy that a drafter was distilled for.
TARGET_KEY = "target_sha256"


@dataclass(frozen=True)
class HeadConfig:
    """All but ``mlp_width`` are the target's; ``feature_width`` is F, ``num_bins`` is V."""

    width: int
    feature_width: int
    num_heads: int
    mlp_width: int
    prompt_length: int
    num_tokens: int
    num_bins: int

    @staticmethod
    def for_target(target: VLAConfig, mlp_width: int) -> HeadConfig:
        """A head that fits this target."""
        t = target
        return HeadConfig(t.width, t.feature_width, t.num_heads, mlp_width, t.prompt_length, t.num_tokens, t.num_bins)

    @property
    def head_width(self) -> int:
        """Of attention."""
        return self.width // self.num_heads

    @property
    def block_capacity(self) -> int:
        """Target rows that the block head knows at most."""
        return self.prompt_length + self.num_tokens

    @property
    def block_rows(self) -> int:
        """R of the block head: target rows, and the drafted positions behind them."""
        return self.block_capacity + self.num_tokens

    @property
    def feature_capacity(self) -> int:
        """Rows of the feature head's chain at most: all of the prompt's but the last, and the chunk's."""
        return self.prompt_length - 1 + self.num_tokens

    @property
    def feature_rows(self) -> int:
        """R of the feature head: the chain, and the tree behind it."""
        return self.feature_capacity + TREE_ROWS

    def to_json(self) -> str:
        """As stored in the safetensors header."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str, where: str) -> HeadConfig:
        """Inverse of `to_json`.

        Raises:
            BadModel: no sizes of a head, or impossible ones.
        """
        try:
            values = json.loads(text)
            config = HeadConfig(**values)
        except (ValueError, TypeError) as error:
            raise BadModel(f"{where}: its header has no sizes of a drafter's head ({error})") from error
        wrong = [f.name for f in fields(config) if not isinstance(getattr(config, f.name), int)]
        wrong = wrong or [f.name for f in fields(config) if getattr(config, f.name) < 1]
        if wrong or config.width % config.num_heads:
            raise BadModel(f"{where}: impossible sizes of a head ({', '.join(wrong) or 'width by num_heads'})")
        return config
