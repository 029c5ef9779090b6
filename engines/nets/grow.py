"""Make a trained network deeper and its layers wider inside without changing what it computes.

A small network learns fast; grown, it goes on from there. New layers begin as the identity and new hidden units begin
with no effect, in the spirit of Net2Net (Chen et al. 2015, arXiv:1511.05641).
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from vla_spec.engines.nets.vla import VLA, VLAConfig


def grow(small: VLA, config: VLAConfig) -> VLA:
    """A network of ``config``'s sizes that computes what ``small`` computes.

    Raises:
        ValueError: something other than num_layers and mlp_width differs, or one of these is smaller.
    """
    old = small.config
    changes = {k: (v, getattr(config, k)) for k, v in asdict(old).items() if v != getattr(config, k)}
    said = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in changes.items())
    if changes.keys() - {"num_layers", "mlp_width"}:
        raise ValueError(f"only num_layers and mlp_width can grow, not {said}")
    if config.num_layers < old.num_layers or config.mlp_width < old.mlp_width:
        raise ValueError(f"num_layers and mlp_width can't shrink, {said}")
    big = VLA(config)
    with torch.no_grad():
        weights = big.state_dict()
        for name, value in small.state_dict().items():
            if not name.startswith("blocks."):
                weights[name].copy_(value)
        # Old layer i lands so that new layers are spread evenly between the old ones.
        stride = (config.num_layers - 1) / max(old.num_layers - 1, 1)
        places = [round(i * stride) for i in range(old.num_layers)]
        for i, block in enumerate(big.blocks):
            if i not in places:
                block.out.weight.zero_()
                block.down.weight.zero_()
                block.down.bias.zero_()
                continue
            source, h = small.blocks[places.index(i)], old.mlp_width
            for name in ("norm1", "qkv", "out", "norm2"):
                getattr(block, name).load_state_dict(getattr(source, name).state_dict())
            block.up.weight[:h], block.up.bias[:h] = source.up.weight, source.up.bias
            block.down.weight.zero_()
            block.down.weight[:, :h] = source.down.weight
            block.down.bias.copy_(source.down.bias)
    return big
