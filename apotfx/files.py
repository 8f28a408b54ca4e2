"""Writing files so that a crash or a full disk never destroys what was there before."""

import os
import tempfile
from pathlib import Path


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
