"""A process that has imported everything, and forks others that train until they are killed.

    python killing_helpers.py

reads a JSON object from each line of its input: "directory" to run in, "flags" of tools/train.py, and "point", the
number of the call that writes something before which the process kills itself, or "seconds" after which it is killed.
It answers with the exit code, and how many such calls there were; what was printed is in the file "log" there.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
WRITES = ("mkdir", "replace", "rename", "unlink", "fsync", "link", "rmdir")


class Server:
    """Talks to one, started for as long as the block lasts."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def train(self, directory: Path, *flags, point: int | None = None, seconds: float | None = None) -> tuple[int, int]:
        """(exit code, calls that write) of a training, which is over."""
        order = {"directory": str(directory), "flags": list(map(str, flags)), "point": point, "seconds": seconds}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))


@contextmanager
def server():
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}"}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        try:
            yield Server(process)
        finally:
            process.stdin.close()


def kill_at(point: int | None, count: list[int]) -> None:
    """Count calls that write; before the one with number `point`, which writes half a file if it is fsync, die."""

    def counted(name: str, function):
        def call(*args, **kwargs):
            if count[0] == point:
                if name == "fsync" and os.path.isfile(f"/proc/self/fd/{args[0]}"):
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return function(*args, **kwargs)

        return call

    for name in WRITES:
        setattr(os, name, counted(name, getattr(os, name)))
    os_open = os.open

    def counted_open(path, flags, *args, **kwargs):
        function = counted("open", os_open) if flags & os.O_CREAT else os_open
        return function(path, flags, *args, **kwargs)

    os.open = counted_open


def child(order: dict, pipe: int) -> None:
    count = [0]
    code = 99
    try:
        os.chdir(order["directory"])
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for number in (1, 2):
            os.dup2(log, number)
        kill_at(order["point"], count)
        code = sys.modules["train"].main(order["flags"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(pipe, json.dumps(count[0]).encode())
        os._exit(code)


def main() -> None:
    import torch
    import train

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(order, write_end)
        os.close(write_end)
        if order["seconds"] is not None:
            time.sleep(order["seconds"])
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        count = os.read(read_end, 100)
        os.close(read_end)
        print(json.dumps([os.waitstatus_to_exitcode(status), json.loads(count or b"0")]), flush=True)


if __name__ == "__main__":
    main()
