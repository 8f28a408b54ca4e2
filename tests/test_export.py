"""tools/export.py as a user calls it, on scikit-learn's digits."""

import itertools
import sys

import onnx
import export as tool
import pytest
import torch

from apotfx import export_integer
from apotfx.training.build import build_network
from apotfx.training.config import TrainConfig
from apotfx.training.data import load_dataset
from apotfx.training.exported import export_metadata


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory with the export of an untrained network."""
    path = tmp_path_factory.mktemp("runs") / "run"
    path.mkdir()
    config = TrainConfig(arch="resnet10", bit=3, scheme="uniform", dataset="digits", image_size=12)
    dataset = load_dataset("digits", None, image_size=12)
    torch.manual_seed(0)
    network = build_network(config, dataset, torch.device("cpu"), None)
    network.qmodel.train()(torch.randn(16, 1, 12, 12))  # for clips and batch norms
    export_integer(network.qmodel.eval(), path / "integer", export_metadata(config, dataset, network.image_size))
    return path


def call(*flags):
    return tool.main([*map(str, flags)])


def test_the_tool_writes_compares_and_counts(run, tmp_path, capsys):
    assert call(run, "--format", "onnx", "--output", tmp_path / "x.onnx", "--data", tmp_path) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path / 'x.onnx'}: {(tmp_path / 'x.onnx').stat().st_size:,} bytes"
    rows = {line.split()[0]: line for line in lines if line}
    assert rows["layer1.0.conv1"].count(" 0 of ") == rows["total"].count(" 0 of ") == 2
    assert lines[-2].startswith("logits differ: 0 of ") and lines[-1].startswith("predictions differ: 0 of ")
    assert call(run / "integer", "--format", "onnx", "--output", tmp_path / "q.onnx", "--flavour", "qdq") == 0
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}


def test_where_the_tool_writes_by_default(run, capsys):
    assert call(run, "--format", "onnx") == 0
    assert capsys.readouterr().out.startswith(f"{run / 'integer.onnx'}: ")
    assert call(run, "--format", "onnx") == 2
    assert capsys.readouterr().err == (
        f"export.py: error: export {run / 'integer.onnx'}: exists already; choose another path or remove it\n"
    )


@pytest.mark.parametrize("flags, message", [
    (["nowhere", "--format", "onnx"], "nowhere: no run with an export"),
    (["RUN", "--format", "c", "--flavour", "qdq"], "--flavour: is for --format onnx"),
    (["RUN", "--format", "c", "--data", "x"], "--data: is for --format onnx"),
], ids=itertools.count())  # fmt: skip
def test_mistakes_get_one_line_and_2(run, capsys, flags, message):
    assert call(*(run if flag == "RUN" else flag for flag in flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"export.py: error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_one_line(run, tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "onnx":
        monkeypatch.delitem(sys.modules, "apotfx.integer.onnx", raising=False)
    assert call(run, "--format", "onnx", "--output", tmp_path / "x.onnx", "--data", tmp_path) == 2
    assert (
        capsys.readouterr().err == f"export.py: error: ONNX: the package {package} is missing; pip install {package}\n"
    )
