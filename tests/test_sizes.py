"""tools/sizes.py."""

import pytest
import safetensors.torch
import sizes
import torch
from torch import nn

from apotfx import BitPolicy, Rule
from apotfx.models import build_model


@pytest.mark.parametrize("bits", range(2, 9))
def test_what_the_bits_allow(bits):
    model = nn.Sequential(nn.Conv2d(7, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5, 3))
    float_layer = Rule(name="3", scheme="float")
    policy = BitPolicy((float_layer, Rule(scheme="uniform", weight_bits=bits, activation_bits=8)))
    got, least = sizes.size(model, policy)
    codes = (5 * 7 * 3 * 3 * bits + 7) // 8
    biases, batch_norm, linear = 5, 2 * 5, 5 * 3 + 3
    assert least == codes + 4 * (biases + batch_norm + linear)
    tensors = model.state_dict() | {"0.weight_codes": torch.zeros(codes, dtype=torch.uint8)}
    tensors |= {"1.multiplier": torch.zeros(5), "1.offset": torch.zeros(5)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in ("0.weight", *(f"1.{key}" for key in model[1].state_dict()))}
    assert got == len(safetensors.torch.save(tensors))


@pytest.mark.parametrize("scheme", ["apot", "uniform"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_size_of_resnet18_is_what_its_bits_allow(bits, scheme):
    model, _ = build_model("torchvision/resnet18", **sizes.IMAGENET)
    got, least = sizes.size(model, BitPolicy.default(bits, scheme))
    ends = 64 * 3 * 7 * 7 + 1000 * 512
    batch_norms = 2 * (64 * 5 + 128 * 5 + 256 * 5 + 512 * 5)
    inner = sum(p.numel() for p in model.parameters()) - ends - 1000 - batch_norms
    assert least == ends + inner * bits // 8 + 4 * (1000 + batch_norms)
    assert least < got < 1.02 * least
    if bits == 4:
        assert got <= 0.14 * len(safetensors.torch.save(model.state_dict()))


def test_the_table(monkeypatch, capsys):
    monkeypatch.setitem(sizes.IMAGENET, "num_classes", 10)
    assert sizes.main(["--arch", "resnet20", "--scheme", "uniform"]) == 0
    header, rule, *rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert header[0].strip() == "bits" and set(rule[0]) == {"-"}
    assert [row[0].strip() for row in rows] == ["float32", *"2345678"]
    share = [float(row[2].strip().rstrip("%")) for row in rows]
    assert share[0] == 100 and share[1:] == sorted(share[1:])


def test_an_unknown_network_is_refused(capsys):
    assert sizes.main(["--arch", "resnet19"]) == 2
    assert "sizes.py: error: unknown network 'resnet19'" in capsys.readouterr().err
