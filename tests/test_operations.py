import pytest
import torch
from torch import nn
from torch.nn import functional

from apotfx import ApotfxError, BitPolicy, Rule, calibrate, export_integer, load_integer, quantize
from apotfx.integer.operations import operations, refuse, shapes


class Net(nn.Module):
    """A layer, an operation given as a function, and another layer that takes what comes of it."""

    def __init__(self, operation):
        super().__init__()
        self.first, self.operation, self.last = nn.Conv2d(2, 4, 3), operation, nn.LazyConv2d(2, 1)

    def forward(self, x):
        return self.last(self.operation(self.first(x), self.training))


def loaded(operation, tmp_path):
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    model = Net(operation).eval()
    model(x)
    qmodel = calibrate(quantize(model, BitPolicy.default(4)), [x]).eval()
    return load_integer(export_integer(qmodel, tmp_path / "export"), model)


def found(operation, tmp_path):
    """The operations between the two layers that are no constants: (kind, settings)."""
    kinds = [(o.kind, o.settings) for o in operations(loaded(operation, tmp_path)) if o.kind != "constant"]
    assert [kind for kind, _ in (kinds[0], kinds[1], *kinds[-2:])] == ["input", "layer", "layer", "output"]
    return kinds[2:-2]


WINDOW = {"kernel": (3, 2), "stride": (2, 2), "padding": (1, 0), "dilation": (1, 1)}


@pytest.mark.parametrize("operation, kind", [
    (lambda x, _: torch.relu(x) + x, "add"), (lambda x, _: x.add(torch.relu(x)), "add"),
    (lambda x, _: torch.cat([x, torch.relu(x)], dim=1), "concatenate"),
    (lambda x, training: functional.dropout(x, 0.5, training), "identity"),
    (lambda x, training: functional.dropout2d(x, training=training), "identity"),
    (lambda x, _: x.contiguous(), "identity"), (lambda x, _: functional.dropout(x, 0.5, False), "identity"),
    (lambda x, _: functional.relu6(x) * 2, "other"), (lambda x, _: torch.cat([x, x]), "other"),
    (lambda x, _: functional.dropout(x), "other"), (lambda x, _: functional.gelu(x), "other"),
    (lambda x, _: torch.add(x, x, alpha=2), "other"), (lambda x, _: x + 1, "other"),
])  # fmt: skip
def test_kinds(operation, kind, tmp_path):
    """A dropout that its network does not turn off is none that can be left out."""
    assert found(operation, tmp_path)[-1][0] == kind


@pytest.mark.parametrize("operation, kind, settings", [
    (lambda x, _: functional.max_pool2d(x, (3, 2), 2, (1, 0)), "max_pool", WINDOW),
    (lambda x, _: functional.avg_pool2d(x, (3, 2), 2, (1, 0), count_include_pad=False), "average_pool",
     {"kernel": (3, 2), "stride": (2, 2), "padding": (1, 0), "count_include_pad": False}),
    (lambda x, _: functional.adaptive_avg_pool2d(x, 1), "global_average", {"dims": (2, 3), "keepdim": True}),
    (lambda x, _: x.mean((-1, -2), keepdim=True), "global_average", {"dims": (-1, -2), "keepdim": True}),
    (lambda x, _: functional.relu6(x) + torch.relu(x), "add", {}),
])  # fmt: skip
def test_settings(operation, kind, settings, tmp_path):
    got_kind, got = found(operation, tmp_path)[-1]
    assert got_kind == kind and {key: got[key] for key in settings} == settings


@pytest.mark.parametrize("limits, operation", [
    ((0, torch.inf), lambda x: torch.relu(x)), ((0, 6), lambda x: functional.relu6(x)), ((0, torch.inf), lambda x: x.relu()),
])  # fmt: skip
def test_clamps(limits, operation, tmp_path):
    """One that a signed layer's addition reads too is not absorbed."""
    kinds = found(lambda x, _: operation(x) + x, tmp_path)
    assert kinds[0] == ("clamp", {"low": limits[0], "high": limits[1]})


def test_a_refusal_names_the_operation_and_the_target(tmp_path):
    (other,) = (o for o in operations(loaded(lambda x, _: functional.gelu(x), tmp_path)) if o.kind == "other")
    error = refuse(other, "C")
    assert isinstance(error, ApotfxError) and "C: the operation gelu (gelu) cannot be expressed" in str(error)


@pytest.mark.parametrize("network", [
    nn.Sequential(nn.Linear(2, 2)), torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))),
    quantize(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), BitPolicy.default(4)),
], ids=["module", "float", "quantized"])  # fmt: skip
def test_networks_without_integer_layers_are_refused(network):
    with pytest.raises(
        ApotfxError, match="network: expected what load_integer.* returns with backend reference, got a"
    ):
        operations(network)


@pytest.mark.parametrize("shape", [None, 5, (2, 0, 8), (2, -1, 8), (2.0, 8, 8), (True, 8, 8)], ids=str)
def test_shapes_that_no_image_has_are_refused(shape, tmp_path):
    with pytest.raises(ApotfxError, match="input_shape .*: expected sizes of at least 1"):
        shapes(loaded(lambda x, _: x, tmp_path), shape)


def test_a_transposed_convolution_is_no_layer_of_the_translations(tmp_path):
    model, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 2, 3)), torch.randn(2, 2, 6, 6)
    for policy, kinds in ((BitPolicy.default(4), ["layer", "other"]),
                          (BitPolicy((Rule(name="0"),)), ["layer", "other"])):  # fmt: skip
        qmodel = calibrate(quantize(model, policy), [x]).eval()
        network = load_integer(export_integer(qmodel, tmp_path / str(len(policy.rules))), model)
        found = operations(network)
        assert [o.kind for o in found] == ["input", *kinds, "output"]
        assert "the operation _1" in str(refuse(found[2], "C"))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.weight = nn.Conv2d(2, 4, 3), nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x):
        return functional.conv2d(torch.relu(self.first(x)), self.weight - self.weight.mean())


def test_a_functional_layer_is_a_layer(tmp_path):
    model, x = Functional(), torch.randn(2, 2, 6, 6)
    for i, (policy, last) in enumerate(((BitPolicy.default(4), "layer"), (BitPolicy((Rule(name="first"),)), "float_layer"))):
        qmodel = calibrate(quantize(model, policy), [x]).eval()
        found = operations(load_integer(export_integer(qmodel, tmp_path / str(i)), model))
        kinds = [o.kind for o in found if o.inputs or o.kind == "input"]
        assert kinds[:2] == ["input", "layer"] and kinds[-2:] == [last, "output"]


def test_a_network_without_a_graph_is_refused(tmp_path):
    class Branching(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() < 1e9 else x

    model, x = Branching(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    qmodel = calibrate(quantize(model, BitPolicy.default(4)), [x]).eval()
    with pytest.raises(ApotfxError, match="network: expected .* got a Branching without a graph of integer layers"):
        operations(load_integer(export_integer(qmodel, tmp_path / "export"), model))
