"""An index of action chunks by what the target saw: one ``.npz`` of plain arrays, found by cosine similarity.

Written by `vla-spec calibrate retrieval`, read by the drafter `retrieval`; refused for another model.

    keys         float16 [n, K], unit length: projected features of the last prompt row
    tokens       uint8 or uint16 [n, T]: the chunk that belongs to each key
    mean         float32 [D], projection float32 [D, K]: features -> key
    model_hash   one string, sha256 of the weights that made the features
    about        one string, JSON: where the entries come from

The nearest neighbours of one query among n keys are one matrix-vector product: 0.03 ms for a thousand keys of 64
numbers and 0.12 ms for ten thousand on one x86 core, so that an approximate search would gain nothing at this size.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_spec.atomic import replacing
from vla_spec.errors import BadModel
from vla_spec.types import Float32, Int32

_HOW = "`vla-spec calibrate retrieval --out FILE` writes one"
_NAMES = {"keys", "tokens", "mean", "projection", "model_hash", "about"}


@dataclass(frozen=True, slots=True)
class RetrievalIndex:
    """Chunks by key.

    Attributes:
        keys: float32 [n, K], unit length.
        tokens: int32 [n, T].
        mean, projection: float32 [D] and [D, K].
        model_hash: of the target whose features are the keys.
        about: where the entries come from.
    """

    keys: Float32
    tokens: Int32
    mean: Float32
    projection: Float32
    model_hash: str
    about: dict[str, Any]

    @staticmethod
    def from_features(
        features: Float32, tokens: Int32, key_size: int, model_hash: str, about: dict[str, Any]
    ) -> RetrievalIndex:
        """Keys are the ``key_size`` principal components of the features, to unit length.

        Args:
            features: float32 [n, D], of the last prompt row.
            tokens: int32 [n, T].
            key_size: K, at most min(n, D).
            model_hash: of the target.
            about: plain values.
        """
        mean = features.mean(axis=0).astype(np.float32)
        axes = np.linalg.svd(features - mean, full_matrices=False)[2][:key_size]  # [K, D]
        projection = np.ascontiguousarray(axes.T.astype(np.float32))
        index = RetrievalIndex(np.empty((0, len(axes)), np.float32), tokens, mean, projection, model_hash, about)
        keys = np.stack([index.key(row) for row in features])
        return RetrievalIndex(keys, tokens.astype(np.int32), mean, projection, model_hash, about)

    def key(self, features: Float32) -> Float32:
        """float32 [D] -> float32 [K], unit length."""
        projected = (features - self.mean) @ self.projection
        length = np.float32(np.sqrt(projected @ projected))
        return np.asarray(projected / max(length, np.float32(1e-12)), np.float32)

    def nearest(self, features: Float32, count: int) -> tuple[Int32, Float32]:
        """Entries most like these features, best first: numbers int32 [<= count] and similarities float32, in [-1, 1].

        The query is one row of D features of the target.
        """
        similarity = self.keys @ self.key(features)  # [n]
        count = min(count, len(similarity))
        best = np.argpartition(-similarity, count - 1)[:count] if count < len(similarity) else np.arange(count)
        best = best[np.argsort(-similarity[best], kind="stable")]
        return best.astype(np.int32), similarity[best]

    def save(self, path: Path) -> None:
        """Write the file, atomically."""
        narrow = np.uint8 if int(self.tokens.max(initial=0)) < 256 else np.uint16
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file, keys=self.keys.astype(np.float16), tokens=self.tokens.astype(narrow), mean=self.mean,
                projection=self.projection, model_hash=np.array(self.model_hash),
                about=np.array(json.dumps(self.about)),
            )  # fmt: skip

    @staticmethod
    def load(path: Path) -> RetrievalIndex:
        """Read and check.

        Raises:
            BadModel: no such file, cut off, or arrays that contradict each other.
        """
        try:
            # From memory: the archive reader leaves a broken file open.
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except FileNotFoundError:
            raise BadModel(f"{path}: no such file; {_HOW}") from None
        except (ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise BadModel(f"{path}: not a .npz of plain arrays, or cut off ({error}); {_HOW}") from None
        if set(arrays) != _NAMES:
            raise BadModel(f"{path}: has {sorted(arrays)}, an index has {sorted(_NAMES)}; {_HOW}")
        keys, tokens = arrays["keys"].astype(np.float32), arrays["tokens"].astype(np.int32)
        mean, projection = arrays["mean"].astype(np.float32), arrays["projection"].astype(np.float32)
        fits = (
            keys.ndim == tokens.ndim == projection.ndim == 2
            and len(keys) == len(tokens) > 0
            and projection.shape == (*mean.shape, keys.shape[1])
        )
        if not fits or not all(np.isfinite(array).all() for array in (keys, mean, projection)):
            raise BadModel(
                f"{path}: keys {keys.shape}, tokens {tokens.shape}, projection {projection.shape} don't fit, or are "
                f"not finite; {_HOW}"
            )
        about = json.loads(str(arrays["about"]))
        return RetrievalIndex(keys, tokens, mean, projection, str(arrays["model_hash"]), about)
