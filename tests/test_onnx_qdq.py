"""apotfx/integer/onnx/qdq.py in onnxruntime."""

import onnx
import pytest
import torch
from helpers import policy
from onnx import TensorProto
from onnx_helpers import NETWORKS, Vgg, at, batch, constants, integer_network, kinds, translate
from torch import nn

from apotfx import ApotfxError, BitPolicy, Rule, calibrate, export_integer, load_integer, quantize
from apotfx.integer.onnx import compare_onnx


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "sequence"])
def test_qdq_is_close(tmp_path, name, bits):
    """Not equal: QuantizeLinear brings ties to the even level, and products are scaled before they are added."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    x = 3 * batch(6, *shape)
    network = integer_network(tmp_path, make(), x, at(bits, scheme="uniform", granularity="channel"))
    path, file = translate(tmp_path, network, x, "qdq")
    if bits < 8:  # where onnxruntime does not round to 8 bits what the network does not
        for comparison in (compare_onnx(network, path, [x], optimize) for optimize in (True, False)):
            codes = [node.codes for node in comparison.nodes.values()]
            assert sum(tally.differing for tally in codes) <= 0.02 * sum(tally.compared for tally in codes)
    spread = (network(x) - network(x).mean(0)).abs().mean()
    # Without VNNI onnxruntime adds pairs of 8-bit products in 16 bits, which saturate.
    assert bits == 8 and not torch.cpu._is_vnni_supported() or compare_onnx(network, path, [x]).logits.largest < spread
    producers = {node.name: node for node in file.graph.node}
    for node in file.graph.node:
        if node.op_type in ("Conv", "MatMul"):
            dequantized, weight = (producers[value] for value in node.input[:2])
            assert (dequantized.op_type, weight.op_type) == ("DequantizeLinear",) * 2
            assert producers[dequantized.input[0]].op_type in ("QuantizeLinear", "Pad")
            assert constants(file)[weight.input[0]].data_type == TensorProto.INT8
    scales = [c for key, c in constants(file).items() if key.endswith("_scale")]
    assert scales and all((torch.from_numpy(onnx.numpy_helper.to_array(c).copy()) > 0).all() for c in scales)
    if name not in ("shared", "linear"):
        assert "Mul" not in kinds(file)  # batch norms went into the scales


def test_qdq_of_a_channel_that_a_batch_norm_takes_out(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).eval()
    x = batch(3, 2, 5, 5)
    qmodel = calibrate(quantize(model, at(5, scheme="uniform")), [x]).eval()
    qmodel.get_submodule("1").weight.data[1] = 0
    network = load_integer(export_integer(qmodel, tmp_path / "export"), model)
    path, _ = translate(tmp_path, network, x, "qdq")
    comparison = compare_onnx(network, path, [x])
    assert comparison.logits.largest < 0.05 and network(x).abs().max() > 0.2


@pytest.mark.parametrize("rules, message", [
    (BitPolicy.default(4), "the weight of layer 2 is apot at 4 bits, expected uniform levels; use flavour exact"),
    (policy(scheme="uniform", weight_bits=32, activation_bits=8), "the weight of layer 0 is float, expected"),
    (BitPolicy((Rule(name="5", scheme="float"), Rule(scheme="uniform"))), "the weight of layer 5 is float, expected"),
], ids=["apot", "float-weight", "float-layer"])  # fmt: skip
def test_qdq_refuses_what_is_not_uniform(tmp_path, rules, message):
    x = batch(2, 3, 13, 11)
    network = integer_network(tmp_path, Vgg(), x, rules)
    with pytest.raises(ApotfxError, match=f"^flavour qdq: {message}"):
        translate(tmp_path, network, x, "qdq")
