"""CurveZMQ keys: made, kept from other users' eyes, read. The files are ZeroMQ's own certificates.

``NAME.key`` holds a public key and may be given to anyone; ``NAME.key_secret`` holds both and is its owner's alone: it
is written with mode 0600, and refused if others may read it. Who holds which secret key is proved by the handshake;
after it everything is encrypted (CurveZMQ, rfc.zeromq.org/spec/26).
"""

from __future__ import annotations

import re
import shutil
import stat
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import zmq
import zmq.auth

from vla_spec.errors import BadConfig

PUBLIC_SUFFIX, SECRET_SUFFIX = ".key", ".key_secret"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_Z85_BYTES = 40


class KeyPair(NamedTuple):
    """Both keys in Z85, 40 bytes each."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        """The public half only: this ends up in logs."""
        return f"KeyPair(public={self.public!r})"


class ServerKeys(NamedTuple):
    """What a server needs: its own pair, and public key -> name of every client that may come."""

    own: KeyPair
    clients: dict[bytes, str]


class ClientKeys(NamedTuple):
    """What a client needs: its own pair, and the public key of the server that it trusts."""

    own: KeyPair
    server: bytes


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a key pair. Returns both files, public and secret.

    Raises:
        BadConfig: a name that is no file name, files that exist, or a folder that can't be written.
    """
    if not _NAME.fullmatch(name):
        raise BadConfig(f"key name {name!r}; valid: letters, digits, _ . and -, at most 64")
    if not zmq.has("curve"):
        raise BadConfig("keys: this build of ZeroMQ has no CURVE; install pyzmq from a wheel")
    public, secret = folder / f"{name}{PUBLIC_SUFFIX}", folder / f"{name}{SECRET_SUFFIX}"
    for path in (public, secret):
        if path.exists():
            raise BadConfig(f"{path} exists; valid: another name or folder, keys are never overwritten")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        private = Path(tempfile.mkdtemp(prefix=".keys-", dir=folder))  # mode 0700: nobody sees what is in the making
        try:
            for made, path, mode in zip(
                zmq.auth.create_certificates(private, name), (public, secret), (0o644, 0o600), strict=True
            ):
                Path(made).chmod(mode)
                Path(made).replace(path)
        finally:
            shutil.rmtree(private, ignore_errors=True)
    except OSError as error:
        raise BadConfig(f"keys in {folder}: can't be written ({error.strerror}); name another folder") from None
    return public, secret


def read_pair(path: Path) -> KeyPair:
    """A secret key file.

    Raises:
        BadConfig: missing, no secret key in it, or readable by others.
    """
    public, secret = _read(path)
    if secret is None:
        raise BadConfig(f"{path}: holds no secret key; valid: a file that ends in {SECRET_SUFFIX}")
    if sys.platform != "win32" and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise BadConfig(f"{path}: others may read it (mode {stat.filemode(path.stat().st_mode)}); chmod 600 {path}")
    return KeyPair(public, secret)


def read_public(path: Path) -> bytes:
    """A public key file.

    Raises:
        BadConfig: missing, or no key in it.
    """
    return _read(path)[0]


def read_clients(folder: Path) -> dict[bytes, str]:
    """Public key -> name, of all ``*.key`` in a folder.

    Raises:
        BadConfig: no such folder, or no key in it.
    """
    clients = {read_public(path): path.stem for path in sorted(folder.glob(f"*{PUBLIC_SUFFIX}"))}
    if not clients:
        raise BadConfig(f"{folder}: no client's key in it; valid: a folder with the *{PUBLIC_SUFFIX} of all clients")
    return clients


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError):
        raise BadConfig(f"{path}: can't be read as a key; `vla-spec keys NAME` makes one") from None
    for key in (public, secret):
        if key is not None and len(key) != _Z85_BYTES:
            raise BadConfig(f"{path}: a key of {len(key)} characters; valid: {_Z85_BYTES}")
    return public, secret
