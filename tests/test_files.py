"""Writing that a kill, a full disk or another process cannot harm."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from apotfx import files
from apotfx.errors import ApotfxError
from apotfx.files import locked, read_file, remove_temporaries, write_atomic, write_directory

# Of the package only what is needed, without torch.
IMPORTS = f"""
import os, signal, sys, types
from pathlib import Path
sys.modules["apotfx"] = types.ModuleType("apotfx")
sys.modules["apotfx"].__path__ = [{str(Path(files.__file__).parent)!r}]
from apotfx import files
"""


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def killed(code, *args):
    """Run `code` in a process that kills itself."""
    done = subprocess.run([sys.executable, "-c", IMPORTS + code, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


KILL = "lambda *args: os.kill(os.getpid(), signal.SIGKILL)"


def test_files_and_directories_follow_the_umask(tmp_path, umask):
    write_atomic(tmp_path / "file", b"x")
    write_atomic(tmp_path / "private", b"x", mode=0o600)
    write_directory(tmp_path / "folder", {"a": b"1"})
    assert [mode(tmp_path / name) for name in ("file", "private", "folder", "folder/a")] == [0o640, 0o600, 0o750, 0o640]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path, call):
    (tmp_path / "file").write_bytes(b"old")
    killed(f"os.{call} = {KILL}\nfiles.write_atomic(sys.argv[1], b'new')", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old" and len(os.listdir(tmp_path)) == 2
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_of_a_directory_leaves_is_removed_by_the_next(tmp_path):
    killed(f"os.rename = {KILL}\nfiles.write_directory(Path(sys.argv[1]), {{'a': b'1'}})", tmp_path / "folder")
    assert len(os.listdir(tmp_path)) == 1
    write_directory(tmp_path / "folder", {"a": b"2"})
    assert os.listdir(tmp_path) == ["folder"] and (tmp_path / "folder" / "a").read_bytes() == b"2"


def test_temporaries_of_a_living_process_and_files_of_others_stay(tmp_path, monkeypatch):
    mine = [".file.backup.tmp", "file.0123.apotfx-tmp", ".file"]
    for name in mine:
        (tmp_path / name).touch()
    replace = os.replace

    def write_another_first(source, target):
        monkeypatch.setattr(os, "replace", replace)
        remove_temporaries(tmp_path)
        write_atomic(tmp_path / "file", b"another")
        replace(source, target)

    monkeypatch.setattr(os, "replace", write_another_first)
    write_atomic(tmp_path / "file", b"one")
    assert (tmp_path / "file").read_bytes() == b"one"
    assert sorted(os.listdir(tmp_path)) == sorted([*mine, "file"])


def test_a_failed_write_leaves_no_temporary(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").touch()
    with pytest.raises(OSError, match="what was there before is kept: '.*folder'"):
        write_atomic(tmp_path / "folder", b"x")
    with pytest.raises(OSError, match="not empty"):
        write_directory(tmp_path / "folder", {"b": b"x"})
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["a"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to null").symlink_to("/dev/null")
    (tmp_path / "to nowhere").symlink_to("nowhere")
    (tmp_path / "to itself").symlink_to("to itself")
    (tmp_path / "folder").mkdir()
    before = sorted(os.listdir(tmp_path))
    for name in before:
        kind = stat.S_IFMT((tmp_path / name).lstat().st_mode)
        with pytest.raises(FileExistsError, match=f"is not a file; what was there before is kept: '.*{name}'"):
            write_atomic(tmp_path / name, b"x")
        assert stat.S_IFMT((tmp_path / name).lstat().st_mode) == kind
    assert sorted(os.listdir(tmp_path)) == before


def test_a_name_as_long_as_the_file_system_allows_is_written(tmp_path):
    write_atomic(tmp_path / ("é" * 127), b"x")
    assert os.listdir(tmp_path) == ["é" * 127]


def test_a_lock_is_held_by_one_and_dies_with_its_process(tmp_path):
    with locked(tmp_path / "lock") as held, locked(tmp_path / "lock") as again:
        assert held and not again
    killed(f"files.locked(Path(sys.argv[1])).__enter__()\n({KILL})()", tmp_path / "lock")
    with locked(tmp_path / "lock") as held:
        assert held
        (tmp_path / "lock").unlink()
        with locked(tmp_path / "lock") as another:  # of another file
            assert another


def test_only_regular_files_of_a_sensible_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"12345")
    assert read_file(tmp_path / "file", max_bytes=5) == b"12345"
    for path, message in (
        (tmp_path / "pipe", "is not a file"),
        ("/dev/zero", "is not a file"),
        (tmp_path, "is not a file"),
        (tmp_path / "missing", "cannot be read .No such file"),
        ("nul\0", "cannot be read .embedded null byte"),
    ):
        with pytest.raises(ApotfxError, match=message):
            read_file(path, max_bytes=5)
    with pytest.raises(ApotfxError, match="has 5 bytes, expected at most 4"):
        read_file(tmp_path / "file", max_bytes=4)
