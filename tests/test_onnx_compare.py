"""apotfx/integer/onnx/compare.py."""

import onnx
import pytest
import torch
from onnx_helpers import Vgg, batch, check_exact, constants, layer_of, single, translate

from apotfx import ApotfxError, BitPolicy, LevelSet
from apotfx.integer.onnx import compare_onnx
from apotfx.operators import MatrixProduct


def test_a_comparison_finds_an_altered_file(tmp_path):
    network, file = check_exact(tmp_path, Vgg(), batch(2, 3, 13, 11), BitPolicy.default(4))
    scale = constants(file)["2.scale"]
    scale.raw_data = (torch.frombuffer(bytearray(scale.raw_data), dtype=torch.float32) * 1.5).numpy().tobytes()
    onnx.save(file, tmp_path / "altered.onnx")
    comparison = compare_onnx(network, tmp_path / "altered.onnx", [batch(2, 3, 13, 11)])
    assert comparison.first.name == "5" and comparison.logits.differing
    assert not comparison.nodes["2"].codes.differing and not comparison.nodes["2"].accumulators.differing


def test_what_onnxruntime_cannot_load_is_one_line(tmp_path):
    layer = layer_of(MatrixProduct(), torch.ones(1, 1).char(), LevelSet("uniform", 8), LevelSet("apot", 4))
    path, file = translate(tmp_path, single(layer), torch.zeros(1, 1))
    file.graph.node[0].op_type = "Nothing"
    onnx.save(file, path)
    with pytest.raises(ApotfxError, match=r"^[^\n]*exact.onnx: onnxruntime [\d.]+ cannot load it \([^\n]*\)$"):
        compare_onnx(single(layer), path, [torch.zeros(1, 1)])
