"""Files and directories written whole or not at all: a crash, a kill or a full disk leaves what was there before."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ApotfxError

_SUFFIX = ".apotfx-tmp"
_MAX_PREFIX = 200  # bytes of a name that its temporary's repeats; file systems allow 255


def read_file(path: str | os.PathLike, *, max_bytes: int) -> bytes:
    """The content of a regular file: a pipe or a device would be waited for, or never end.

    Raises:
        ApotfxError: not a regular file, more than `max_bytes`, or cannot be read; names `path`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ApotfxError(f"{path}: is not a file; expected one to read")
            if status.st_size > max_bytes:
                raise ApotfxError(f"{path}: has {status.st_size} bytes, expected at most {max_bytes}")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(status.st_size)
        finally:
            os.close(descriptor)
    except ApotfxError:
        raise
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a NUL in the path
        raise ApotfxError(f"{path}: cannot be read ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def write_atomic(path: str | os.PathLike, data: bytes, mode: int = 0o666) -> None:
    """Write `data` to a temporary name beside `path`, flush it to disk, rename it over `path`.

    Args:
        mode: of the file, less the process's umask.

    Raises:
        OSError: the write failed (disk full, no permission), or `path` is a directory, a pipe or a device such as
            /dev/null, which root would replace; with `path`, which is then as it was before.
    """
    path = Path(path)
    try:
        if os.path.lexists(path) and not os.path.isfile(path):
            raise FileExistsError(errno.EEXIST, "is not a file")
        with _temporary_beside(path, mode) as (temporary, descriptor):
            with open(descriptor, "wb", closefd=False) as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
            _flush_directory(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; what was there before is kept", str(path)) from error


def require_new(path: Path) -> None:
    """Raises: ApotfxError: there is something at `path`, where an export is to be written."""
    if os.path.lexists(path):
        raise ApotfxError(f"export {path}: exists already; choose another path or remove it")


def write_directory(path: Path, files: dict[str, bytes]) -> None:
    """Write `files`, contents by name, to a temporary directory beside `path`, which is new, and rename that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_beside(path, None) as (temporary, descriptor):
        for name, content in files.items():
            with open(temporary / name, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        os.fsync(descriptor)
        temporary.rename(path)
        _flush_directory(path.parent)


def remove_temporaries(directory: Path, prefix: str = ".") -> None:
    """Remove from `directory` what processes that were killed left of their writing: what none that lives has locked.

    Args:
        prefix: of the names to look at.
    """
    for name in os.listdir(directory):
        if name.startswith(prefix) and name.startswith(".") and name.endswith(_SUFFIX):
            with contextlib.suppress(OSError):
                descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(directory / name)
                finally:
                    os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds the lock file `path`, which is made, for as long as the block or the process lives.

    Yields:
        False if another process holds it.
    """
    descriptor = _open_lock(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open_lock(path: Path) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        if not _lock(descriptor):
            os.close(descriptor)
            return None
        if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
        os.close(descriptor)  # its holder removed it between the two calls


def _lock(descriptor: int) -> bool:
    """False if another has locked it. On a file system that has no locks nobody has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def _temporary_beside(path: Path, mode: int | None) -> Iterator[tuple[Path, int]]:
    """A new file, or directory where `mode` is None, that is removed if it still has its name at the end.

    It is locked, by which others know that its process lives.
    """
    prefix = os.fsdecode(os.fsencode(f".{path.name}")[:_MAX_PREFIX]) + "."
    remove_temporaries(path.parent, prefix)
    temporary, descriptor = _make_temporary(path.parent, prefix, mode)
    try:
        yield temporary, descriptor
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(temporary)
        raise
    finally:
        os.close(descriptor)


def _make_temporary(directory: Path, prefix: str, mode: int | None) -> tuple[Path, int]:
    while True:
        temporary = directory / f"{prefix}{secrets.token_hex(4)}{_SUFFIX}"
        try:
            if mode is None:
                temporary.mkdir()
                descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            else:
                descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except FileExistsError:
            continue
        except FileNotFoundError:
            if mode is None and directory.is_dir():
                continue  # taken for a dead process's before it could be locked
            raise
        if _lock(descriptor) and os.path.exists(temporary):
            return temporary, descriptor
        os.close(descriptor)  # as above


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _flush_directory(path: Path) -> None:
    """So that a renamed file has its new name after a power failure, too; not all file systems can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
