"""Files of `torch.save`, which earlier versions and the published experiments wrote, read without torch's reader.

That one trusts the directory of the zip file and the sizes in the pickle. Here the zip file's entries are checked, and
of pickle's instructions only those are followed that make dicts, lists, numbers, strings and dense tensors.
"""

import io
import pickletools
import sys
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from apotfx.tensors import MAX_DIMENSIONS, Damaged, empty, printable

MAX_PICKLE_BYTES = 2**23
MAX_ITEMS, MAX_DEPTH = 10**6, 32
_DICT = "collections OrderedDict"
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_STORAGES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}  # fmt: skip


class PickledCode(Damaged):
    """The file asks for something to be called that makes no tensor."""


def is_torch_file(data: bytes) -> bool:
    return data[:4] == b"PK\x03\x04"


def read_torch_file(data: bytes) -> object:
    """What was saved. Tensors are on the CPU and may share memory, as when they were saved.

    Raises:
        Damaged: the file was altered or truncated, or holds something else.
    """
    try:
        archive = _Archive(data)
        content = _Interpreter(archive).run(archive.entry("data.pkl"))
        _require_tree(content)
        return content
    except Damaged:
        raise
    except Exception as error:  # zipfile and pickletools raise whatever they come upon
        raise Damaged(f"not a file of torch.save ({printable(str(error) or type(error).__name__)})") from None


def _require_tree(content: object) -> None:
    """Raises: Damaged: containers that hold themselves, or each other so often that nobody could print them; code."""
    waiting, items = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, (_Named, _Storage)):
            raise PickledCode(f"a {type(value).__name__.strip('_')} by itself")
        children = list(value.values()) if type(value) is dict else value if type(value) in (list, tuple) else ()
        items += len(children)
        if items > MAX_ITEMS or depth > MAX_DEPTH:
            raise Damaged("nested too deeply")
        waiting += ((child, depth + 1) for child in children)


class _Named(NamedTuple):
    """Something that the pickle names."""

    name: str


class _Storage(NamedTuple):
    """A storage as all of its tensors share it, [size]."""

    values: Tensor


class _Archive:
    """The entries of the zip file: stored as they are, each once, in as many bytes as there are."""

    def __init__(self, data: bytes):
        self.file = zipfile.ZipFile(io.BytesIO(data))
        entries = self.file.infolist()
        names = {entry.filename for entry in entries}
        if len(names) < len(entries) or sum(entry.file_size for entry in entries) > len(data):
            raise Damaged("the zip file's entries overlap")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise Damaged(f"the zip file's entry {printable(entry.filename)} is compressed")
        roots = [name.removesuffix("data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise Damaged("a zip file without data.pkl")
        self.root, self.storages = roots[0], {}
        if f"{self.root}byteorder" in names and self.entry("byteorder") != sys.byteorder.encode():
            raise Damaged("from a machine with another order of bytes")

    def entry(self, name: str) -> bytes:
        """Its content, whose checksum is right."""
        return self.file.read(self.root + name)

    def storage(self, dtype: torch.dtype, key: str, size: int) -> Tensor:
        """[size], whose memory all tensors of this storage share."""
        if key not in self.storages:
            self.storages[key] = bytearray(self.entry(f"data/{key}"))
        content = self.storages[key]
        if len(content) != size * dtype.itemsize:
            raise Damaged(f"storage {printable(key)} has {len(content)} bytes, expected {size} of {dtype}")
        if dtype == torch.bool and max(content, default=0) > 1:
            raise Damaged(f"storage {printable(key)} has values that are neither true nor false")
        return torch.frombuffer(content, dtype=dtype) if content else empty((0,), dtype)


class _Interpreter:
    """Follows the instructions of a pickle as `torch.save` writes them."""

    def __init__(self, archive: _Archive):
        self.archive = archive
        self.stack: list = []
        self.marked: list[list] = []
        self.memo: dict[int, object] = {}

    def run(self, pickled: bytes) -> object:
        if len(pickled) > MAX_PICKLE_BYTES:
            raise Damaged(f"data.pkl has {len(pickled)} bytes, expected at most {MAX_PICKLE_BYTES}")
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name not in _INSTRUCTIONS:
                raise PickledCode(f"pickle's instruction {opcode.name}")
            _INSTRUCTIONS[opcode.name](self, argument)
        raise Damaged("data.pkl has no end")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def push_number(self, number: int) -> None:
        if abs(number) >= 2**63:
            raise Damaged("a number of more than 64 bits")
        self.push(number)

    def mark(self, _: None) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop_marked(self) -> list:
        """What was pushed since the mark."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def pop(self, count: int) -> list:
        items = [self.stack.pop() for _ in range(count)]
        return items[::-1]

    def remember(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def append(self, values: list) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Damaged(f"something appended to a {type(target).__name__}")
        target.extend(values)

    def set_items(self, pairs: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(pairs) % 2 or not all(type(key) in (str, int) for key in pairs[::2]):
            raise Damaged(f"items of a {type(target).__name__}, or keys, that make no dict")
        target.update(zip(pairs[::2], pairs[1::2]))

    def set_attributes(self, _: None) -> None:
        """Leave them out: those of an OrderedDict are `_metadata` of a module."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise PickledCode(f"attributes of a {type(self.stack[-1]).__name__}")

    def load_storage(self, _: None) -> None:
        match self.stack.pop():
            case ("storage", _Named(name), str(key), str(_), int(size)) if name in _STORAGES:
                self.push(_Storage(self.archive.storage(_STORAGES[name], key, size)))
            case other:
                raise Damaged(f"a storage named by a {type(other).__name__}")

    def call(self, _: None) -> None:
        function, arguments = self.pop(2)
        match (function, arguments):
            case (_Named(name), ()) if name == _DICT:
                self.push({})
            case (_Named(name), (_Storage(values), int(offset), tuple(size), tuple(stride), *_)) if name == _TENSOR:
                self.push(_view(values, offset, size, stride))
            case (_Named(name), (Tensor() as tensor, *_)) if name == _PARAMETER:
                self.push(tensor)
            case (_Named(name), _) if name in (_DICT, _TENSOR, _PARAMETER):
                raise Damaged(f"what {name.split()[1]} cannot make")
            case (_Named(name), _):
                raise PickledCode(f"a call of {printable(name)}")
            case _:
                raise Damaged(f"a call of a {type(function).__name__}")


def _view(values: Tensor, offset: int, size: tuple, stride: tuple) -> Tensor:
    """Elements of the storage, each at most once.

    Raises:
        Damaged: there are more of them, or they are elsewhere.
    """
    numbers = all(type(n) is int and 0 <= n < 2**48 for n in (offset, *size, *stride))
    if not numbers or len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise Damaged("a tensor of impossible shape")
    if 0 in size:
        return empty(size, values.dtype)
    reach = 0  # of the dimensions so far, from those within others outwards
    for step, count in sorted((step, count) for step, count in zip(stride, size) if count > 1):
        if step <= reach:
            raise Damaged("a tensor whose elements overlap")
        reach += step * (count - 1)
    if offset + reach >= len(values):
        raise Damaged("a tensor beyond its storage")
    return values.as_strided(size, stride, offset)


_INSTRUCTIONS: dict[str, Callable[[_Interpreter, object], None]] = {
    "PROTO": lambda self, version: None,
    "FRAME": lambda self, size: None,
    "MARK": _Interpreter.mark,
    "EMPTY_DICT": lambda self, _: self.push({}),
    "EMPTY_LIST": lambda self, _: self.push([]),
    "EMPTY_TUPLE": lambda self, _: self.push(()),
    "TUPLE": lambda self, _: self.push(tuple(self.pop_marked())),
    "TUPLE1": lambda self, _: self.push(tuple(self.pop(1))),
    "TUPLE2": lambda self, _: self.push(tuple(self.pop(2))),
    "TUPLE3": lambda self, _: self.push(tuple(self.pop(3))),
    "NONE": lambda self, _: self.push(None),
    "NEWTRUE": lambda self, _: self.push(True),
    "NEWFALSE": lambda self, _: self.push(False),
    "GLOBAL": lambda self, name: self.push(_Named(name)),
    "APPEND": lambda self, _: self.append(self.pop(1)),
    "APPENDS": lambda self, _: self.append(self.pop_marked()),
    "SETITEM": lambda self, _: self.set_items(self.pop(2)),
    "SETITEMS": lambda self, _: self.set_items(self.pop_marked()),
    "BUILD": _Interpreter.set_attributes,
    "BINPERSID": _Interpreter.load_storage,
    "REDUCE": _Interpreter.call,
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), _Interpreter.push_number),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT"), _Interpreter.push),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Interpreter.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda self, index: self.push(self.memo[index])),
}
