"""Writing files so that a crash or a full disk never destroys what was there before."""

import os
import shutil
import tempfile
from pathlib import Path

from .errors import ApotfxError


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to a temporary name beside `path`, flush it to disk, rename it over `path`.

    Raises:
        OSError: the write failed (disk full, no permission), with `path`, which is then as it was before.
    """
    path = Path(path)
    try:
        _write_and_rename(path, data)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; what was there before is kept", str(path)) from error


def _write_and_rename(path: Path, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def require_new(path: Path) -> None:
    """Raises: ApotfxError: there is something at `path`, where an export is to be written."""
    if os.path.lexists(path):
        raise ApotfxError(f"export {path}: exists already; choose another path or remove it")


def write_directory(path: Path, files: dict[str, bytes]) -> None:
    """Write `files`, contents by name, to a temporary directory beside `path`, which is new, and rename that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        temporary.chmod(0o755)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
