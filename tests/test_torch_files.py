"""Files of `torch.save`: read as torch reads them, or refused, whatever is in them."""

import collections
import io
import os
import pickle
import struct
import warnings
import zipfile

import pytest
import torch
from torch import nn

from apotfx.tensors import Damaged
from apotfx.training.torch_files import MAX_PICKLE_BYTES, is_torch_file, read_torch_file


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(equal, a.values(), b.values()))
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)).to(memory_format=torch.channels_last)


BASE = torch.arange(12.0)
CONTENT = {
    "state": model().state_dict(),
    "views": [BASE[2:], BASE.view(3, 4).T, BASE[::3], BASE.view(2, 6)[:, 1:3]],
    "numbers": [0, 1, 255, 256, -1, 2**31, -(2**63) + 1, 2**63 - 1, 0.5, float("inf"), True, False, None],
    "texts": ["", "é", "x" * 300],
    "nested": {"a": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), 3: [[], {}]},
    "types": [torch.arange(3).to(t) for t in (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool)],
    "empty": [torch.empty(0, 3), torch.tensor(2.5), torch.empty(4)[:0]],
    "parameter": nn.Parameter(torch.ones(3)),
}


def test_a_file_is_read_as_torch_reads_it():
    data = saved(CONTENT)
    assert is_torch_file(data)
    assert equal(read_torch_file(data), torch.load(io.BytesIO(data), weights_only=True))


def test_the_optimizer_of_a_training_is_read():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net[0](torch.rand(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    read = read_torch_file(saved(optimizer.state_dict()))
    assert equal(read, optimizer.state_dict())


# The zip file.


def entries(data):
    archive = zipfile.ZipFile(io.BytesIO(data))
    return [(info, archive.read(info)) for info in archive.infolist()]


def rewritten(data, change, **options):
    """The zip file with what `change` gives for each entry, (name, content) pairs."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for info, content in entries(data):
            for name, new in change(info, content):
                archive.writestr(name, new)
    return file.getvalue()


@pytest.mark.parametrize("bit", [0x10, 0xFFFFFFFF], ids=["directory", "all"])
def test_attributes_of_entries_change_nothing(bit):
    """With the directory bit of one, torch's reader returns memory that nobody wrote as weights."""
    data = bytearray(saved(CONTENT))
    place = data.find(b"PK\1\2")
    while place >= 0:
        data[place + 38 : place + 42] = struct.pack("<I", bit)
        place = data.find(b"PK\1\2", place + 1)
    assert equal(read_torch_file(bytes(data)), torch.load(io.BytesIO(saved(CONTENT)), weights_only=True))


def in_storages(change):
    """Storages are changed, other entries not."""
    return lambda info, c: change(info.filename, c) if "/data/" in info.filename else [(info.filename, c)]


ALTERED = {
    "compressed": (None, {"compression": zipfile.ZIP_DEFLATED}, "is compressed"),
    "twice": (lambda info, c: [(info.filename, c)] * 2, {}, "the zip file's entries overlap"),
    "short": (in_storages(lambda name, c: [(name, c[:-1])]), {}, "bytes, expected"),
    "missing": (in_storages(lambda name, c: []), {}, "no item named"),
    "two roots": (lambda info, c: [(f"{root}{info.filename}", c) for root in "ab"], {}, "without data.pkl"),
    "no pickle": (lambda info, c: [(info.filename.replace(".pkl", ""), c)], {}, "without data.pkl"),
    "byte order": (
        lambda info, c: [(info.filename, b"big" if "byteorder" in info.filename else c)], {}, "another order of bytes"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "options", "message"), ALTERED.values(), ids=ALTERED)
def test_a_zip_file_that_torch_does_not_write_is_refused(change, options, message):
    with pytest.raises(Damaged, match=message):
        read_torch_file(rewritten(saved(CONTENT), change or (lambda info, c: [(info.filename, c)]), **options))


@pytest.mark.parametrize("damage", [lambda data: data[:-30], lambda data: b"PK\3\4" + bytes(100)], ids=["cut", "zeros"])
def test_what_is_no_zip_file_is_refused(damage):
    with pytest.raises(Damaged, match="not a file of torch.save"):
        read_torch_file(damage(saved(CONTENT)))


def test_every_flipped_byte_of_a_storage_is_found():
    data = saved({"x": torch.full((4,), 1.25)})
    place = data.index(struct.pack("<f", 1.25) * 4)
    for i in range(16):
        changed = bytearray(data)
        changed[place + i] ^= 1
        with pytest.raises(Damaged, match="Bad CRC"):
            read_torch_file(bytes(changed))


# The pickle.


class Calls:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


HOSTILE = {
    "code": lambda: Calls(os.mkdir, ("exploded",)),
    "code inside": lambda: {"x": [Calls(eval, ("1",))]},
    "code in a dict": lambda: Calls(dict, (), None, None, iter([("a", Calls(os.mkdir, ("exploded",)))])),
    "attributes": lambda: Calls(getattr, (torch.ones(1), "data")),
    "counter": lambda: collections.Counter("abc"),
    "module": lambda: nn.Linear(2, 2),
    "set": lambda: {1, 2},
    "bytes": lambda: b"x",
    "complex number": lambda: 2 + 3j,
    "device": lambda: torch.device("cpu"),
    "dtype": lambda: torch.float32,
    "sparse": lambda: torch.ones(2).to_sparse(),
    "compressed": lambda: torch.ones(2, 2).to_sparse_csr(),
    "meta": lambda: torch.empty(2, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "complex": lambda: torch.ones(2, dtype=torch.complex64),
    "conjugated": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "8-bit": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "subclass": lambda: nn.Buffer(torch.ones(2)),
}  # fmt: skip


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_dense_tensor_of_numbers_is_refused(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Damaged) as error:
        read_torch_file(saved(make()))
    assert str(error.value).isprintable() and os.listdir() == []


def with_pickle(pickled, content=None):
    """A file with this pickle; storages are those of `content`."""
    return rewritten(saved(content), lambda i, c: [(i.filename, pickled if i.filename.endswith("data.pkl") else c)])


def tensor_pickle(size, stride, offset="K\0", numel=b"K\4", storage=b"FloatStorage"):
    """Of a tensor in a storage of four numbers; arguments are as pickle writes them."""

    def numbers(values):
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    return (
        b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\n" + storage + b"\nX\1\0\0\0000X\3\0\0\0cpu"
        + numel + b"tQ" + offset.encode("latin1") + numbers(size) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)RtR."
    )  # fmt: skip


FOUR = torch.arange(4.0)


def test_the_handwritten_pickle_is_one():
    assert equal(read_torch_file(with_pickle(tensor_pickle([2, 2], [1, 2]), FOUR)), FOUR.view(2, 2).T)
    assert equal(read_torch_file(with_pickle(tensor_pickle([2], [1], "K\2"), FOUR)), FOUR[2:])


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (tensor_pickle([2**40], [0]), "a tensor whose elements overlap"),
        (tensor_pickle([2, 2], [1, 1]), "a tensor whose elements overlap"),
        (tensor_pickle([2, 3], [2, 1]), "a tensor whose elements overlap"),
        (tensor_pickle([2], [2**40]), "a tensor beyond its storage"),
        (tensor_pickle([2**40], [1]), "a tensor beyond its storage"),
        (tensor_pickle([4], [1], "K\1"), "a tensor beyond its storage"),
        (tensor_pickle([1], [1], "K\4"), "a tensor beyond its storage"),
        (tensor_pickle([-4], [1]), "a tensor of impossible shape"),
        (tensor_pickle([4], [-1]), "a tensor of impossible shape"),
        (tensor_pickle([2**62, 4], [1, 1]), "a tensor of impossible shape"),
        (tensor_pickle([0, 2**47, 2**47], [1, 1, 1]), "a tensor of impossible shape"),
        (tensor_pickle([4], [1, 1]), "a tensor of impossible shape"),
        (tensor_pickle([1] * 17, [1] * 17), "a tensor of impossible shape"),
        (tensor_pickle([4], [1], "\x88"), "a tensor of impossible shape"),
        (tensor_pickle([4], [1], "N"), "what _rebuild_tensor_v2 cannot make"),
        (tensor_pickle([4], [1], numel=b"K\5"), "storage 0 has 16 bytes, expected 5 of torch.float32"),
        (tensor_pickle([4], [1], storage=b"DoubleStorage"), "storage 0 has 16 bytes, expected 4 of torch.float64"),
        (tensor_pickle([16], [1], numel=b"K\x10", storage=b"BoolStorage"), "neither true nor false"),
        (tensor_pickle([4], [1], storage=b"QInt8Storage"), "a storage named by a tuple"),
    ],
)
def test_a_tensor_beyond_or_twice_in_its_storage_is_refused(pickled, message):
    with pytest.raises(Damaged, match=message):
        read_torch_file(with_pickle(pickled, FOUR))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"", "data.pkl has no end|pickle exhausted"),
        (b"\x80\2}", "pickle exhausted|no end"),
        (b"\x80\2.", "pop from empty list"),
        (b"\x80\2" + b"]q\0h\0a.", "nested too deeply"),
        (b"\x80\2" + b"]" * 100 + b"a" * 99 + b".", "nested too deeply"),
        (b"\x80\2)q\0" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(60)) + b".", "nested too deeply"),
        (b"\x80\2h\7.", "not a file of torch.save .7"),
        (b"\x80\2}]K\1s.", "that make no dict"),
        (b"\x80\2}K\1K\1K\1u.", "pop from empty list"),
        (b"\x80\2(}K\1K\1K\1u.", "not a file of torch.save|that make no dict"),
        (b"\x80\2K\1K\1a.", "something appended to a int"),
        (b"\x80\2K\1)R.", "a call of a int"),
        (b"\x80\2cposix\nsystem\nX\1\0\0\0a\x85R.", "a call of posix system"),
        (b"\x80\2ccollections\nOrderedDict\n}b.", "attributes of a _Named"),
        (b"\x80\2ccollections\nOrderedDict\nK\1\x85R.", "what OrderedDict cannot make"),
        (b"\x80\2\x8b\xff\xff\xff\x7fx.", "not a file of torch.save"),
        (b"\x80\2\x8a\x09" + bytes(8) + b"\1.", "a number of more than 64 bits"),
        (b"\x80\4\x95\xff\xff\xff\xff\xff\xff\xff\xff.", "pop from empty list"),
        (b"\x80\2(lp0\n.", "pickle's instruction LIST"),
        (b"\x80\2X\4\0\0\0\xff\xff\xff\xff.", "not a file of torch.save"),
        (b"\x80\2K\1Q.", "a storage named by a int"),
        (b"\xff", "not a file of torch.save"),
        (b"\x80\2" + b"N0" * MAX_PICKLE_BYTES + b".", "expected at most"),
    ],
    ids=range(23),
)
def test_a_pickle_that_torch_does_not_write_is_refused(pickled, message):
    data = with_pickle(pickled)
    with pytest.raises(Damaged, match=message) as error:
        read_torch_file(data)
    assert str(error.value).isprintable()


def test_a_memo_of_two_billion_costs_nothing():
    assert read_torch_file(with_pickle(b"\x80\2Nr\xff\xff\xff\x7f.")) is None


def test_torch_s_old_format_is_not_taken_for_one():
    file = io.BytesIO()
    torch.save(FOUR, file, _use_new_zipfile_serialization=False)
    assert not is_torch_file(file.getvalue()) and not is_torch_file(pickle.dumps(FOUR.tolist()))
