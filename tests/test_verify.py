"""apotfx/integer/verify.py on small networks, and tools/verify.py as a user calls it, on scikit-learn's digits."""

import copy
import hashlib
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import verify as tool
import torch
from helpers import MIXED, Conv1dNet, Conv3dNet, Net, data, needs_bytes, policy, trained
from torch import nn

from apotfx import ApotfxError, BitPolicy, LevelSet, calibrate, engine, export_integer, load_integer, quantize
from apotfx.integer import onednn
from apotfx.integer import verify as module
from apotfx.integer.codes import pack_codes, unpack_codes
from apotfx.integer.format import _describe_tensor
from apotfx.integer.manifest import checksum
from apotfx.integer.verify import Alteration, LayerAccumulators, Tally, compare, verify
from apotfx.reproducible import folded_batch_norm
from apotfx.layers import QuantLayer
from apotfx.training.build import build_network
from apotfx.training.checkpoint import save_checkpoint
from apotfx.training.config import TrainConfig
from apotfx.training.data import load_dataset
from apotfx.training.exported import export_metadata

ROOT = Path(__file__).parents[1]


# Counting.


def test_a_tally_counts_over_batches():
    tally = Tally()
    tally.add(torch.zeros(2, 3), torch.zeros(2, 3))
    assert tally == Tally(compared=6)
    tally.add(torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.tensor([[1.0, 2, 3], [4, 7, 5]]), first_image=2)
    assert tally == Tally(compared=12, differing=2, largest=2.0, first=((3, 1), 5.0, 7.0))
    tally.add(torch.tensor([9.0]), torch.tensor([4.0]), first_image=4)
    assert tally == Tally(compared=13, differing=3, largest=5.0, first=((3, 1), 5.0, 7.0))


def test_a_tally_of_what_is_not_finite():
    tally = Tally()
    tally.add(torch.tensor([math.nan, math.inf, -math.inf]), torch.tensor([math.nan, math.inf, -math.inf]))
    assert not tally.differing
    tally.add(torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan]))
    assert (tally.differing, tally.largest, tally.first[0]) == (1, math.inf, (1,))


# Equal networks.


@pytest.mark.parametrize(
    "rules", [policy(), BitPolicy.default(3, "uniform"), MIXED], ids=["apot4", "uniform3", "mixed"]
)
def test_an_export_equals_its_network_in_every_node(rules, tmp_path):
    qmodel, model = trained(rules)
    x = data()
    found = verify(export_integer(qmodel, tmp_path / "e"), model, x.split(2), qmodel, backend="reference")
    assert found.equal and found.against == "quantized"
    assert (found.problems, found.alterations, found.left_out) == ([], [], [])
    comparison = found.comparisons["reference"]
    assert comparison.first is None
    with torch.no_grad():
        logits = qmodel(x)
    assert comparison.logits == Tally(logits.numel()) and comparison.predictions == Tally(len(x))
    seen = outputs(qmodel, x)
    for name, layer in qmodel.named_modules():
        if isinstance(layer, QuantLayer):
            codes, accumulators = layer.codes_and_accumulators(seen[name][0])
            node = comparison.nodes[name]
            counts = [tensor.numel() for tensor in (codes, accumulators, seen[name][1])]
            assert [node.codes.compared, node.accumulators.compared, node.outputs.compared] == counts
    assert {"x", "bn1", "bn2", "add", "mean_average"} <= comparison.nodes.keys()


def outputs(network, x):
    """(input, output) of every module that is called, by its name."""
    seen = {}
    names = {module: name for name, module in network.named_modules()}
    hooks = [module.register_forward_hook(lambda m, args, y: seen.update({names[m]: (args[0], y)})) for module in names]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("model_type", [Conv1dNet, Conv3dNet])
def test_convolutions_of_other_dimensions(model_type, tmp_path):
    qmodel, model = trained(policy(), model_type)
    found = verify(export_integer(qmodel, tmp_path / "e"), model, [data(model_type)], qmodel)
    assert found.equal and found.comparisons["reference"].nodes["0"].accumulators.compared


def test_codes_and_accumulators_make_the_output():
    """What is compared is what the layers compute with."""
    qmodel, _ = trained(policy(granularity="channel"))
    for name, (x, y) in outputs(qmodel, data()).items():
        layer = qmodel.get_submodule(name)
        if isinstance(layer, QuantLayer):
            codes, accumulators = layer.codes_and_accumulators(x)
            levels = layer.input_quantizer.levels
            assert set(codes.abs().unique().tolist()) <= set(levels.ints) and torch.equal(codes, codes.round())
            _, scale_w = layer.integer_weight()
            scale = layer.input_quantizer.scale * scale_w
            scale = scale.reshape(layer.geometry.operator.channel_shape) if scale.dim() else scale
            assert torch.equal(layer.geometry.finish(accumulators.float() * scale, layer.bias, x), y)


@needs_bytes
def test_the_onednn_backend_is_compared_layer_by_layer(tmp_path):
    qmodel, model = trained(policy())
    path = export_integer(qmodel, tmp_path / "e")
    found = verify(path, model, data().split(3), qmodel)
    assert found.equal and found.comparisons.keys() == {"reference", "onednn"}
    reference, on_bytes = (found.comparisons[label].nodes for label in ("reference", "onednn"))
    assert {"conv1", "pointwise", "fc"} <= on_bytes.keys()
    for name, node in on_bytes.items():
        assert (node.codes, node.accumulators) == (reference[name].codes, reference[name].accumulators)
    alone = verify(path, model, [data()])
    assert alone.equal and alone.against == "reference" and alone.comparisons.keys() == {"onednn"}
    assert alone.left_out == ["no checkpoint beside the export: what training computed is not compared"]


@needs_bytes
def test_shapes_that_onednn_leaves_to_the_reference(tmp_path, monkeypatch):
    def refuse(*_):
        raise onednn.CannotRun

    monkeypatch.setattr(onednn.Pointwise, "forward", refuse)
    qmodel, model = trained(policy())
    found = verify(export_integer(qmodel, tmp_path / "e"), model, data().split(3), qmodel)
    assert found.equal and found.comparisons["onednn"].nodes == {}
    assert found.comparisons["onednn"].logits == found.comparisons["reference"].logits != Tally()


def test_what_onednn_lacks_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "what_onednn_lacks", lambda network: "the processor is too old")
    qmodel, model = trained(policy())
    path = export_integer(qmodel, tmp_path / "e")
    found = verify(path, model, [data()], qmodel)
    assert found.equal and found.comparisons.keys() == {"reference"}
    assert found.left_out == ["backend onednn: the processor is too old"]
    with pytest.raises(
        ApotfxError, match="nothing to compare its reference with .no checkpoint .*; backend onednn: the"
    ):
        verify(path, model, [data()])


def test_a_layer_that_is_called_twice_is_compared_twice(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    model, x = Shared(), torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    qmodel = calibrate(quantize(model, policy()), [x]).eval()
    found = verify(export_integer(qmodel, tmp_path / "e"), model, [x], qmodel, backend="reference")
    assert found.equal and found.comparisons["reference"].nodes["layer"].codes == Tally(2 * 21)


# Networks that differ when they run.


@pytest.fixture
def networks(tmp_path):
    """A quantized network and its integer network, which a test may change."""
    qmodel, model = trained(policy())
    return qmodel, load_integer(export_integer(qmodel, tmp_path / "e"), model)


def change(network, name, buffer, index):
    network.get_submodule(name).get_buffer(buffer).view(-1)[index] += 1


@pytest.mark.parametrize("name, buffer, index, where, part", [
    ("conv1", "levels", 5, "conv1", "accumulators"), ("conv2", "levels", 0, "conv2", "accumulators"),
    ("fc", "levels", 7, "fc", "accumulators"), ("conv3", "scale", 0, "conv3", "outputs"),
    ("conv3", "bias", 2, "conv3", "outputs"), ("pointwise", "input_clip", 0, "pointwise", "codes"),
    ("bn1", "offset", 3, "bn1", "outputs"), ("bn2", "multiplier", 1, "bn2", "outputs"),
])  # fmt: skip
def test_the_first_node_that_diverges_is_named(name, buffer, index, where, part, networks):
    qmodel, imodel = networks
    change(imodel, name, buffer, index)
    comparisons, _ = compare(qmodel, {"reference": imodel}, data().split(2))
    node = comparisons["reference"].first
    assert (node.name, node.first[0]) == (where, part)
    tally = node.first[1]
    a, b = (values(network, where, part) for network in (qmodel, imodel))
    different = (a != b).nonzero().tolist()
    first = tuple(different[0])
    assert tally == Tally(a.numel(), len(different), pytest.approx((a - b).abs().max().item(), rel=1e-6),
                          (first, a[first].item(), b[first].item()))  # fmt: skip


def values(network, name, part):
    x, y = outputs(network, data())[name]
    if part == "outputs":
        return y
    return network.get_submodule(name).codes_and_accumulators(x)[part == "accumulators"]


def test_a_difference_is_found_in_the_batch_and_the_image_that_it_is_in(networks):
    qmodel, imodel = networks
    change(imodel, "conv1", "levels", 0)
    x = torch.zeros(5, 2, 8, 8)
    x[3] = data()[0]
    for batch_size in (1, 2, 5):
        comparisons, _ = compare(qmodel, {"reference": imodel}, x.split(batch_size))
        assert comparisons["reference"].first.first[1].first[0][0] == 3


def test_other_predictions_are_counted(networks):
    qmodel, imodel = networks
    with torch.no_grad():
        predicted = qmodel(data()).argmax(1)
    imodel.fc.bias[0] += 1e6
    comparisons, _ = compare(qmodel, {"reference": imodel}, [data()])
    assert comparisons["reference"].predictions.differing == (predicted != 0).sum() > 0
    assert comparisons["reference"].logits.differing == len(predicted)


@needs_bytes
def test_a_layer_of_the_onednn_backend_that_diverges_is_named(networks):
    qmodel, imodel = networks
    altered = copy.deepcopy(imodel)
    change(altered, "pointwise", "levels", 3)
    comparisons, _ = compare(qmodel, {"reference": imodel, "onednn": onednn.ByteNetwork(altered)}, [data()])
    assert comparisons["reference"].first is None
    assert comparisons["onednn"].first.name == "pointwise" and comparisons["onednn"].first.first[0] == "accumulators"


# Files that were altered.


def sign(path, manifest, tensors):
    """Write both files with checksums that fit."""
    weights = safetensors.torch.save(tensors)
    (path / "weights.safetensors").write_bytes(weights)
    manifest["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    manifest["tensors"] = {name: _describe_tensor(tensor) for name, tensor in tensors.items()}
    manifest["manifest_sha256"] = checksum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def altered(path, alter, signed):
    manifest = json.loads((path / "manifest.json").read_text())
    tensors = safetensors.torch.load_file(path / "weights.safetensors")
    before = (path / "manifest.json").read_text()
    alter({layer["name"]: layer for layer in manifest["layers"]}, tensors)
    if signed:
        sign(path, manifest, tensors)
    else:
        (path / "weights.safetensors").write_bytes(safetensors.torch.save(tensors))
        text = json.dumps(manifest)
        if json.loads(before) != manifest:
            (path / "manifest.json").write_text(text)


def alter_weight(layers, tensors):
    levels = LevelSet("apot", 4)
    n = unpack_codes(tensors["conv3.weight_codes"], levels, torch.Size(layers["conv3"]["shape"]))
    n[2, 1, 0, 2] = -10 if n[2, 1, 0, 2] != -10 else 10
    tensors["conv3.weight_codes"] = pack_codes(n, levels)


def alter_entry(key, value=0.5):
    def alter(layers, tensors):
        layers["conv3"][key[0]][key[1]][0] = value

    return alter


def alter_tensor(name, index):
    def alter(layers, tensors):
        tensors[name].view(-1)[index] += 0.25

    return alter


def swap_layers(layers, tensors):
    a, b = "conv3.bias", "conv2.bias"
    tensors[a], tensors[b] = tensors[b], tensors[a]


ALTERATIONS = {
    "weight": (alter_weight, "conv3.weight", (2, 1, 0, 2), 1),
    "weight-scale": (alter_entry(("weight", "scale")), "layers.conv3.weight.scale.0", (), 1),
    "weight-clip": (alter_entry(("weight", "clip")), "layers.conv3.weight.clip.0", (), 1),
    "input-clip": (alter_entry(("input", "clip")), "layers.conv3.input.clip.0", (), 1),
    "level": (alter_entry(("weight", "levels"), 1), "layers.conv3.weight.levels.0", (), 1),
    "bias": (alter_tensor("fc.bias", 2), "fc.bias", (2,), 1),
    "batch-norm": (alter_tensor("bn1.offset", 4), "bn1.offset", (4,), 1),
    "swapped": (swap_layers, "conv3.bias", (0,), 6),
}


@pytest.mark.parametrize("signed", [True, False], ids=["checksums-fit", "checksums-as-they-were"])
@pytest.mark.parametrize("alter, name, index, count", ALTERATIONS.values(), ids=ALTERATIONS)
def test_an_alteration_is_caught_and_located(alter, name, index, count, signed, tmp_path):
    qmodel, model = trained(policy())
    path = export_integer(qmodel, tmp_path / "e")
    altered(path, alter, signed)
    found = verify(path, model, [data()], qmodel, backend="reference")
    assert not found.equal
    (alteration,) = (a for a in found.alterations if a.name == name)
    assert (alteration.index, alteration.count) == (index, count)
    layer, key = name.rsplit(".", 1)
    if name == "conv3.weight":
        n, _ = qmodel.conv3.integer_weight()
        assert alteration.expected == n[index] and abs(alteration.stored) == 10 != alteration.expected
    elif name.startswith("layers"):
        assert alteration.stored == (1 if "levels" in name else 0.5)
        expected = {
            "weight.scale": qmodel.conv3.integer_weight()[1], "weight.clip": qmodel.conv3.weight_quantizer.clip,
            "input.clip": qmodel.conv3.input_quantizer.clip, "weight.levels": torch.tensor(0),
        }  # fmt: skip
        assert alteration.expected == expected[layer.removeprefix("layers.conv3.")].item()
    else:
        folded = key == "offset" and folded_batch_norm(qmodel.get_submodule(layer))[1]
        expected = (folded if key == "offset" else qmodel.get_submodule(layer).state_dict()[key])[index].item()
        assert alteration.expected == expected != alteration.stored
    if not signed:
        assert any("checksum" in problem for problem in found.problems)


def test_an_altered_weight_is_followed_through_the_network(tmp_path):
    qmodel, model = trained(policy())
    path = export_integer(qmodel, tmp_path / "e")
    altered(path, alter_weight, signed=True)
    assert load_integer(path, model)  # nothing but the checkpoint tells
    found = verify(path, model, [data()], qmodel, backend="reference")
    node = found.comparisons["reference"].first
    assert (found.problems, len(found.alterations)) == ([], 1)
    part, tally = node.first
    assert (node.name, part, tally.first[0][1]) == ("conv3", "accumulators", 2)  # of the channel of the weight


@needs_bytes
def test_without_a_checkpoint_the_checksum_of_a_tensor_locates_it(tmp_path):
    qmodel, model = trained(policy())
    path = export_integer(qmodel, tmp_path / "e")
    assert verify(path, model, [data()]).equal
    altered(path, alter_weight, signed=False)
    found = verify(path, model, [data()])
    assert not found.equal and found.alterations == [] and found.comparisons["onednn"].first is None
    assert len(found.problems) == 2 and "conv3.weight_codes was altered (checksum)" in found.problems[1]


def test_tensors_that_are_missing_or_new_are_located(tmp_path):
    qmodel, _ = trained(policy())
    path = export_integer(qmodel, tmp_path / "e")
    tensors = {k: v for k, v in module.read_integer(path)[1].items() if k != "fc.bias"} | {"more": torch.ones(2)}
    assert module.find_alterations(path, tensors, qmodel) == [
        Alteration("fc.bias", (), "absent", [3]), Alteration("more", (), [2], "absent"),
    ]  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"layers": 3}', b"[" * 10**5], ids=range(5))
def test_a_manifest_that_is_none_is_refused_or_located(content, tmp_path):
    qmodel, model = trained(policy())
    path = export_integer(qmodel, tmp_path / "e")
    (path / "manifest.json").write_bytes(content)
    if b"layers" in content:
        found = verify(path, model, [data()], qmodel)
        assert not found.equal and [a.name for a in found.alterations] == ["layers", "program"]
    else:
        with pytest.raises(ApotfxError, match="manifest.json: (not|nested too deeply)"):
            verify(path, model, [data()], qmodel)


# Accumulators.


def test_accumulators_of_a_layer(tmp_path):
    qmodel, model = trained(policy(scheme="uniform", weight_bits=3, activation_bits=4))
    x = data()
    found = verify(export_integer(qmodel, tmp_path / "e"), model, x.split(2), qmodel, backend="reference")
    rows = {row.name: row for row in found.accumulators}
    assert list(rows) == ["conv1", "conv2", "conv3", "pointwise", "fc"]
    for name, (layer_input, _) in outputs(qmodel, x).items():
        if name in rows:
            layer = qmodel.get_submodule(name)
            n, _ = layer.integer_weight()
            _, accumulators = layer.codes_and_accumulators(layer_input)
            largest = 15 if not layer.input_quantizer.levels.signed else 7
            lowest = -largest if layer.input_quantizer.levels.signed else 0
            row = rows[name]
            assert row.products == n[0].numel()
            assert row.by_levels == (-3 * largest * row.products, 3 * largest * row.products)
            # The worst input for a channel, sign by sign.
            high = max((w.clamp(min=0) * largest + w.clamp(max=0) * lowest).sum().item() for w in n)
            low = min((w.clamp(min=0) * lowest + w.clamp(max=0) * largest).sum().item() for w in n)
            assert row.by_weights == (low, high)
            assert row.observed == (accumulators.min().item(), accumulators.max().item())
            assert row.by_levels[0] <= row.by_weights[0] <= row.observed[0] <= row.observed[1] <= row.by_weights[1]
    # 54 products of at most 3 * 7, or 27 of them in a group.
    assert rows["conv3"].bits[0] == 12 and rows["conv2"].bits[0] == (27 * 3 * 15).bit_length() + 1


def test_bits_of_accumulators():
    assert LayerAccumulators("a", 3, (-300, 300), (-128, 100), None).bits == (10, 8, None)
    assert LayerAccumulators("a", 3, (-300, 300), (-128, 128), (0, 3)).bits == (10, 9, 3)


# Mistakes.


def test_mistakes_are_told(tmp_path):
    qmodel, model = trained(policy())
    path = export_integer(qmodel, tmp_path / "e")
    with pytest.raises(ApotfxError, match="the quantized network is in training mode; call qmodel.eval"):
        verify(path, model, [data()], copy.deepcopy(qmodel).train())
    with pytest.raises(ApotfxError, match="backend 'cuda': unknown; choose one of reference, onednn"):
        verify(path, model, [data()], qmodel, backend="cuda")
    with pytest.raises(ApotfxError, match="there are no images to compare the networks on"):
        verify(path, model, [], qmodel)
    with pytest.raises(ApotfxError, match=r"layer fc has shape \[3, 4\], in the model \[4, 4\]"):
        verify(path, Net(classes=4), [data()], qmodel)
    with pytest.raises(ApotfxError, match="nothing to compare its reference with"):
        verify(path, model, [data()], backend="reference")


# The tool.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a run leaves behind, apart from the training."""
    run = tmp_path_factory.mktemp("runs") / "r"
    run.mkdir()
    config = TrainConfig(arch="resnet10", bit=3, dataset="digits", image_size=12, batch_size=64)
    dataset = load_dataset("digits", None, image_size=12)
    network = build_network(config, dataset, torch.device("cpu"), None)
    network.qmodel.train()(torch.randn(16, 1, 12, 12, generator=torch.Generator().manual_seed(0)))  # for batch norms
    qmodel = network.qmodel.eval()
    save_checkpoint(run / "best.pt", {"config": asdict(config), "model": qmodel.state_dict()})
    export_integer(qmodel, run / "integer", export_metadata(config, dataset, network.image_size))
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def call(*flags):
    return tool.main([*map(str, flags)])


@pytest.mark.parametrize("part", [".", "integer"])
def test_an_equal_run_gives_0(part, run, capsys):
    assert call(run / part, "--images", 30, "--batch-size", 7) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"its files hold what {run}/best.pt gives" and lines[-1] == "equal"
    (row,) = (line.split() for line in lines if line.startswith("quantized, reference"))
    assert row[2:] == ["0", "of", "300", "0", "0", "of", "30"]
    assert "no difference" in lines
    accumulators = lines[lines.index("Accumulators: bits in two's complement") :]
    (conv1,) = (line.split() for line in accumulators if line.startswith("conv1"))
    assert conv1[:6] == ["conv1", "49", str(-49 * 127 * 127), "to", str(49 * 127 * 127), "21"]


@needs_bytes
def test_an_export_alone_is_compared_between_backends(finished, tmp_path, capsys):
    path = shutil.copytree(finished / "integer", tmp_path / "alone")
    assert call(path, "--images", 20) == 0
    output = capsys.readouterr().out
    assert "reference and onednn on 20 images" in output and "note: no checkpoint beside the export" in output
    altered(path, lambda layers, tensors: tensors["fc.bias"].neg_(), signed=False)
    assert call(path, "--images", 20) == 1
    assert "fc.bias was altered (checksum)" in capsys.readouterr().out


@pytest.mark.parametrize("signed", [True, False])
def test_an_altered_weight_gives_1_and_its_place(signed, run, capsys):
    def alter(layers, tensors):
        levels = LevelSet("apot", 3)
        n = unpack_codes(tensors["layer2.0.conv1.weight_codes"], levels, torch.Size(layers["layer2.0.conv1"]["shape"]))
        n[4, 3, 1, 1] = 4 if n[4, 3, 1, 1] != 4 else -4
        tensors["layer2.0.conv1.weight_codes"] = pack_codes(n, levels)

    altered(run / "integer", alter, signed)
    assert call(run, "--images", 20, "--backend", "reference") == 1
    output = capsys.readouterr().out
    assert "altered: layer2.0.conv1.weight[4, 3, 1, 1] is " in output and f"{run}/best.pt gives " in output
    assert "first difference: layer2.0.conv1, accumulators[" in output and output.endswith("NOT EQUAL\n")
    assert ("weight_codes was altered (checksum)" in output) is not signed


def test_an_altered_scale_gives_1_and_its_place(run, capsys):
    altered(run / "integer", lambda layers, _: layers["fc"]["weight"].update(scale=[0.5]), signed=False)
    assert call(run) == 1
    output = capsys.readouterr().out
    assert "altered: layers.fc.weight.scale.0 is 0.5, " in output and "manifest.json: was altered (checksum)" in output


def test_many_alterations_are_cut_short(run, capsys):
    def alter(layers, tensors):
        for layer in layers.values():
            for key in ("weight", "input"):
                layer[key]["clip"], layer[key]["scale"] = [1.0], [0.25]

    altered(run / "integer", alter, signed=False)
    assert call(run) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("altered:")]
    count = 4 * len(json.loads((run / "integer" / "manifest.json").read_text())["layers"])
    assert len(lines) == 21 and lines[-1] == f"altered: {count - 20} more"


@pytest.mark.parametrize("flags, message", [
    (["--images", "0"], "argument --images: got '0', expected a whole number of at least 1; see --help"), (["--images", "361"], "--images 361: expected 1 to 360"),
    (["--batch-size", "0"], "argument -b/--batch-size: got '0', expected a whole number of at least 1; see --help"),
], ids=" ".join)  # fmt: skip
def test_wrong_numbers_give_2(flags, message, finished, capsys):
    assert call(finished, *flags) == 2
    assert capsys.readouterr().err == f"verify.py: error: {message}\n"


def test_what_is_no_run_gives_2(tmp_path, capsys):
    assert call(tmp_path / "absent") == 2
    assert "absent: no run with an export, and no export; expected manifest.json or integer/" in capsys.readouterr().err


def test_other_data_give_2(finished, tmp_path, capsys):
    path = shutil.copytree(finished / "integer", tmp_path / "alone")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["metadata"]["dataset"] = "mnist"
    sign(path, manifest, safetensors.torch.load_file(path / "weights.safetensors"))
    assert call(path, "--data", tmp_path / "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err
    manifest["metadata"] |= {"dataset": "digits", "in_channels": 3}
    sign(path, manifest, safetensors.torch.load_file(path / "weights.safetensors"))
    assert call(path) == 2
    assert "digits: its images have 1 channels, the network takes 3; name the data" in capsys.readouterr().err


def test_an_export_that_does_not_say_what_it_takes_needs_a_shape(tmp_path, capsys, monkeypatch):
    qmodel, _ = trained(policy())
    path = export_integer(qmodel, tmp_path / "e")
    assert call(path) == 2
    assert "does not say the shape of an input; pass --input-shape, such as 3,224,224" in capsys.readouterr().err
    others = {"reference": load_integer(path), "again": load_integer(path)}
    shape = data().shape[1:]
    comparisons, _ = compare(others.pop("reference"), others, [data()])
    assert comparisons["again"].first is None and comparisons["again"].nodes["fc"].codes.compared
    assert call(path, "--input-shape", ",".join(map(str, shape)), "--backend", "reference") == 2
    assert "nothing to compare its reference with" in capsys.readouterr().err
    if engine.what_bytes_lack() is None:
        assert call(path, "--input-shape", ",".join(map(str, shape))) == 0
        assert "equal" in capsys.readouterr().out


def test_a_damaged_checkpoint_gives_2(run, capsys):
    (run / "best.pt").write_bytes(b"PK")
    assert call(run) == 2
    assert capsys.readouterr().err.startswith(f"verify.py: error: checkpoint {run}/best.pt: ")


def test_batches_of_images_and_labels_are_refused():
    with pytest.raises(ApotfxError, match="verify: a batch is no input of the network"):
        compare(nn.Identity(), {}, [(torch.zeros(1), torch.zeros(1))])
