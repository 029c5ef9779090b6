"""Model folders are written whole: beside their place first, then moved into it, a manifest last.

An export that fails or is killed while it writes changes nothing. A model that is half moved is no model: the old
engine.json goes first, the new one comes after all that it describes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vla_spec.engines._model_files import DESCRIPTION
from vla_spec.engines._model_manifest import MANIFEST, PATTERNS, write_manifest
from vla_spec.errors import BadConfig

#: Moved at the end, in this order.
LAST = (DESCRIPTION, MANIFEST)


def check_free(out: Path, force: bool) -> None:
    """Raises BadConfig if an export to ``out`` would replace a model that nobody said may be replaced."""
    if out.exists() and not out.is_dir():
        raise BadConfig(f"--out {out}: is a file; name a folder")
    there = sorted(path.name for pattern in PATTERNS for path in out.glob(pattern))
    if there and not force:
        raise BadConfig(
            f"--out {out}: holds a model already ({', '.join(there[:3])}{' …' if len(there) > 3 else ''}); valid: a "
            f"new folder, or --force to replace it"
        )


@contextmanager
def writing(out: Path, command: str = "", force: bool = False) -> Iterator[Path]:
    """A folder to write a model into; what is in it takes its place in ``out`` at the end. Other files of ``out`` stay.

    Args:
        out: the model folder; made if it is not there.
        command: that makes it, for the manifest.
        force: files may be replaced.

    Raises:
        BadConfig: ``out`` holds a model and ``force`` is not given, or it can't be written to: no room, no permission.
    """
    check_free(out, force)
    out = out.resolve()  # through a link: the folders must lie on the same disk
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    is_moving = False
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for description in list(temporary.rglob(DESCRIPTION)):
            write_manifest(description.parent, command)
        files = _in_moving_order(temporary)
        for file in files:
            _flush(temporary / file)
        is_moving = True
        for file in files:
            if file.name == DESCRIPTION:  # whoever loads the folder from here on finds no model or a whole one
                (out / file).unlink(missing_ok=True)
        for file in files:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            (temporary / file).replace(out / file)
    except OSError as error:
        what = "it is replaced in part, export it again" if is_moving else "nothing was changed"
        raise BadConfig(
            f"--out {out}: can't be written ({error.strerror or error}); {what}; free some space or name another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _in_moving_order(folder: Path) -> list[Path]:
    """Relative paths: of a model inside the model first; descriptions after what they describe."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(files, key=lambda path: (-len(path.parts), LAST.index(path.name) + 1 if path.name in LAST else 0))


def _flush(file: Path) -> None:
    """Its bytes are on the disk: a full one is found out now and not after the move."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
