"""A folder of compiled kernels that outlives the process."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

_DIGEST_BYTES = hashlib.sha256().digest_size


def folder() -> Path:
    """XSHARE_CACHE, or xshare-trtllm in XDG_CACHE_HOME or ~/.cache; without a home the temporary folder."""
    named = os.environ.get("XSHARE_CACHE")
    if named:
        return Path(named)
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # neither HOME nor an entry in the system's list of users
        return Path(tempfile.gettempdir()) / f"xshare-trtllm-{os.getuid()}"
    return caches / "xshare-trtllm"


def get_or_make(name: str, make: Callable[[], bytes]) -> bytes:
    """What is stored under `name`, or what `make` gives, stored for the next time.

    Processes that make the same at once both succeed; a file that is damaged is made again; where nothing can
    be stored (a full disk, a read-only home) it says so once and goes on.
    """
    path = folder() / name
    stored = _read(path)
    if stored is not None:
        return stored
    made = make()
    try:
        _write(path, made)
    except OSError as error:
        warnings.warn(
            f"compiled kernels are not kept in {folder()} ({error.strerror}): every process makes them anew. "
            "Name a folder in XSHARE_CACHE.",
            RuntimeWarning,
            stacklevel=2,
        )
    return made


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, stored = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return stored if hashlib.sha256(stored).digest() == digest else None


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(aside, path)
    except OSError:
        Path(aside).unlink(missing_ok=True)
        raise
