"""What the tools share: how they read their command line, and how they end whatever happens.

It imports nothing that takes time: `--help`, and what is wrong with a command line, are told before torch is imported.
"""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

LONGEST_MESSAGE = 1000


class Mistake(Exception):
    """A command line that cannot be read."""


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str):
        raise Mistake(f"{message}; see --help")


def run_tool(module: str, parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Read the command line, then import `module` and call its `run` with what was read.

    Args:
        argv: None for that of this process. `run` finds it in its argument too.

    Returns:
        The exit code: what `run` returns, with 0 for None; 2 for a user's mistake, a failing disk or an output that
        nobody reads; 130 where Ctrl-C or a signal stopped it.
    """
    if hasattr(sys.stdout, "reconfigure"):  # names of files may be no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            args = parser.parse_args(argv)
            args.argv = sys.argv[1:] if argv is None else list(argv)
            return importlib.import_module(module).run(args) or 0
        finally:
            _flush_output()
    except KeyboardInterrupt as stop:
        message, code = str(stop) or "stopped", 130
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        message, code = f"{parser.prog}: error: {message}", 2
    if os.environ.get("RANK", "0") == "0":  # one of the processes that torchrun started will do
        with contextlib.suppress(OSError):
            print(one_line(message), file=sys.stderr, flush=True)
    return code


def _flush_output() -> None:
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        # Python would try again at its end, and fail with other words and another exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _explain(error: Exception) -> str | None:
    """What to tell the user; None for a defect of the program, which shows its traceback."""
    if isinstance(error, BrokenPipeError):
        return "its output is not read to the end"
    if isinstance(error, (Mistake, OSError)):
        return str(error)
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in text:
        return f"not enough memory ({text or 'MemoryError'}); take smaller images, batches or networks"
    from apotfx.errors import ApotfxError

    return text if isinstance(error, ApotfxError) else None


def one_line(text: str) -> str:
    """`text` as one line that any terminal can show, with the middle left out if it is very long."""
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = LONGEST_MESSAGE // 2
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"
