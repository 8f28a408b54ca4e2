"""The arguments of the tools: types for argparse, each of which takes a text, and what may be chosen from."""

import argparse
import contextlib
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

# What the library takes, whose import takes seconds; tests/test_command_line.py compares.
SCHEMES = ("apot", "pot", "uniform")
BITS = range(2, 9)
FLOAT_BITS = 32
DATASETS = ("mnist", "fashion-mnist", "cifar10", "folder", "digits")
RECIPES = ("published", "default", "best")
CALIBRATIONS = ("mse", "minmax", "percentile", "paper")
ENGINES = ("int8", "compiled", "eager")
BACKENDS = ("reference", "onednn")

LONGEST_VALUE = 60


def _refuse(text: str, expected: str) -> argparse.ArgumentTypeError:
    shown = text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
    return argparse.ArgumentTypeError(f"got {shown!r}, expected {expected}")


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """A whole number in decimal digits."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,30}", text) or int(text) < least:
            raise _refuse(text, f"a whole number of at least {least}")
        if int(text) > most:
            raise _refuse(text, f"a whole number of at most {most}")
        return int(text)

    return parse


count, positive = whole(0), whole(1)
seed = whole(0, 2**63 - 1)


def _number(expected: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if math.isfinite(float(text)) and fits(float(text)):
                return float(text)
        raise _refuse(text, expected)

    return parse


above_0 = _number("a finite number above 0", lambda x: x > 0)
factor = _number("a finite number of at least 0", lambda x: x >= 0)
share = _number("a number from 0 to 1", lambda x: 0 <= x <= 1)
decay = _number("a number of at least 0 and below 1", lambda x: 0 <= x < 1)
percent = _number("a number above 0, up to 100", lambda x: 0 < x <= 100)


def name(text: str) -> str:
    """Of anything."""
    if not text or "\0" in text:
        raise _refuse(text, "a name")
    return text


def path(text: str) -> Path:
    return Path(name(text))


def output(text: str) -> Path:
    """The name of a file to write. What is no file, such as /dev/null, would be replaced by one."""
    found = path(text)
    if os.path.lexists(found) and not found.is_file():
        raise _refuse(text, "the name of a file, or a new one")
    return found


def one_of(known: Sequence) -> Callable[[str], object]:
    """An element of `known`, as its text."""

    def parse(text: str) -> object:
        found = [name for name in known if str(name) == text]
        if not found:
            raise _refuse(text, f"one of {', '.join(map(str, known))}")
        return found[0]

    return parse


def several(parse: Callable[[str], object]) -> Callable[[str], list]:
    """A list with commas, each element once."""

    def parse_all(text: str) -> list:
        if not all(text.split(",")):
            raise _refuse(text, "a list such as a,b")
        return list(dict.fromkeys(map(parse, text.split(","))))

    return parse_all


def some_of(known: Sequence) -> Callable[[str], list]:
    return several(one_of(known))


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sizes(text: str) -> tuple[int, ...]:
    """Sizes of at least 1, such as 3,224,224."""
    return tuple(positive(part) for part in text.split(","))
