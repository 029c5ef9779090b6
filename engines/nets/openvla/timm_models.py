"""timm's vision transformers: their sizes (for layout and graph) and the modules (for the reference)."""

from __future__ import annotations

import importlib
import re
from typing import Any

from vla_spec.engines.nets.openvla.config import VisionPart
from vla_spec.engines.nets.openvla.layout import VisionSizes
from vla_spec.errors import BadModel, MissingDependency

_declared: list[Any] = []  # libraries of operators live as long as these objects


def load_timm() -> Any:
    """Import timm, also where torchvision, which it imports, was built for another PyTorch.

    Vision transformers use none of torchvision's compiled operators, but its Python part refuses to be imported if
    they are not there (PyTorch for CPU beside the default torchvision, say). They are declared then, without code.

    Raises:
        MissingDependency: torch or timm is not installed.
    """
    try:
        import torch

        for _ in range(8):
            try:
                importlib.import_module("torchvision")
                break
            except RuntimeError as error:
                missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
                if missing is None:
                    raise
                library = torch.library.Library("torchvision", "FRAGMENT")
                library.define(f"{missing[1]}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _declared.append(library)
        return importlib.import_module("timm")
    except ImportError as error:
        raise MissingDependency("timm", "pip install 'vla_spec[openvla]'") from error


def create(part: VisionPart, device: str = "cpu") -> Any:
    """The module of a vision transformer, without trained weights.

    Raises:
        BadModel: timm has no such model.
    """
    timm = load_timm()
    import torch

    try:
        with torch.device(device):
            model = timm.create_model(
                part.timm_id, pretrained=False, num_classes=0, img_size=part.image_size, **dict(part.overrides)
            )
    except RuntimeError as error:
        raise BadModel(f"timm {timm.__version__} makes no {part.timm_id} ({error})") from error
    return model.eval()


def sizes(part: VisionPart) -> VisionSizes:
    """What the model looks like; allocates no weights."""
    model = create(part, "meta")
    block = model.blocks[0]
    return VisionSizes(
        depth=len(model.blocks),
        width=model.embed_dim,
        num_heads=block.attn.num_heads,
        mlp_width=block.mlp.fc1.out_features,
        patch=model.patch_embed.patch_size[0],
        grid=model.patch_embed.grid_size[0],
        has_class_token=model.cls_token is not None,
        num_registers=model.num_reg_tokens,
        has_layer_scale=hasattr(block.ls1, "gamma"),
        norm_epsilon=block.norm1.eps,
        shapes={name: tuple(value.shape) for name, value in model.state_dict().items()},
    )
