from dataclasses import replace

import pytest
import torch
from test_loop import CONFIG, network
from torch import nn

from apotfx.training.optimization import MovingAverage, lr_factor, parameter_groups


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("constant", {0: 1, 0.5: 1, 1: 1}),
        ("step", {0: 1, 0.49: 1, 0.5: 0.1, 0.74: 0.1, 0.75: 0.01, 1: 0.01}),
        ("cosine", {0: 0.04, 0.05: 1, 0.525: 0.5, 1: 0}),
        ("onecycle", {0: 0.04, 0.15: 0.52, 0.3: 1, 0.65: 0.5, 1: 0}),
    ],
)
def test_schedules(schedule, values):
    for progress, factor in values.items():
        assert lr_factor(schedule, progress) == pytest.approx(factor, abs=1e-12)


def test_parameter_groups_hold_each_parameter_once():
    model = network()
    weights, scales, clips = parameter_groups(model, replace(CONFIG, clip_lr=0.5))
    learning = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(g["params"]) for g in (weights, scales, clips)) == len(learning) == len(list(model.parameters())) - 1
    assert [g["weight_decay"] for g in (weights, scales, clips)] == [CONFIG.weight_decay, 0, 0]
    assert [g["lr_factor"] for g in (weights, scales, clips)] == [1, 1, 0.5]
    assert len(clips["params"]) == 5 and all(p.dim() > 1 for p in weights["params"])
    assert all(
        g["weight_decay"] == CONFIG.weight_decay for g in parameter_groups(model, replace(CONFIG, decay_all=True))
    )


def test_moving_average_follows_its_formula():
    model = nn.Linear(1, 1, bias=False)
    average = MovingAverage(model, 0.5)
    expected = None
    for n in range(6):
        nn.init.constant_(model.weight, n * n)
        average.update_parameters()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = n * n if n == 0 else decay * expected + (1 - decay) * n * n
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-6)


def test_moving_average_by_a_tensor_is_the_one_by_a_number():
    """As on a GPU."""
    averages = []
    for make in (float, torch.tensor):
        torch.manual_seed(0)
        model = network()
        averages.append(MovingAverage(model, 0.9))
        for _ in range(5):
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter))
            averages[-1].average_in(make(averages[-1].next_weight()))
    assert averages[0].n_averaged == averages[1].n_averaged == 5
    for a, b in zip(*(average.module.parameters() for average in averages), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
