"""Whatever torch computes from inputs in a range lies in the range that the table gives."""

import copy
import inspect
import math
import operator

import pytest
import torch
import torch.nn.functional as TF
import torchvision
from torch import fx, nn
from torch.overrides import get_overridable_functions
from torch.utils._pytree import tree_leaves

from apotfx.graph.ranges import Ranges, operation

INF = math.inf
BOUNDS = [(0, INF), (-INF, INF), (-1, 1), (0, 1), (0.5, 3), (-2, -0.5), (-INF, 0)]


def sample(low, high, shape=(2, 4, 6, 6), dtype=torch.float32):
    """Random values in [low, high], the ends and 0 among them."""
    x = torch.randn(shape) * torch.rand(shape).mul(4).exp()
    x.view(-1)[:3] = torch.tensor([max(low, -1e3), min(high, 1e3), 0.0])
    if math.isfinite(low) and math.isfinite(high):
        x.view(-1)[3:] = low + (high - low) * torch.rand(x.numel() - 3)
    return x.clamp(low, high).to(dtype)


def plain_tensors(result):
    found = [torch.as_tensor(x) for x in tree_leaves(result) if isinstance(x, (torch.Tensor, int, float))]
    return [x for x in found if x.layout == torch.strided and not x.is_quantized]


def require_inside(result, interval, label):
    """Every tensor and number of a result lies in the interval, up to rounding; in its sign exactly."""
    for value in plain_tensors(result):
        if value.is_complex():
            assert math.isnan(interval.low), f"{label}: complex, not in {tuple(interval)}"
            continue
        value = value.double().flatten()
        value = value[value.isfinite()]
        if math.isnan(interval.low) or not value.numel():
            continue
        low, high = value.min().item(), value.max().item()
        slack = 1e-5 * max(1, *(abs(end) for end in (low, high) if math.isfinite(end)), 0)
        assert low >= interval.low - slack and high <= interval.high + slack, f"{label}: [{low}, {high}] not in {interval}"
        assert low >= 0 or interval.low < 0, f"{label}: {low} is negative, not in {tuple(interval)}"
        assert high <= 0 or interval.high > 0, f"{label}: {high} is positive, not in {tuple(interval)}"


def bounded(graph, low, high):
    """A node whose range is [low, high]."""
    limits = (None if math.isinf(low) else low, None if math.isinf(high) else high)
    node = graph.placeholder("x")
    return node if limits == (None, None) else graph.call_method("clamp", (node, *limits))


class Traced(nn.Module):
    def __init__(self, function, bounds):
        super().__init__()
        self.function, self.bounds = function, bounds

    def forward(self, x):
        low, high = (None if math.isinf(end) else end for end in self.bounds)
        return self.function(x if low is high is None else x.clamp(low, high))


def range_of(function, low=-INF, high=INF):
    """The range of what a module or a function makes of a tensor in [low, high]."""
    traced = fx.symbolic_trace(Traced(function, (low, high)))
    ranges = Ranges(traced.graph, dict(traced.named_modules()))
    result = [node for node in traced.graph.nodes if node.op == "output"][0].args[0]
    return ranges.of(result)


def require_sound(function, shape=(2, 4, 6, 6), bounds=BOUNDS):
    for low, high in bounds:
        try:
            result = function(sample(low, high, shape))
        except RuntimeError:
            continue
        require_inside(result, range_of(function, low, high), f"[{low}, {high}]")


# All of torch's functions and methods that take such arguments.

SKIPPED = {  # they change the process or the tensor's memory, or leave it as it was made
    "__get__", "__set__", "backward", "register_hook", "register_post_accumulate_grad_hook", "set_", "resize_", "resize_as_",
    "numpy", "record_stream", "share_memory_", "apply_", "map_", "map2_", "__setstate__", "__reduce_ex__", "pin_memory",
    "is_pinned", "storage", "untyped_storage", "data_ptr", "to_mkldnn", "lobpcg", "empty_like", "new_empty", "hash_tensor",
    "__dlpack__", "__dlpack_device__", "__array__", "cuda", "xpu", "ipu", "mtia", "unravel_index", "__delitem__", "new",
}  # fmt: skip
ARGUMENTS = {
    "alone": (), "dim": (1,), "tensor": ("y",), "negative": (-1.5,), "tensors": ("y", "z"), "dims": (1, 2),
    "index": (1, "i"), "mask": ("m", 0.5), "number-dim": (2.0, 1), "shape": ((2, 72),),
}  # fmt: skip


def overridable():
    """By name the functions of torch, and the names of its methods, that take tensors; those in place have a test below."""
    found, seen = {}, set()
    for namespace, functions in get_overridable_functions().items():
        for function in functions:
            name = getattr(function, "__name__", "")
            private, in_place = name.startswith("_") and name[1:2] != "_", name.endswith("_") and name[-2:] != "__"
            if not name or name in SKIPPED or private or in_place or function in seen:
                continue
            seen.add(function)
            if namespace is torch.Tensor:
                if callable(getattr(torch.Tensor, name, None)):
                    found[f"Tensor.{name}"] = name
            elif inspect.isroutine(function):
                found[f"{namespace.__name__}.{name}"] = function
    return dict(sorted(found.items()))


FUNCTIONS = overridable()


def call(target, *args):
    return getattr(args[0], target)(*args[1:]) if isinstance(target, str) else target(*args)


def results(arguments, bounds):
    """Of every function that takes x and `arguments`: (name, its result for tensors in `bounds`, the range that it has)."""
    graph, found = fx.Graph(), {}
    tensors = {name: sample(*bounds, (4, 6, 6)) for name in "xyz"}
    tensors |= {"i": torch.zeros(4, 6, 6, dtype=torch.long), "m": torch.rand(4, 6, 6) > 0.5}
    nodes = {name: bounded(graph, *bounds) if name in "xyz" else graph.placeholder(name) for name in tensors}
    for name, target in FUNCTIONS.items():
        if (name, arguments) in REFUSED:
            continue
        given = [tensors[a].clone() if isinstance(a, str) else a for a in ("x", *arguments)]
        try:
            result = call(target, *given)
        except Exception:  # torch's functions raise of every type
            REFUSED.add((name, arguments))
            continue
        args = tuple(nodes[a] if isinstance(a, str) else a for a in ("x", *arguments))
        kind = "call_method" if isinstance(target, str) else "call_function"
        found[name] = graph.create_node(kind, target, args), result
    ranges = Ranges(graph, {"": nn.Module()})
    return [(name, result, ranges[node]) for name, (node, result) in found.items()]


REFUSED = set()  # what does not take such arguments


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.filterwarnings("ignore")
def test_every_function_of_torch_gives_what_the_table_says(arguments):
    torch.manual_seed(0)
    wrong = []
    for bounds in BOUNDS:
        for name, result, interval in results(arguments, bounds):
            try:
                require_inside(result, interval, f"{name}{arguments} of {bounds}")
            except AssertionError as error:
                wrong.append(str(error).splitlines()[0])
    assert wrong == []


# Of those that gave nothing negative for what is not negative, the ones that may, or that no layer would follow.
UNKNOWN_ON_PURPOSE = set("""
    Tensor.dequantize Tensor.histogram Tensor.frexp Tensor.matrix_exp Tensor.matrix_power Tensor.polygamma
    Tensor.resize_as torch.dequantize torch.fbgemm_linear_quantize_weight torch.frexp torch.histogram torch.histogramdd
    torch.linalg.linalg_matrix_exp torch.linalg.linalg_matrix_power torch.linalg.linalg_vander torch.matrix_exp
    torch.matrix_power torch.nn.functional.alpha_dropout torch.nn.functional.feature_alpha_dropout torch.norm_except_dim
    torch.special.special_airy_ai torch.special.special_modified_bessel_i0 torch.special.special_modified_bessel_i1
    torch.special.special_modified_bessel_k0 torch.special.special_modified_bessel_k1
    torch.special.special_scaled_modified_bessel_k0 torch.special.special_scaled_modified_bessel_k1
    torch.special.special_zeta Tensor.copysign torch.copysign Tensor.nextafter torch.nextafter Tensor.slice_inverse
    torch.slice_inverse Tensor.module_load torch.sym_sum torch.trapz torch.trapezoid torch.cumulative_trapezoid
""".split())


@pytest.mark.filterwarnings("ignore")
def test_every_function_of_torch_that_keeps_the_sign_is_known():
    torch.manual_seed(0)
    unknown, signed = set(), set()
    for bounds in ((0, INF), (0, 1)):
        for name, result, interval in results((), bounds):
            values = [x for x in plain_tensors(result) if x.is_floating_point() and x.numel()]
            if any((x < 0).any() for x in values):
                signed.add(name)
            elif values and not interval.low >= 0:
                unknown.add(name)
    assert unknown - signed - UNKNOWN_ON_PURPOSE == set()


# Modules: all that torch has of a kind, with settings of every kind.


def of_kind(module):
    return [getattr(nn, name) for name in module.__all__ if hasattr(nn, name)]


NEEDS_ARGUMENTS = (nn.MultiheadAttention, nn.Threshold, nn.Softmax, nn.Softmin, nn.LogSoftmax)
ACTIVATIONS = [
    nn.Threshold(0.5, -3.0), nn.Threshold(-1, 0.2), nn.RReLU(0.2, 0.5), nn.Hardtanh(0, 3), nn.Hardtanh(-2, 5),
    nn.Hardtanh(0.5, 0.7), nn.LeakyReLU(0.3), nn.LeakyReLU(-0.5), nn.ELU(2.0), nn.CELU(0.3), nn.GELU("tanh"),
    nn.Softplus(2.0), nn.Softplus(0.5, 5.0), nn.Softplus(1.0, 0.0), nn.Softplus(1.0, -5.0), nn.Hardshrink(1.0),
    nn.Softshrink(2.0), nn.Softmax(-1), nn.LogSoftmax(1), nn.Softmin(1), nn.PReLU(4, -1.0), nn.ReLU(True), nn.SiLU(True),
    *(cls() for cls in of_kind(nn.modules.activation) if cls not in NEEDS_ARGUMENTS),
]  # fmt: skip
PADDINGS = [
    cls(*((1, 0) if "Constant" in cls.__name__ else (1,)))
    for cls in of_kind(nn.modules.padding) if cls.__name__.endswith("2d")
] + [nn.ConstantPad2d(1, -2.0), nn.ConstantPad2d((0, 1, 2, 0), 0.5), nn.ZeroPad2d(-1), nn.ReflectionPad2d((2, 0, 1, 1))]  # fmt: skip
POOLS = [
    nn.MaxPool2d(2), nn.MaxPool2d(3, 1, 1, 2), nn.MaxPool2d(2, return_indices=True), nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), nn.AvgPool2d(2, divisor_override=1),
    nn.AvgPool2d(2, divisor_override=-3), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(1),
    nn.AdaptiveMaxPool2d(2, return_indices=True), nn.FractionalMaxPool2d(2, 3), nn.LPPool2d(1, 2), nn.LPPool2d(2, 2),
    nn.LPPool2d(3, 2), nn.LPPool2d(1.5, 2),
]  # fmt: skip
MODULES = [
    *ACTIVATIONS, *PADDINGS, *POOLS,
    *(nn.Upsample(scale_factor=1.5, mode=m) for m in ("nearest", "bilinear", "bicubic", "nearest-exact", "area")),
    nn.Upsample(9, mode="bilinear", align_corners=True), nn.Upsample(9, mode="bicubic", align_corners=True),
    nn.UpsamplingNearest2d(scale_factor=2), nn.UpsamplingBilinear2d(scale_factor=2),
    nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.Identity(), nn.Flatten(), nn.Unflatten(1, (2, 2)),
    nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ChannelShuffle(2), nn.Unfold(3, padding=1), nn.LocalResponseNorm(3),
    nn.LocalResponseNorm(3, alpha=-9.0), nn.CrossMapLRN2d(3), nn.RMSNorm(6), nn.RMSNorm(6, elementwise_affine=False), nn.LayerNorm(6), nn.GroupNorm(2, 4), nn.BatchNorm2d(4),
    nn.InstanceNorm2d(4), nn.Conv2d(4, 4, 1), nn.Sequential(nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2)), nn.Softmax2d(),
    torchvision.ops.StochasticDepth(0.5, "row"), torchvision.ops.DropBlock2d(0.5, 3), torchvision.ops.Permute([0, 2, 3, 1]),
]  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_modules_give_what_the_table_says(module, training):
    torch.manual_seed(0)
    require_sound(copy.deepcopy(module).train(training))


SIGNED_MODULES = (
    nn.AlphaDropout, nn.FeatureAlphaDropout, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.InstanceNorm2d, nn.Conv2d,
    nn.LogSigmoid, nn.LogSoftmax,
)  # fmt: skip
SIGNED_REPRS = ("bicubic", "-2.0", "alpha=-9.0", "threshold=-5.0", "Threshold(threshold=0.5", "elementwise_affine=True")


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_of_what_is_not_negative_only_few_modules_make_more(module):
    signed = isinstance(module, SIGNED_MODULES) or any(part in repr(module) for part in SIGNED_REPRS)
    signed |= getattr(module, "divisor_override", None) == -3
    assert (range_of(copy.deepcopy(module), 0, INF).low < 0) is signed


@pytest.mark.parametrize("module, low, high", [
    (nn.ReLU(), 0, INF), (nn.ReLU6(), 0, 6), (nn.Sigmoid(), 0, 1), (nn.Tanh(), -1, 1), (nn.ELU(2.0), -2, INF),
    (nn.SELU(), -1.7581, INF), (nn.CELU(0.5), -0.5, INF), (nn.GELU(), -0.16997, INF), (nn.GELU("tanh"), -0.17004, INF),
    (nn.SiLU(), -0.27846, INF), (nn.Mish(), -0.30884, INF), (nn.Hardswish(), -0.375, INF), (nn.Hardsigmoid(), 0, 1),
    (nn.Softplus(), 0, INF), (nn.Hardtanh(-2, 5), -2, 5), (nn.LeakyReLU(), -INF, INF), (nn.Softsign(), -1, 1),
    (nn.LogSigmoid(), -INF, 0), (nn.Threshold(0.5, -3), -3, INF), (nn.Softmax(1), 0, 1), (nn.LogSoftmax(1), -INF, 0),
    (nn.Tanhshrink(), -INF, INF), (nn.PReLU(), -INF, INF), (nn.RReLU(), -INF, INF), (nn.GLU(1), -INF, INF),
], ids=repr)  # fmt: skip
def test_the_ranges_of_activation_functions(module, low, high):
    assert range_of(module) == (pytest.approx(low, abs=2e-5), pytest.approx(high, abs=2e-5))


# One operation in all its spellings.

SPELLINGS = {
    "relu": [torch.relu, TF.relu, nn.ReLU(), lambda x: x.relu(), lambda x: x.relu_(), lambda x: TF.relu(x, inplace=True),
             lambda x: torch.relu_(x), lambda x: x.clamp(min=0), lambda x: torch.clamp_min(x, 0), lambda x: TF.threshold(x, 0, 0),
             lambda x: TF.hardtanh(x, 0, INF), lambda x: x.clip(0), lambda x: torch.maximum(x, torch.zeros(())),
             lambda x: torch.where(x > 0, x.relu(), 0.0), torch.ops.aten.relu, torch.ops.aten.relu.default],
    "sigmoid": [torch.sigmoid, TF.sigmoid, nn.Sigmoid(), lambda x: x.sigmoid_(), torch.special.expit, lambda x: 1 / (1 + (-x).exp())],
    "square": [torch.square, lambda x: x**2, lambda x: x.pow(2), lambda x: torch.pow(x, 2.0), lambda x: x * x, lambda x: x.mul(x),
               lambda x: torch.mul(x, other=x), lambda x: operator.imul(x, x), lambda x: x.square_(), lambda x: x.pow_(2),
               lambda x: x.__pow__(2), lambda x: torch.float_power(x, 2)],
}  # fmt: skip
EXPECTED = {"relu": (0, INF), "sigmoid": (0, 1), "square": (0, INF)}


@pytest.mark.parametrize(
    "name, function", [(n, f) for n, fs in SPELLINGS.items() for f in fs], ids=[f"{n}{i}" for n, fs in SPELLINGS.items() for i in range(len(fs))]
)
def test_every_spelling_of_an_operation_has_its_range(name, function):
    torch.manual_seed(0)
    assert range_of(function) == EXPECTED[name]
    require_sound(function, bounds=BOUNDS[:3])


IN_PLACE = sorted(
    name for name in dir(torch.Tensor)
    if name.endswith("_") and name[-2:] != "__" and not name.startswith("_") and hasattr(torch.Tensor, name[:-1])
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_what_works_in_place_has_the_range_of_what_does_not():
    for name in IN_PLACE:
        graph = fx.Graph()
        x = bounded(graph, 0.5, 3)
        for arguments in ((), (x,), (2,), (0, 1), (x, x)):
            nodes = [graph.call_method(spelling, (x, *arguments)) for spelling in (name, name[:-1])]
            ranges = Ranges(graph, {"": nn.Module()})
            assert [*map(repr, map(ranges.of, nodes))][0] == repr(ranges[nodes[1]]), f"{name}{arguments}"


# Other forms: (what, whether it may be negative for an input that is not).

def unpooled(x):
    pooled = TF.max_pool2d(x, 2, return_indices=True)
    return TF.max_unpool2d(pooled[0], pooled[1], 2)


FORMS = {
    "reflect": (lambda x: TF.pad(x, (1, 1), mode="reflect"), False), "replicate": (lambda x: TF.pad(x, (1, 1), "replicate"), False),
    "circular": (lambda x: TF.pad(x, (1, 0), "circular"), False), "constant": (lambda x: TF.pad(x, (1, 1)), False),
    "constant-value": (lambda x: TF.pad(x, (1, 1), value=0.5), False), "constant-negative": (lambda x: TF.pad(x, (1, 1), value=-1), True),
    "constant-position": (lambda x: TF.pad(x, (1, 1), "constant", -1.0), True),
    "bilinear": (lambda x: TF.interpolate(x, scale_factor=2, mode="bilinear"), False),
    "antialias": (lambda x: TF.interpolate(x, 4, mode="bilinear", antialias=True), False),
    "bicubic": (lambda x: TF.interpolate(x, scale_factor=2, mode="bicubic"), True), "area": (lambda x: TF.interpolate(x, 4, mode="area"), False),
    "grid_sample": (lambda x: TF.grid_sample(x, torch.zeros(2, 3, 3, 2), align_corners=False), False),
    "grid_sample-bicubic": (lambda x: TF.grid_sample(x, torch.zeros(2, 3, 3, 2), "bicubic", align_corners=False), True),
    "narrow": (lambda x: x.narrow(1, 0, 2), False), "take": (lambda x: torch.take(x, torch.tensor([0, 3])), False),
    "gather": (lambda x: torch.gather(x, 1, torch.zeros(2, 4, 6, 6, dtype=torch.long)), False),
    "index": (lambda x: x[:, [0, 2], None, ..., ::2], False), "mask": (lambda x: x[x > 1], False),
    "where": (lambda x: torch.where(x > 1, x, 0.0), False), "where-negative": (lambda x: torch.where(x > 1, x, -x), True),
    "x.where": (lambda x: x.where(x > 1, -x), True), "x.where-0": (lambda x: x.where(x > 1, torch.zeros(())), False),
    "arange": (lambda x: x + torch.arange(x.shape[-1], device=x.device), False), "masked_fill": (lambda x: x.masked_fill(x > 1, 0), False), "masked_fill-negative": (lambda x: x.masked_fill(x > 1, -1e9), True),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), False), "roll": (lambda x: x.roll(1, 2).flip(1), False),
    "topk": (lambda x: x.topk(2, 1)[0], False), "sort": (lambda x: x.sort(1).values, False), "max": (lambda x: x.max(1)[0], False),
    "min": (lambda x: torch.min(x, -x), True), "median": (lambda x: x.median(1).values, False), "amax": (lambda x: x.amax((2, 3)), False),
    "unfold": (lambda x: TF.unfold(x, 3, padding=1), False), "x.unfold": (lambda x: x.unfold(2, 2, 2), False),
    "fold": (lambda x: TF.fold(TF.unfold(x, 2), (6, 6), 2), False), "cumsum": (lambda x: x.cumsum(1), False),
    "cumprod": (lambda x: x.cumprod(1), False), "logsumexp": (lambda x: x.logsumexp(1), False), "diff": (lambda x: x.diff(dim=1), True),
    "var": (lambda x: x.var(1), False), "std": (lambda x: torch.std(x - 9, 1), False), "norm": (lambda x: (-x).norm(dim=1), False),
    "normalize": (lambda x: TF.normalize(x, dim=1), False), "distance": (lambda x: torch.cdist(-x, x), False),
    "pow4": (lambda x: (x - 3) ** 4, False), "pow3": (lambda x: (x - 3) ** 3, True), "root": (lambda x: x**0.5, False),
    "exponent": (lambda x: 2 ** (-x), False), "pow-of-tensor": (lambda x: x ** (x - 3), False), "pow-negative": (lambda x: (x + 1) ** -1, False),
    "log": (lambda x: x.log(), True), "log1p": (lambda x: x.log1p(), False), "log-above-1": (lambda x: (x + 1).log(), False),
    "expm1": (lambda x: torch.expm1(x), False), "one_minus": (lambda x: 1 - x.sigmoid(), False), "rsub": (lambda x: torch.rsub(x, 1), True),
    "sub": (lambda x: x - 1, True), "sub-alpha": (lambda x: torch.sub(x, x, alpha=-1), False), "add-alpha": (lambda x: torch.add(x, x, alpha=-2), True),
    "mul-negative": (lambda x: x * -0.1, True), "neg-neg": (lambda x: -(-x), False), "div": (lambda x: x / (x + 1), False),
    "div-floor": (lambda x: torch.div(x, 3, rounding_mode="floor"), False), "div-trunc": (lambda x: torch.div(x - 0.5, 1, rounding_mode="trunc"), True),
    "remainder": (lambda x: (x - 5) % 3, False), "fmod": (lambda x: torch.fmod(x - 5, 3), True), "frac": (lambda x: x.frac(), False),
    "lerp": (lambda x: torch.lerp(x, x * 2, 0.3), False), "lerp-beyond": (lambda x: torch.lerp(x, x * 2, -2.0), True),
    "addcmul": (lambda x: torch.addcmul(x, x, x, value=0.5), False), "addcmul-negative": (lambda x: torch.addcmul(x, x, x, value=-0.5), True),
    "baddbmm": (lambda x: torch.baddbmm(x[0], x[0], x[1]), False), "baddbmm-beta": (lambda x: torch.baddbmm(x[0], x[0], x[1], beta=-1), True),
    "einsum": (lambda x: torch.einsum("nchw,ndhw->ncd", x, x), False), "attention": (lambda x: TF.scaled_dot_product_attention(x - 1, x - 2, x), False),
    "attention-dropout": (lambda x: TF.scaled_dot_product_attention(x, x, x, dropout_p=0.5), False),
    "attention-of-signed": (lambda x: TF.scaled_dot_product_attention(x, x, x - 1), True), "softmax@v": (lambda x: (x - 1).softmax(-1) @ x, False),
    "one_hot": (lambda x: TF.one_hot(x.argmax(1)), False), "argmax": (lambda x: x.argmax(1), False), "float-mask": (lambda x: (~(x > 1)).float(), False),
    "and": (lambda x: ((x > 1) & (x < 2)).float() * x, False), "bernoulli": (lambda x: torch.bernoulli(x.sigmoid()), False),
    "dropout-by-hand": (lambda x: x.div(0.9) * torch.empty_like(x).bernoulli_(0.9), False), "floor-of-uniform": (lambda x: x * (0.9 + torch.rand_like(x)).floor(), False),
    "randn": (lambda x: x + torch.randn_like(x), True), "rand": (lambda x: x + torch.rand_like(x), False), "full": (lambda x: torch.full_like(x, -1), True),
    "long": (lambda x: x.long(), False), "int8": (lambda x: (x * 300).to(torch.int8), True), "int8-in-range": (lambda x: x.clamp(0, 100).to(torch.int8), False),
    "uint8": (lambda x: (x - 1).to(torch.uint8), False), "half": (lambda x: x.half(), False), "to-dtype": (lambda x: x.to(x.dtype), False),
    "to-device": (lambda x: (x - 1).to(x.device), True), "type_as": (lambda x: x.type_as(x), False), "complex": (lambda x: torch.fft.rfft(x), True),
    "complex-real": (lambda x: torch.fft.rfft(x).real, True), "complex-abs": (lambda x: torch.fft.rfft(x).abs(), False),
    "complex-square": (lambda x: (torch.fft.rfft(x) ** 2).real, True), "irfft": (lambda x: torch.fft.irfft(torch.fft.rfft(x)), True),
    "cat": (lambda x: torch.cat([x, x * 2], 1), False), "cat-negative": (lambda x: torch.cat([x, -x], 1), True),
    "pad_sequence": (lambda x: nn.utils.rnn.pad_sequence([x[0], x[1]]), False), "block_diag": (lambda x: torch.block_diag(x[0, 0], x[1, 1]), False),
    "scatter": (lambda x: x.scatter(1, torch.zeros(2, 1, 6, 6, dtype=torch.long), -1.0), True), "tril": (lambda x: x.tril(), False),
    "index_add": (lambda x: x.index_add(0, torch.tensor([0]), x[:1], alpha=-1), True), "shape": (lambda x: x / x.shape[1], False),
    "shape-2": (lambda x: x / (x.shape[1] - 5), True), "size": (lambda x: x * x.size(-1) ** -0.5, False), "constant-tensor": (lambda x: x * torch.tensor([1.0, 2, 0, 1, 5, 6]), False),
    "constant-tensor-negative": (lambda x: x + torch.tensor([1.0, -2, 0, 1, 5, 6]), True), "swish": (lambda x: x * TF.relu6(x + 3) / 6, False),
    "nan_to_num": (lambda x: x.nan_to_num(), False), "nan_to_num-negative": (lambda x: x.nan_to_num(-1.0), True),
    "copysign": (lambda x: torch.copysign(x, x - 1), True), "clamp-tensors": (lambda x: (x - 1).clamp(x * 0, x), False),
    "clamp-max": (lambda x: x.clamp(max=-1), True), "threshold": (lambda x: TF.threshold(x, 0.1, 20.0), False), "prelu": (lambda x: TF.prelu(x, torch.tensor([-1.0])), False),
    "max_unpool": (unpooled, False), "roi_align": (lambda x: torch.ops.torchvision.roi_align(
        x, torch.tensor([[0.0, 0, 0, 3, 3]]), 1.0, 2, 2, 2, False), False),
    "linear": (lambda x: TF.linear(x, torch.rand(3, 6)), False), "linear-bias": (lambda x: TF.linear(x, torch.rand(3, 6), -torch.ones(3)), True),
    "hann": (lambda x: x * torch.hann_window(6), False),
}  # fmt: skip


@pytest.mark.parametrize("function, signed", FORMS.values(), ids=FORMS)
def test_other_forms(function, signed):
    torch.manual_seed(0)
    require_sound(function)
    assert (range_of(function, 0, INF).low >= 0) is not signed


BY_HAND = {  # of a signed x: (what, its range)
    "where": (lambda x: torch.where(x > 0, x, 0.0), (0, INF)), "where-reversed": (lambda x: torch.where(0 >= x, 0.0, x), (0, INF)),
    "x.where": (lambda x: x.where(x >= 0, torch.zeros(())), (0, INF)), "where-not": (lambda x: torch.where(~(x < 0), x, 0.0), (0, INF)),
    "where-leaky": (lambda x: torch.where(x > 0, x, -0.1 * x), (-INF, INF)), "where-6": (lambda x: torch.where(x > 6, 6, x.relu()), (0, INF)),
    "where-clone": (lambda x: torch.where(x.clone() > 0, x, 0), (0, INF)), "where-other": (lambda x: torch.where(x + 1 > 0, x, 0), (-INF, INF)),
    "where-wrong": (lambda x: torch.where(x < 0, x, 0), (-INF, 0)), "where-tensor": (lambda x: torch.where(x > x.sigmoid(), x, 0), (0, INF)),
    "mask": (lambda x: x * (x > 0), (0, INF)), "float-mask": (lambda x: (x > 0).float() * x, (0, INF)),
    "mask-to": (lambda x: x.mul((x > 0).to(x.dtype)), (0, INF)), "mask-below": (lambda x: x * (x < 2), (-INF, 2)),
    "mask-of-other": (lambda x: x * (x.sin() > 0), (-INF, INF)), "masked_fill": (lambda x: x.masked_fill(x < 0, 0), (0, INF)),
    "masked_fill-value": (lambda x: x.masked_fill(x < 0, -1), (-1, INF)), "masked_fill-wrong": (lambda x: x.masked_fill(x > 0, 0), (-INF, 0)),
    "number-mask": (lambda x: x * (x > 0).float().sub(1), (-INF, INF)), "long-not": (lambda x: x * ~(x > 0).long(), (-INF, INF)),
}  # fmt: skip


@pytest.mark.parametrize("function, expected", BY_HAND.values(), ids=BY_HAND)
def test_activation_functions_written_by_hand(function, expected):
    torch.manual_seed(0)
    require_sound(function)
    assert range_of(function) == expected


# What is no operation of torch's, or not what its name says.


class Shifted(nn.ReLU):
    def forward(self, x):
        return super().forward(x) - 1


class Renamed(nn.ReLU):
    pass


def hooked(register):
    module = nn.ReLU()
    getattr(module, register)(lambda module, args, *result: -args[0])
    return module


def replaced():
    module = nn.ReLU()
    module.forward = lambda x: -x
    return module


class Leaf(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, nn.ReLU) or super().is_leaf_module(module, name)


@pytest.mark.parametrize("module, known", [
    (nn.ReLU(), True), (Renamed(), True), (Shifted(), False), (hooked("register_forward_hook"), False),
    (hooked("register_forward_pre_hook"), False), (replaced(), False),
], ids=["relu", "renamed", "own-forward", "hook", "pre-hook", "replaced"])  # fmt: skip
def test_a_module_is_known_by_the_forward_that_runs(module, known):
    traced = Traced(module, (-INF, INF))
    graph = Leaf().trace(traced)
    ranges = Ranges(graph, dict(traced.named_modules()))
    node = [n for n in graph.nodes if n.op == "call_module"][0]
    assert ranges[node] == ((0, INF) if known else (-INF, INF))


def test_parameters_and_buffers_may_become_anything_but_keep_their_type():
    root = nn.Module()
    root.scale = nn.Parameter(torch.ones(1), requires_grad=False)
    for name, value in {"mean": torch.ones(1), "mask": torch.ones(1) > 0, "image": torch.ones(1, dtype=torch.uint8)}.items():
        root.register_buffer(name, value)
    root.register_buffer("_tensor_constant0", torch.tensor([1.0, -2.0]))  # as tracing calls what forward makes
    graph = fx.Graph()
    held = {name: graph.get_attr(name) for name in ("scale", "mean", "mask", "image", "_tensor_constant0")}
    inverted = graph.call_function(operator.invert, (held["mask"],))
    ranges = Ranges(graph, {"": root})
    expected = [(-INF, INF), (-INF, INF), (0, 1), (0, 255), (-2, 1)]
    assert [ranges[node] for node in held.values()] == expected and ranges[inverted] == (0, 1)


def relu(x):
    return -x


@pytest.mark.parametrize("function", [relu, torch.masked.amax, torch.sparse.sum], ids=["own", "masked", "sparse"])
def test_a_function_of_another_module_with_the_name_of_torchs_is_unknown(function):
    graph = fx.Graph()
    node = graph.call_function(function, (graph.placeholder("x"),))
    assert operation(node, {}) is None and Ranges(graph, {"": nn.Module()})[node] == (-INF, INF)
