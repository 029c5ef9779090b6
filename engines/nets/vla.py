"""The embedded policy: a small OpenVLA-style vision-language-action transformer. Weights in, logits out.

Per camera a convolution stem whose flattened features become a few visual tokens (flattening keeps *where*, which is
what an arm needs); the instruction's words, pooled to a few tokens; one token for the robot's own state; then a
causal transformer whose outputs are 256-bin action tokens (OpenVLA, Kim et al. 2024, arXiv:2406.09246). The prompt
attends to itself in both directions (prefix-LM, as PaliGemma, arXiv:2407.07726). An auxiliary head predicts tokens
further ahead from single hidden states during training (multi-token prediction, Gloeckle et al. 2024,
arXiv:2404.19737), so that hidden states hold the plan that drafters later read from them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VLAConfig:
    """Sizes. Everything that an engine needs to rebuild the graph from the weights."""

    num_words: int  # vocabulary of the instruction, padding (0) and unknown (1) included
    width: int = 192
    num_layers: int = 14
    num_heads: int = 6
    mlp_width: int = 1408
    image_size: int = 96
    num_cameras: int = 3
    tokens_per_camera: int = 3
    max_words: int = 10
    text_tokens: int = 3
    state_size: int = 4
    horizon: int = 8
    action_size: int = 4
    num_bins: int = 256
    stem_channels: tuple[int, int, int] = (32, 64, 96)

    @property
    def prompt_length(self) -> int:
        """Cache rows before the first action token."""
        return self.num_cameras * self.tokens_per_camera + self.text_tokens + 1

    @property
    def num_tokens(self) -> int:
        """T, action tokens in one chunk."""
        return self.horizon * self.action_size

    @property
    def feature_width(self) -> int:
        """D, width of the hidden states that drafters see: three depths, or the last one of a very shallow network."""
        return self.width * (3 if self.num_layers >= 3 else 1)

    def to_json(self) -> str:
        """As stored in the safetensors header."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> VLAConfig:
        """Inverse of `to_json`."""
        values = json.loads(text)
        values["stem_channels"] = tuple(values["stem_channels"])
        return VLAConfig(**values)


class Residual(nn.Module):
    """Two 3x3 convolutions around a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:  # [n, c, h, w] -> same
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class Stem(nn.Module):
    """Pictures to a 6x6 map (for 96x96), shared by all cameras."""

    def __init__(self, channels: tuple[int, int, int]) -> None:
        super().__init__()
        c1, c2, c3 = channels
        self.conv1 = nn.Conv2d(3, c1, 8, stride=4, padding=2)
        self.conv2 = nn.Conv2d(c1, c2, 3, stride=2, padding=1)
        self.res2 = Residual(c2)
        self.conv3 = nn.Conv2d(c2, c3, 3, stride=2, padding=1)
        self.res3 = Residual(c3)

    def forward(self, pixels: Tensor) -> Tensor:  # [n, 3, 96, 96] in [-1, 1] -> [n, c3, 6, 6]
        x = self.res2(F.relu(self.conv2(F.relu(self.conv1(pixels)))))
        return self.res3(F.relu(self.conv3(x)))


class Block(nn.Module):
    """Pre-norm transformer layer; attention by hand (matmul + softmax), which is what every engine rebuilds."""

    def __init__(self, width: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, mlp_width)
        self.down = nn.Linear(mlp_width, width)

    def forward(
        self, x: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x: [n, k, width]; mask: additive [k, past + k] (or [n, 1, k, ..]); returns x and this call's (K, V)."""
        n, k, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, k, 3, self.num_heads, self.head_width)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [n, heads, k, head_width]
        new = key, value
        if past is not None:
            key, value = torch.cat((past[0], key), 2), torch.cat((past[1], value), 2)
        scores = query @ key.transpose(2, 3) * self.head_width**-0.5 + mask
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(n, k, width)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x)))), new


class VLA(nn.Module):
    """The policy network."""

    def __init__(self, config: VLAConfig) -> None:
        super().__init__()
        self.config = c = config
        side = c.image_size // 16
        flat = c.stem_channels[2] * side * side
        self.stem = Stem(c.stem_channels)
        self.camera_norm = nn.ModuleList(nn.LayerNorm(flat) for _ in range(c.num_cameras))
        self.camera_proj = nn.ModuleList(nn.Linear(flat, c.tokens_per_camera * c.width) for _ in range(c.num_cameras))
        self.word = nn.Embedding(c.num_words, c.width)
        self.word_position = nn.Parameter(torch.randn(c.max_words, c.width) * 0.02)
        self.word_mlp = nn.Linear(c.width, c.width)
        self.text_query = nn.Parameter(torch.randn(c.text_tokens, c.width) * 0.3)
        self.state_up = nn.Linear(c.state_size, c.width)
        self.state_down = nn.Linear(c.width, c.width)
        self.register_buffer("state_mean", torch.zeros(c.state_size))
        self.register_buffer("state_std", torch.ones(c.state_size))
        self.token = nn.Embedding(c.num_bins, c.width)
        self.position = nn.Parameter(torch.randn(c.prompt_length + c.num_tokens, c.width) * 0.02)
        self.blocks = nn.ModuleList(Block(c.width, c.num_heads, c.mlp_width) for _ in range(c.num_layers))
        self.final_norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.num_bins)
        # multi-token prediction, training only
        self.ahead_up = nn.Linear(c.width, 2 * c.width)
        self.ahead_position = nn.Parameter(torch.randn(c.num_tokens, 2 * c.width) * 0.3)
        self.ahead_down = nn.Linear(2 * c.width, c.width)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.word.weight, std=0.3)
        nn.init.normal_(self.token.weight, std=0.02)
        # Neighbouring bins mean neighbouring actions: start with embeddings that say so.
        angle = torch.linspace(-1, 1, self.config.num_bins)[:, None] * torch.arange(1, 17)[None] * 1.5
        with torch.no_grad():
            self.token.weight[:, :32] += 0.3 * torch.cat((angle.sin(), angle.cos()), 1)
        for block in self.blocks:
            for linear in (block.out, block.down):
                nn.init.normal_(linear.weight, std=0.02 / (2 * self.config.num_layers) ** 0.5)
            nn.init.normal_(block.qkv.weight, std=self.config.width**-0.5)
            nn.init.normal_(block.up.weight, std=self.config.width**-0.5)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def embed_prompt(self, images: Tensor, words: Tensor, state: Tensor) -> Tensor:
        """Prompt rows [n, p, width] of images uint8 [n, cameras, h, w, 3], words int64 [n, max_words], state [n, s]."""
        c, n = self.config, len(images)
        # To float first: TensorRT takes uint8 as an input, and then nothing but a cast.
        pixels = images.float().flatten(0, 1).permute(0, 3, 1, 2) * (2 / 255) - 1
        maps = self.stem(pixels).reshape(n, c.num_cameras, -1)
        visual = [
            proj(norm(maps[:, i])).view(n, c.tokens_per_camera, c.width)
            for i, (norm, proj) in enumerate(zip(self.camera_norm, self.camera_proj, strict=True))
        ]
        word = self.word(words) + self.word_position
        word = word + F.gelu(self.word_mlp(word))
        blank = (words == 0).float() * -1e4
        weight = (self.text_query @ word.transpose(1, 2) * c.width**-0.5 + blank[:, None]).softmax(-1)
        normal = (state - self.state_mean) / self.state_std
        own = self.state_down(F.gelu(self.state_up(normal)))[:, None]
        return torch.cat((*visual, weight @ word, own), 1) + self.position[: c.prompt_length]

    def run_blocks(self, x: Tensor, mask: Tensor, past: list[tuple[Tensor, Tensor]] | None = None):
        """All layers over k rows x [n, k, width]; mask additive [k, past + k] (or [n, 1, k, past + k]).

        Returns:
            final hidden states [n, k, width]; features [n, k, 3 * width], what drafters see (a third, two thirds and
            the end of the way, as EAGLE-3, arXiv:2503.01840); and the (key, value) rows of every layer.
        """
        taps, rows = [], []
        third = len(self.blocks) // 3
        for i, block in enumerate(self.blocks):
            x, row = block(x, mask, past[i] if past else None)
            rows.append(row)
            if i + 1 in (third, 2 * third):
                taps.append(x)
        x = self.final_norm(x)
        return x, torch.cat((*taps, x), -1), rows

    def hidden(self, prompt: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher-forced final hidden states [n, p + k, width] and features [n, p + k, 3 * width].

        prompt [n, p, width], tokens int64 [n, k].
        """
        p, k = self.config.prompt_length, tokens.shape[1]
        x = torch.cat((prompt, self.token(tokens) + self.position[p : p + k]), 1)
        mask = torch.full((p + k, p + k), float("-inf")).triu(1)
        mask[:p, :p] = 0
        x, features, _ = self.run_blocks(x, mask)
        return x, features

    def forward(self, images: Tensor, words: Tensor, state: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher-forced logits [n, T, bins] for a whole chunk, and the hidden states [n, T, width] behind them."""
        hidden, _ = self.hidden(self.embed_prompt(images, words, state), tokens[:, :-1])
        hidden = hidden[:, self.config.prompt_length - 1 :]
        return self.head(hidden), hidden

    def look_ahead(self, hidden: Tensor, position: Tensor) -> Tensor:
        """Logits of the tokens at chunk positions ``position`` [...], each from an earlier hidden [..., width]."""
        x = F.gelu(self.ahead_up(hidden) + self.ahead_position[position])
        return self.head(hidden + self.ahead_down(x))
