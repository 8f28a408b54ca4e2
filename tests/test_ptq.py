"""tools/ptq.py."""

import json
from dataclasses import asdict

import ptq
import pytest
import torch
from helpers import table_rows
from torch.nn import functional as F

from apotfx import BitPolicy, calibrate, quantize
from apotfx.training.build import build_float
from apotfx.training.checkpoint import save_checkpoint
from apotfx.training.config import TrainConfig
from apotfx.training.data import eval_batches, load_dataset


def batches(dataset, split):
    options = {"batch_size": 128, "mean": dataset.mean, "std": dataset.std, "image_size": dataset.image_size}
    return eval_batches(split, device="cpu", **options)


def save(path, model, config):
    save_checkpoint(path, {"model": model.state_dict(), "ema": None, "config": asdict(config)})
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(checkpoint, network, data set) of a perceptron that a few steps on the digits have trained."""
    config = TrainConfig(arch="mlp", bit=32, dataset="digits", image_size=8)
    dataset = load_dataset("digits", None, image_size=8)
    model, _ = build_float(config, dataset)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(12):
        for images, labels in batches(dataset, dataset.train):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return save(tmp_path_factory.mktemp("float") / "best.pt", model, config), model.eval(), dataset


def accuracy(model, dataset):
    correct = sum((model(images).argmax(1) == labels).sum().item() for images, labels in batches(dataset, dataset.test))
    return round(100 * correct / len(dataset.test), 4)


def test_the_table_and_the_numbers(trained, tmp_path, capsys):
    checkpoint, model, dataset = trained
    file = tmp_path / "result.json"
    assert ptq.main([checkpoint, "--bit", "8,4", "--images", "500", "--seed", "3", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    chosen = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(3))[:500]
    split = type(dataset.train)(dataset.train.images[chosen], dataset.train.labels[chosen])
    expected = {}
    with torch.no_grad():
        for scheme in ("uniform", "apot"):
            for bit in (8, 4):
                qmodel = quantize(model, BitPolicy.default(bit, scheme)).eval()
                calibrate(qmodel, (images for images, _ in batches(dataset, split)))
                expected[f"{bit}-bit {scheme}"] = accuracy(qmodel, dataset)
        assert result["float"] == accuracy(model, dataset)
    assert result["quantized"] == expected and result["float"] > 90
    assert {key: result[key] for key in ("arch", "dataset", "images", "method", "reestimate_bn", "correct_bias", "seed")} == {
        "arch": "mlp", "dataset": "digits", "images": 500, "method": "mse", "reestimate_bn": False,
        "correct_bias": False, "seed": 3,
    }  # fmt: skip
    header, first, *rows = table_rows(capsys.readouterr().out)
    assert header == ["mlp on digits", "test accuracy, %", "difference"]
    assert first == ["float32", f"{result['float']:.2f}", ""]
    assert rows == [[name, f"{acc:.2f}", f"{acc - result['float']:+.2f}"] for name, acc in expected.items()]


def test_quantizing_a_trained_network_keeps_what_it_knows(trained, capsys):
    """Of the 360 test images one may change at 8 bits, three at 5."""
    checkpoint, _, _ = trained
    result = ptq.measure(ptq.make_parser().parse_args([checkpoint, "--bit", "8,5"]))
    one = 100 / 360
    for name, reached in result["quantized"].items():
        assert result["float"] - reached < (1.1 if name.startswith("8") else 3.1) * one


def test_batch_norms_are_reestimated(tmp_path, capsys):
    config = TrainConfig(arch="resnet10", bit=32, dataset="digits", image_size=8)
    dataset = load_dataset("digits", None, image_size=8)
    model, _ = build_float(config, dataset)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.fill_(100)  # as no data gives it
    args = [save(tmp_path / "best.pt", model, config), "--bit", "8", "--scheme", "uniform", "--images", "256"]
    assert ptq.main(args) == 0
    assert ptq.main([*args, "--reestimate-bn"]) == 0
    without, with_ = (row[1] for row in table_rows(capsys.readouterr().out) if row[0] == "8-bit uniform")
    assert without != with_


def test_biases_are_corrected(trained):
    args = [trained[0], "--bit", "2", "--scheme", "apot", "--images", "256"]
    without, with_ = (ptq.measure(ptq.make_parser().parse_args(a)) for a in (args, [*args, "--correct-bias"]))
    assert with_["correct_bias"] and with_["float"] == without["float"]
    assert with_["quantized"] != without["quantized"]


def test_a_policy_decides_per_layer(trained, tmp_path, capsys):
    path = tmp_path / "policy.yaml"
    BitPolicy.default(3, "pot").to_yaml(path)
    assert ptq.main([trained[0], "--policy", str(path), "--method", "percentile", "--percentile", "99"]) == 0
    assert [row[0] for row in table_rows(capsys.readouterr().out)][1:] == ["float32", str(path)]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--bit", "9"], "argument --bit: got '9', expected one of 2, 3, 4, 5, 6, 7, 8"),
        (["--bit", "4,"], "argument --bit: got '4,', expected a list such as a,b"),
        (["--scheme", "apot,float"], "argument --scheme: got 'float', expected one of apot, pot, uniform"),
        (["--images", "1"], "--images 1: expected 2 to"),
        (["--images", "2000"], "--images 2000: expected 2 to"),
        (["--method", "max"], "calibration method 'max': unknown; choose one of mse, minmax, percentile, paper"),
        (["--policy", "absent.yaml"], "policy file absent.yaml: cannot be read"),
        (["--reestimate-bn"], "the model has no batch norm with running statistics; leave it out"),
        (["--dataset", "mnist", "--data", "absent"], "mnist: found no absent"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes_are_refused_in_one_line(trained, capsys, args, message):
    assert ptq.main([trained[0], *args]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("ptq.py: error: ") and message in lines[-1]


def test_a_checkpoint_that_is_not_float_is_refused(tmp_path, capsys):
    config = TrainConfig(arch="mlp", bit=4, dataset="digits", image_size=8)
    dataset = load_dataset("digits", None, image_size=8)
    qmodel = quantize(build_float(config, dataset)[0], config.bit_policy())
    assert ptq.main([save(tmp_path / "best.pt", qmodel, config)]) == 2
    assert "best.pt: is not a float network; train one with --bit 32" in capsys.readouterr().err
    assert ptq.main([str(tmp_path / "absent.pt")]) == 2
    assert "absent.pt: no such file" in capsys.readouterr().err
