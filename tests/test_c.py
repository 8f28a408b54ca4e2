import functools
import os
import re
import shutil
import struct
import subprocess

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import fx, nn

from apotfx import ApotfxError, BitPolicy, Rule, calibrate, export_integer, load_integer, quantize
from apotfx.integer.c import export_c
from apotfx.integer.layers import IntegerLayer
from apotfx.models import build_model
from apotfx.training.data import Split, eval_batches, load_dataset

COMPILER = os.environ.get("CC", "").split() or [c for c in map(shutil.which, ("cc", "gcc", "clang")) if c][:1]
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
SANITIZED = ("-O1", "-fsanitize=undefined,address", "-fno-sanitize-recover=all")
MULTIPLY = "-DAPOTFX_MULTIPLY"


@functools.cache
def compiles(*flags):
    if not COMPILER:
        return False
    return not call(
        *COMPILER, *flags, "-x", "c", "-", "-o", os.devnull, input="int main(void) { return 0; }"
    ).returncode


def call(*command, **options):
    return subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, **options)


def needs_flags(*flags):
    return pytest.mark.skipif(not compiles(*flags), reason=f"no C compiler, or none that takes {' '.join(flags)}")


needs_compiler = needs_flags("-std=c99")
needs_sanitizers = needs_flags(*SANITIZED)


def compiled(directory, *flags):
    program = directory / "network"
    result = call(*COMPILER, *flags, directory / "network.c", directory / "main.c", "-o", program)
    assert (result.returncode, result.stderr) == (0, "")
    return program


def idx(values):
    """A uint8 tensor in the format of MNIST's files."""
    return struct.pack(f">{1 + values.dim()}I", 0x800 + values.dim(), *values.shape) + values.numpy().tobytes()


class Trace(fx.Interpreter):
    """The accumulators of every layer and the outputs, flat, by the names that main.c prints."""

    def run_node(self, n):
        result = super().run_node(n)
        layer = self.submodules.get(n.target) if n.op == "call_module" else None
        if isinstance(layer, IntegerLayer):
            (x,) = self.fetch_args_kwargs_from_env(n)[0]
            self.traced[n.name] = layer.codes_and_accumulators(x)[1].flatten().tolist()
        return result

    def __call__(self, x):
        self.traced = {}
        output = self.run(x)
        return self.traced | {"output": output.flatten().tolist()}


def traced(program, path, number):
    result = call(program, path, "--trace", number)
    assert (result.returncode, result.stderr) == (0, "")
    found = {}
    for line in result.stdout.splitlines():
        name, index, value = line.split()
        values = found.setdefault(name, [])
        assert int(index) == len(values)
        values.append(float.fromhex(value) if name == "output" else int(value))
    return found


@torch.no_grad()
def check_equal(program, network, images, inputs, tmp_path, count):
    """The program against the reference: all predictions and, of the first `count` images, all numbers.

    images: uint8 [N, H, W] or [N, C, H, W]; inputs: the same, normalized, [N, C, H, W].
    """
    path, labels = tmp_path / "images", tmp_path / "labels"
    path.write_bytes(idx(images))
    logits = network(inputs)
    assert logits.isfinite().all() and len(logits.unique(dim=0)) > 1
    predictions = logits.argmax(1)
    labels.write_bytes(idx((predictions + (torch.arange(len(images)) < 3)).to(torch.uint8)))  # three are wrong
    result = call(program, path, labels)
    assert (result.returncode, result.stderr) == (0, "")
    *printed, accuracy = result.stdout.splitlines()
    assert list(map(int, printed)) == predictions.tolist()
    right = len(images) - 3
    assert accuracy == f"accuracy {100 * right / len(images):.2f}% ({right} of {len(images)})"
    assert call(program, path).stdout.splitlines() == printed
    for number in range(count):
        expected = Trace(network)(inputs[number : number + 1])
        assert len(expected) > 1 and traced(program, path, number) == expected


# Small networks of every operation.


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.strided = nn.Conv2d(2, 6, (3, 5), stride=(2, 1), padding=(1, 2))
        self.bn = nn.BatchNorm2d(6)
        self.grouped = nn.Conv2d(6, 4, 3, padding=2, dilation=2, groups=2)
        self.same = nn.Conv2d(4, 4, (2, 4), padding="same", bias=False)  # more at the end than at the beginning
        self.depthwise = nn.Conv2d(4, 8, 3, groups=4)
        self.wide = nn.Conv2d(8, 5, 1, padding=1)  # a border of padding only
        self.idle = nn.Conv2d(5, 5, 5, stride=3, padding=4, dilation=2)  # taps that meet no input

    def forward(self, x):
        x = self.same(self.grouped(self.bn(self.strided(x))))
        return self.idle(self.wide(self.depthwise(x))).mean((2, 3))


class Residual(nn.Module):
    """Activation functions that a layer absorbs and others, in place and not; a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.relu6 = nn.ReLU6()
        self.conv3 = nn.Conv2d(4, 4, 1)
        self.shared = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 3)
        for bn in (self.bn1, self.bn2):
            nn.init.constant_(bn.weight, 8.0)  # for values beyond 6

    def forward(self, x):
        x = self.relu6(self.bn1(self.conv1(x)))
        y = self.conv3(self.relu6(self.bn2(self.conv2(x))))
        y += x
        z = self.relu(y)
        x = self.shared(self.shared(z + y))  # y is what the ReLU made of it
        return self.fc(self.pool(x).flatten(1))


class Pools(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.max = nn.MaxPool2d(2, stride=(1, 2), padding=1, dilation=(5, 1), ceil_mode=True)
        self.average = nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.inside = nn.AvgPool2d((2, 3), stride=1, padding=1, count_include_pad=False)
        self.last = nn.Conv2d(4, 3, 2)
        self.dropout = nn.Dropout(inplace=True)

    def forward(self, x):
        x = self.conv(x)
        x = self.max(x) + self.dropout(self.inside(F.max_pool2d(x, 2, padding=1)))
        x = F.dropout(self.average(x.contiguous()), training=self.training)
        copy = x.clone()
        return self.last(copy.relu_() + x).mean((-1, -2))


class Perceptron(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Flatten(), nn.Linear(288, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Identity(), nn.Linear(12, 4)
        )


class Normalized(nn.Sequential):
    """Ends with the step that compilers would fuse."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(288, 12, bias=False), nn.BatchNorm1d(12))
        self[2].running_mean.uniform_(-1, 1)


def images(count=6):
    return torch.randint(256, (count, 2, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


METADATA = {"mean": [0.4, 0.5], "std": [0.3, 0.25], "arch": "a */ net"}
INPUT_SHAPE = (2, 12, 12)


def normalized(images, mean, std):
    split = Split(images, torch.zeros(len(images)))
    options = {"mean": mean, "std": std, "image_size": images.shape[-1], "device": "cpu"}
    return torch.cat([x for x, _ in eval_batches(split, batch_size=1000, **options)])


def integer_network(model, policy, inputs, tmp_path):
    qmodel = calibrate(quantize(model, policy), [inputs]).eval()
    with torch.no_grad():
        for name, parameter in qmodel.named_parameters():
            if name.endswith("input_quantizer.clip"):
                parameter.mul_(1.25)  # so that the limit of an absorbed ReLU6 is within it
    return load_integer(export_integer(qmodel, tmp_path / "export"), model)


def small_network(model_type, tmp_path, scheme="apot", weight_bits=4, activation_bits=4, granularity="tensor"):
    torch.manual_seed(0)
    policy = BitPolicy((Rule("*", None, None, scheme, weight_bits, activation_bits, granularity),))
    inputs = normalized(images(), METADATA["mean"], METADATA["std"])
    return integer_network(model_type(), policy, inputs, tmp_path), inputs


def write(network, path, input_shape=INPUT_SHAPE, metadata=METADATA):
    export_c(network, path, input_shape=input_shape, metadata=metadata)
    return path


@needs_sanitizers
@pytest.mark.parametrize("model_type, rule, flags", [
    (Convolutions, ("apot", 4, 4), ()),
    (Convolutions, ("uniform", 5, 5, "channel"), (MULTIPLY,)),
    (Residual, ("apot", 6, 5), ()),
    (Residual, ("apot", 6, 5), (MULTIPLY,)),
    (Residual, ("uniform", 2, 2), ()),
    (Pools, ("uniform", 8, 8), ()),
    (Perceptron, ("apot", 3, 8), ()),
    (Perceptron, ("pot", 5, 4), ()),
], ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(map(str, value)) or "shifts")  # fmt: skip
def test_the_program_computes_the_network(model_type, rule, flags, tmp_path):
    network, inputs = small_network(model_type, tmp_path, *rule)
    program = compiled(write(network, tmp_path / "c"), *STRICT, *SANITIZED, *flags)
    check_equal(program, network, images(), inputs, tmp_path, count=3)


class Functional(nn.Module):
    """A functional call with a computed weight behind a parametrized layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 3))
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4, 3, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(torch.relu(self.first(x)), weight, self.bias, padding=1).flatten(1)


@needs_compiler
def test_functional_and_parametrized_layers(tmp_path):
    network, inputs = small_network(Functional, tmp_path)
    check_equal(compiled(write(network, tmp_path / "c"), *STRICT), network, images(), inputs, tmp_path, count=3)


@needs_compiler
def test_an_absorbed_relu6_clamps(tmp_path):
    network, inputs = small_network(Residual, tmp_path)
    assert network.conv3.rectifier == (0.0, 6.0) and network.conv3.input_clip > 6
    assert (_input_of(network.conv3, network, inputs) == 6).any()  # whoever looks sees what it lets through


def _input_of(layer, network, inputs):
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(inputs)
    hook.remove()
    return seen[0]


class Wide(nn.Sequential):
    """Sums beyond 32 bits in the first layer."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(288, 8), nn.Linear(8, 3))
        with torch.no_grad():
            self[1].weight.copy_(torch.linspace(0.9, 1, 288) * torch.tensor([1, -1] * 4).unsqueeze(1))


@needs_sanitizers
@pytest.mark.parametrize("flag", [(), (MULTIPLY,)], ids=["shifts", "multiplications"])
def test_sums_beyond_32_bits(flag, tmp_path):
    torch.manual_seed(0)
    dimmed = images() >> torch.arange(6, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    inputs = normalized(dimmed, [0.0, 0.0], [1.0, 1.0])
    policy = BitPolicy((
        Rule(position="first", scheme="pot", weight_bits=5, activation_bits=5, normalization="none"), Rule()
    ))  # fmt: skip
    network = integer_network(Wide(), policy, inputs, tmp_path)
    path = write(network, tmp_path / "c", metadata={"mean": [0, 0], "std": [1, 1]})
    assert "convolve64(" in (path / "network.c").read_text() and "convolve32(" in (path / "network.c").read_text()
    program = compiled(path, *STRICT, *SANITIZED, *flag)
    check_equal(program, network, dimmed, inputs, tmp_path, count=3)
    sums = traced(program, tmp_path / "images", 0)["_1"]
    assert max(sums) > 2**31 and min(sums) < -(2**31)


@needs_compiler
def test_the_program_adds_what_the_table_of_shifts_says(tmp_path):
    network, inputs = small_network(Residual, tmp_path)
    path = write(network, tmp_path / "c")
    (tmp_path / "images").write_bytes(idx(images()))
    expected = Trace(network)(inputs[:1])
    level = "{3, 2, {1, 0}}"  # 2^1 + 2^0
    table = (path / "levels.h").read_text()
    assert f"    {level}, /* 2^1 + 2^0 */\n" in table
    (path / "levels.h").write_text(table.replace(level, "{3, 2, {2, 0}}"))
    assert traced(compiled(path, *STRICT, MULTIPLY), tmp_path / "images", 0) == expected
    assert traced(compiled(path, *STRICT), tmp_path / "images", 0)["conv1"] != expected["conv1"]


@needs_flags("-O3", "-march=native")
def test_other_dialects_and_processors_round_alike(tmp_path):
    """As with fused multiply-adds, which compilers use where they may."""
    network, inputs = small_network(Normalized, tmp_path)
    program = compiled(write(network, tmp_path / "c"), "-std=gnu11", "-O3", "-march=native")
    check_equal(program, network, images(), inputs, tmp_path, count=3)


@needs_flags("-ffast-math")
def test_fast_arithmetic_is_refused_by_the_source(tmp_path):
    path = write(small_network(Perceptron, tmp_path)[0], tmp_path / "c")
    result = call(*COMPILER, "-ffast-math", "-c", path / "network.c", "-o", tmp_path / "o")
    assert result.returncode and "compile without -ffast-math" in result.stderr


def test_weights_are_packed_as_in_the_export(tmp_path):
    network, _ = small_network(Perceptron, tmp_path, "apot", 3, 4)
    text = (write(network, tmp_path / "c") / "weights.h").read_text()
    codes = safetensors.torch.load_file(tmp_path / "export" / "weights.safetensors")["5.weight_codes"]
    (stored,) = re.findall(r"uint8_t _5_codes\[\] = {([^}]*)}", text)
    assert list(map(int, stored.replace(",", " ").split())) == [*codes.tolist(), 0]


def test_memory_is_used_again(tmp_path):
    """Two buffers: what the addition needs at once."""
    source = (write(small_network(Residual, tmp_path)[0], tmp_path / "c") / "network.c").read_text()
    assert re.findall(r"static float (\w+)\[(\d+)\]", source) == [("buffer0", "576"), ("buffer1", "576")]


# The command line of the program.


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if not compiles(*SANITIZED):
        pytest.skip("no C compiler, or none with sanitizers")
    folder = tmp_path_factory.mktemp("program")
    network, _ = small_network(Perceptron, folder)
    (folder / "images").write_bytes(idx(images()))
    (folder / "labels").write_bytes(idx(torch.zeros(6, dtype=torch.uint8)))
    return compiled(write(network, folder / "c"), *STRICT, *SANITIZED)


IMAGES = idx(images())


@pytest.mark.parametrize("content, message", [
    (b"", "truncated"),
    (IMAGES[:11], "truncated"),
    (IMAGES[:-1], "holds 1727 bytes of items, expected 1728"),
    (IMAGES + b"0", "holds 1729 bytes of items, expected 1728"),
    (b"\x1f\x8b" + IMAGES[2:], "starts with 1f8b0804, expected 00000804; pass an idx file, unpacked"),
    (idx(images()[:, 0]), "starts with 00000803, expected 00000804"),
    (idx(images()[:, :, :-1]), "its images have size 11 where the network takes 12"),
    (idx(images()[:0])[:4] + b"\xff" * 4 + IMAGES[8:], "holds 1728 bytes of items, expected 1236950580960"),
], ids=["empty", "header", "short", "long", "packed", "gray", "size", "count"])  # fmt: skip
@pytest.mark.parametrize("rest", [[], ["--trace", "0"]], ids=["predict", "trace"])
def test_bad_images_get_a_line(content, message, rest, program, tmp_path):
    (tmp_path / "images").write_bytes(content)
    check_line(call(program, tmp_path / "images", *rest), message)


def check_line(result, message):
    assert result.returncode == 2 and result.stdout == "" and message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_bad_arguments_get_a_line(program, tmp_path):
    folder = program.parents[1]
    check_line(call(program), "usage: ")
    check_line(call(program, folder / "images", folder / "labels", "more"), "usage: ")
    check_line(call(program, tmp_path / "absent"), "absent: cannot be opened")
    check_line(call(program, tmp_path), "cannot be read")
    for number in ("6", "-1", "+1", "1x", "", "99999999999999999999"):
        check_line(
            call(program, folder / "images", "--trace", number), f"--trace {number}: expected the number of an image"
        )
    for count, message in ((5, "5 labels, expected 6"), (0, "0 labels, expected 6")):
        (tmp_path / "labels").write_bytes(idx(torch.zeros(count, dtype=torch.uint8)))
        check_line(call(program, folder / "images", tmp_path / "labels"), message)
    (tmp_path / "labels").write_bytes((folder / "labels").read_bytes()[:-1])
    check_line(call(program, folder / "images", tmp_path / "labels"), "holds 5 bytes of items, expected 6")


# What is refused.


class Refused(nn.Module):
    def __init__(self, operation, layer=None):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)
        self.layer = nn.Identity() if layer is None else layer
        self.operation = operation

    def forward(self, x):
        x = self.conv(x)
        return self.operation(self.layer(x), x)


def mean(y, x):
    return y.mean((2, 3))


@pytest.mark.parametrize("model, message", [
    (Refused(mean, nn.Sigmoid()), "the step layer (functional.sigmoid) cannot be expressed"),
    (Refused(mean, nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")), "the step layer (product) cannot"),
    (Refused(mean, nn.Linear(10, 4)), "the step layer (product) cannot be expressed"),
    (Refused(mean, nn.ConvTranspose2d(2, 2, 3)), "the step layer (ConvTranspose2d) cannot be expressed"),
    (Refused(lambda y, x: mean(y * x, x)), "the step mul (operator.mul) cannot be expressed"),
    (Refused(lambda y, x: mean(y + 1, x)), "the step add (operator.add) cannot be expressed"),
    (Refused(lambda y, x: mean(torch.cat([y, x], 1), x)), "the step cat (concatenate) cannot be expressed"),
    (Refused(lambda y, x: mean(x + x.mean((2, 3), keepdim=True), x)), "the step add (add) cannot be expressed"),
    (Refused(lambda y, x: (y, x)), "the network returns something else, expected one tensor [N, classes]"),
    (Refused(lambda y, x: y), "the network returns something else, expected one tensor [N, classes]"),
    (Refused(lambda y, x: nn.functional.max_pool1d(y.flatten(1), 2)), "the step max_pool1d (max pool) cannot"),
], ids=[
    "sigmoid", "circular", "linear-on-images", "transposed", "mul", "add-number", "cat", "broadcast", "two-results",
    "image-result", "one-dimension",
])  # fmt: skip
def test_what_c_cannot_express_is_refused(model, message, tmp_path):
    inputs = normalized(images(), METADATA["mean"], METADATA["std"])
    network = integer_network(model, BitPolicy((Rule(),)), inputs, tmp_path)
    check_refused(network, f"C: {message}", tmp_path)


def check_refused(network, message, tmp_path, **arguments):
    with pytest.raises(ApotfxError, match=f"^{re.escape(message)}"):
        write(network, tmp_path / "c", **arguments)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("rule", [
    {"weight_bits": 32}, {"activation_bits": 32}, {"scheme": "float"},
], ids=["weight", "input", "layer"])  # fmt: skip
def test_a_layer_in_float_is_refused(rule, tmp_path):
    inputs = normalized(images(), METADATA["mean"], METADATA["std"])
    policy = BitPolicy((Rule(name="conv3", **rule), Rule()))
    network = integer_network(Residual(), policy, inputs, tmp_path)
    check_refused(network, "C: layer conv3 computes in float; quantize its input and its weight", tmp_path)


def test_a_hook_is_refused(tmp_path):
    network, _ = small_network(Perceptron, tmp_path)
    network.get_submodule("5").register_forward_hook(lambda *_: None)
    check_refused(network, "C: the step _5 (Linear 5, which has hooks) cannot be expressed", tmp_path)


def test_a_constant_that_is_not_finite_is_refused(tmp_path):
    network, _ = small_network(Residual, tmp_path)
    network.bn2.offset[1] = torch.inf
    check_refused(network, "C: bn2 has the constant inf, expected a finite number", tmp_path)


@pytest.mark.parametrize("metadata, message", [
    ({"mean": [0.5, 0.5], "std": [1.0]}, "C: the metadata have the std [1.0], expected 2 numbers"),
    ({"mean": ["a", 1], "std": [1, 1]}, "C: the metadata have the mean ['a', 1], expected 2 numbers"),
    ({"mean": [0, 0], "std": [1, float("nan")]}, "C: the metadata has the constant nan"),
], ids=["length", "text", "nan"])  # fmt: skip
def test_metadata_that_do_not_say_how_to_normalize_are_refused(metadata, message, tmp_path):
    check_refused(small_network(Perceptron, tmp_path)[0], message, tmp_path, metadata=metadata)


def test_images_of_another_size_are_refused(tmp_path):
    network, _ = small_network(Perceptron, tmp_path)
    check_refused(network, "layer 1: its input has the shape [1, 242]", tmp_path, input_shape=(2, 11, 11))


@pytest.mark.parametrize("existing", ["file", "empty-directory", "dangling-link"])
def test_an_existing_path_is_refused_and_kept(existing, tmp_path):
    path = tmp_path / "c"
    {
        "file": path.touch, "empty-directory": path.mkdir, "dangling-link": lambda: path.symlink_to(tmp_path / "absent"),
    }[existing]()  # fmt: skip
    network, _ = small_network(Perceptron, tmp_path)
    before = path.lstat()
    with pytest.raises(ApotfxError, match="exists already; choose another path or remove it"):
        write(network, path)
    assert path.lstat() == before


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    network, _ = small_network(Perceptron, tmp_path)
    monkeypatch.setattr("pathlib.Path.rename", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write(network, tmp_path / "c")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["export"]


# A whole network on MNIST.


@needs_sanitizers
def test_a_resnet_on_mnist(mnist_root, tmp_path):
    torch.manual_seed(0)
    dataset = load_dataset("mnist", mnist_root)
    model, _ = build_model("resnet10", in_channels=1, num_classes=10, image_size=28)
    statistics = {"mean": dataset.mean, "std": dataset.std}
    test_images = dataset.test.images[:200]
    inputs = normalized(test_images, **statistics)
    with torch.no_grad():
        model.train()(inputs)  # batch norms
    network = integer_network(model.eval(), BitPolicy.default(bits=4, scheme="apot"), inputs, tmp_path)
    with torch.no_grad():
        assert len(network(inputs).argmax(1).unique()) > 1
    path = write(network, tmp_path / "c", input_shape=(1, 28, 28), metadata=statistics)
    for flags, count in ((("-O2",), 3), (("-O2", MULTIPLY), 1), (SANITIZED, 1)):
        program = compiled(path, *STRICT, *flags)
        check_equal(program, network, test_images[:, 0], inputs, tmp_path, count)
