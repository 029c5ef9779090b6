"""Where the quantised form of a graph lies: ``decoder.int8.onnx`` beside ``decoder.onnx``, for every runtime."""

from __future__ import annotations

from pathlib import Path

from vla_spec.engines._model_files import DECODER_GRAPH
from vla_spec.errors import BadModel


def int8_graph(file: Path) -> Path:
    """The quantised graph beside ``file``; ``file`` itself where there is none, as for most drafters."""
    quantised = file.with_name(f"{file.stem}.int8{file.suffix}")
    return quantised if quantised.is_file() else file


def require_int8(model_dir: Path) -> None:
    """Refuse to call something int8 that is not.

    Raises:
        BadModel: the folder has no quantised decoder.
    """
    decoder = model_dir / DECODER_GRAPH
    if int8_graph(decoder) == decoder:
        raise BadModel(f"{model_dir}: no {decoder.stem}.int8.onnx; `vla-spec quantise` writes it")
