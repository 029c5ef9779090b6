"""Pictures as OpenVLA's processor prepares them, without its libraries: Pillow and numpy.

Resizing is Pillow's own, as in the processor (which goes through torchvision to the same code); the centre crop of
fine-tuned checkpoints is TensorFlow's ``crop_and_resize``: bilinear between the corners' centres, no anti-aliasing.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_spec.errors import MissingDependency
from vla_spec.types import UInt8

#: What `centre_crop` makes, whatever the model's picture size is; the published evaluation has it fixed.
CROPPED_SIZE = 224


@functools.cache
def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependency("Pillow", "pip install 'vla_spec[openvla]'") from error
    return Image


def square(picture: UInt8, size: int, strategy: str, interpolation: str, fill: tuple[int, ...]) -> UInt8:
    """A picture uint8 [h, w, 3] as uint8 [size, size, 3].

    Args:
        picture: any size.
        size: of the result.
        strategy: ``resize-naive`` (squeezed), ``resize-crop`` (the middle of it) or ``letterbox`` (padded).
        interpolation: Pillow's name of a filter, in small letters.
        fill: colour of the padding.
    """
    image_module = _pillow()
    resample = image_module.Resampling[interpolation.upper()]
    height, width = picture.shape[:2]
    if strategy == "letterbox":
        longer = max(height, width)
        x, y = (longer - width) // 2, (longer - height) // 2
        padded = np.empty((height + 2 * y, width + 2 * x, 3), np.uint8)
        padded[:] = fill
        padded[y : y + height, x : x + width] = picture
        picture, height, width = padded, padded.shape[0], padded.shape[1]
    if strategy == "resize-naive":
        target = size, size
    else:  # the shorter side becomes `size`, the longer one is cut
        shorter = min(height, width)
        target = (int(size * width / shorter), int(size * height / shorter))
    resized = np.asarray(image_module.fromarray(picture).resize(target, resample))
    y, x = (round((n - size) / 2) for n in resized.shape[:2])
    return np.ascontiguousarray(resized[y : y + size, x : x + size])


def centre_crop(picture: UInt8, area: float, size: int = CROPPED_SIZE) -> UInt8:
    """The middle of a picture, ``area`` of it [0..1], at size x size."""
    side = float(np.sqrt(np.float32(area)))
    y, x = (_taps(n, side, size) for n in picture.shape[:2])
    scaled = picture.astype(np.float32) * np.float32(1 / 255)
    rows = _blend(scaled, *y, axis=0)
    columns = _blend(rows, *x, axis=1)
    return np.asarray(np.clip(columns, 0, 1) * np.float32(255.5)).astype(np.uint8)


def _taps(length: int, side: float, size: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Lower and upper neighbour and the upper one's weight, for each of ``size`` samples of the middle."""
    start = np.float32((1 - side) / 2) * np.float32(length - 1)
    step = np.float32(side) * np.float32(length - 1) / np.float32(size - 1)
    at = start + np.arange(size, dtype=np.float32) * step
    low = np.floor(at).astype(np.intp)
    return low, np.minimum(low + 1, length - 1), (at - low).astype(np.float32)


def _blend(
    values: npt.NDArray[Any], low: npt.NDArray[Any], high: npt.NDArray[Any], weight: npt.NDArray[Any], axis: int
) -> npt.NDArray[Any]:
    shape = [1, 1, 1]
    shape[axis] = -1
    first, second = values.take(low, axis), values.take(high, axis)
    return np.asarray(first + (second - first) * weight.reshape(shape))
