import math
import os
import random
import re
import signal
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

import apotfx
from apotfx.errors import ApotfxError
from apotfx.training.checkpoint import read_checkpoint, save_checkpoint
from apotfx.training.config import TrainConfig
from apotfx.training.data import Dataset, Split
from apotfx.training.distributed import Processes
from apotfx.training.loop import Interrupted, Trainer, evaluate, first_non_finite
from apotfx.training.monitor import Monitor

CPU = torch.device("cpu")
CONFIG = TrainConfig(epochs=2, batch_size=8, lr=0.05, ema=0.9, augment="default")


def dataset(n=40, size=10):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 1, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(3, (n,), generator=generator)
    split = Split(images, labels)
    return Dataset("mnist", split, split, split, 3, (0.1,), (0.3,))


def network(bits=4, seed=1):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Dropout(0.1), nn.Linear(216, 3),
    )  # fmt: skip
    qmodel = apotfx.quantize(net, apotfx.BitPolicy.default(bits))
    return apotfx.calibrate(qmodel, [torch.rand(8, 1, 10, 10)]) if bits < 32 else qmodel


def trainer(config=CONFIG, model=None, teachers=(), data=None, device=CPU):
    data, model = data or dataset(), (model or network()).to(device)
    teachers = [teacher.to(device) for teacher in teachers]
    return Trainer(config, model, data, data.train.images.shape[-1], teachers, device, Processes(device.type))


def fit(t, path):
    path.mkdir(exist_ok=True)
    t.fit(path, Monitor(path, enabled=False), print_freq=100)
    return t


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_evaluate_counts_every_image_and_keeps_the_mode():
    data = dataset()

    class First(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), 3).float()

    model = First()
    accuracy = evaluate(model, data.test, data, 10, CPU, Processes("cpu"))
    assert accuracy == 100 * (data.test.labels == 0).sum().item() / 40
    assert model.training


@pytest.mark.parametrize("num_teachers", [1, 3])
def test_distillation_loss_against_its_formula(num_teachers):
    teachers = [network(32, seed).eval() for seed in range(num_teachers)]
    t = trainer(replace(CONFIG, teacher_weight=0.25, temperature=2.0, label_smoothing=0.1), teachers=teachers)
    images, labels = torch.rand(8, 1, 10, 10), torch.arange(8) % 3
    logits = torch.randn(8, 3)
    cross_entropy = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    for t.step in range(2 * num_teachers):
        p = torch.softmax(teachers[t.step % num_teachers](images).detach() / 2, 1)
        kl = (p * (p.log() - torch.log_softmax(logits / 2, 1))).sum(1).mean() * 4
        expected = (0.75 * cross_entropy + 0.25 * kl).item()
        (target,) = t._targets(images)
        assert t._loss(logits, labels, target).item() == pytest.approx(expected, rel=1e-5)


def test_teachers_in_turn_teach_the_mean_of_their_probabilities():
    teachers = [network(32, seed).eval() for seed in range(3)]
    t = trainer(replace(CONFIG, teacher_weight=1.0, temperature=2.0), teachers=teachers)
    images, labels = torch.rand(8, 1, 10, 10), torch.arange(8) % 3
    logits = torch.randn(8, 3, requires_grad=True)
    for t.step in range(3):
        (t._loss(logits, labels, *t._targets(images)) / 3).backward()
    p = sum(torch.softmax(teacher(images).detach() / 2, 1) for teacher in teachers) / 3
    expected = logits.detach().clone().requires_grad_()
    (nn.functional.kl_div(torch.log_softmax(expected / 2, 1), p, reduction="batchmean") * 4).backward()
    torch.testing.assert_close(logits.grad, expected.grad, rtol=1e-5, atol=1e-7)


def whole_and_resumed(tmp_path, stop_at, device):
    """Two trainers at the end of their training; the second went on from a checkpoint after `stop_at` steps."""
    whole = fit(trainer(device=device), tmp_path / "whole")

    class Stop(Exception):
        pass

    stopped = trainer(device=device)
    step = stopped._train_step

    def stopping_step(images, labels):
        if stopped.step == stop_at:
            stopped.save(tmp_path / "part")
            raise Stop
        step(images, labels)

    stopped._train_step = stopping_step
    with pytest.raises(Stop):
        fit(stopped, tmp_path / "part")
    torch.manual_seed(99)  # on which dropout does not depend
    resumed = trainer(model=network(), device=device)
    resumed.load_state_dict(read_checkpoint(tmp_path / "part").resume)
    assert resumed.step == stop_at
    return whole, fit(resumed, tmp_path / "part")


@pytest.mark.parametrize("stop_at", [1, 3, 5, 7])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, stop_at):
    whole, resumed = whole_and_resumed(tmp_path, stop_at, CPU)
    a, b = whole.state_dict(), resumed.state_dict()
    for key in ("model", "ema", "ema_count", "momentum", "step", "best", "running"):
        assert equal(a[key], b[key]), key
    best = [read_checkpoint(tmp_path / name / "best.pt") for name in ("whole", "part")]
    assert equal(best[0].state, best[1].state) and best[0].best == best[1].best


def test_a_run_of_an_earlier_version_resumes_to_the_same_bits(tmp_path):
    whole = fit(trainer(), tmp_path / "whole")
    stopped = trainer()
    stopped.model.train()
    for images, labels in islice(stopped.batches.epoch(0), 3):
        stopped._train_step(images, labels)
    state = stopped.state_dict()
    state["random"] = {"torch": torch.get_rng_state(), "cuda": [], "python": [1, 2, 3]}
    state["optimizer"] = stopped.optimizer.state_dict()
    del state["momentum"]
    old = {"format": "apotfx-checkpoint", "version": 1, "config": asdict(CONFIG), **state}
    (tmp_path / "part").mkdir()
    torch.save(old, tmp_path / "part" / "checkpoint.pt")
    resumed = trainer(model=network())
    resumed.load_state_dict(read_checkpoint(tmp_path / "part").resume)
    fit(resumed, tmp_path / "part")
    a, b = whole.state_dict(), resumed.state_dict()
    for key in ("model", "ema", "ema_count", "momentum", "step", "best", "running"):
        assert equal(a[key], b[key]), key


def stopped_after_an_epoch(path):
    """A trainer of one epoch that ended, and what its checkpoint holds."""
    t = fit(trainer(replace(CONFIG, epochs=1)), path)
    return t, read_checkpoint(path)


@pytest.mark.parametrize("state", ["missing", "older"])
def test_a_kill_between_the_checkpoint_and_the_best_weights_costs_nothing(tmp_path, state):
    t, checkpoint = stopped_after_an_epoch(tmp_path)
    expected = read_checkpoint(tmp_path / "best.pt")
    (tmp_path / "best.pt").unlink()
    if state == "older":
        older = {"model": t.model.state_dict(), "best": {"val_acc": 0.0, "epoch": 1}}
        save_checkpoint(tmp_path / "best.pt", t._identity() | older)
    resumed = trainer(replace(CONFIG, epochs=1))
    resumed.load_state_dict(checkpoint.resume)
    resumed.require_best(tmp_path)
    found = read_checkpoint(tmp_path / "best.pt")
    assert equal(found.state, expected.state) and found.best == expected.best == checkpoint.best


@pytest.mark.parametrize(("others", "is_taken"), [({"seed": 1}, False), ({"engine": "eager"}, True)], ids=str)
def test_best_weights_of_another_training_are_told(others, is_taken, tmp_path):
    t, _ = stopped_after_an_epoch(tmp_path)
    t.step += 1  # so that they cannot be written anew
    save_checkpoint(tmp_path / "best.pt", t._identity() | {"config": asdict(replace(t.config, **others)), "model": t.model.state_dict()})
    with nullcontext() if is_taken else pytest.raises(ApotfxError, match="is of another epoch or training, checkpoint.pt"):
        t.require_best(tmp_path)


def test_best_weights_that_are_lost_are_told(tmp_path):
    t, _ = stopped_after_an_epoch(tmp_path)
    t.step, t.best = t.step + 1, t.best | {"epoch": 2}
    for what in ("is of another epoch or training", "is missing"):
        with pytest.raises(ApotfxError, match=f"best.pt: {what}, checkpoint.pt beside it says epoch 2; put it back"):
            t.require_best(tmp_path)
        (tmp_path / "best.pt").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 11}, "here: is at step 11 of 10; it is of another training"),
        ({"momentum": {"9.weight": torch.ones(1)}}, "here: the momentum of 9.weight does not fit"),
        ({"momentum": {"0.weight": torch.ones(1)}}, "here: the momentum of 0.weight does not fit"),
        ({"momentum": {99: torch.ones(1)}}, "here: the momentum of 99 does not fit"),
        ({"model": {}}, "here: 0.weight is absent, the network has (4, 1, 3, 3)"),
        ({"ema": {"x": torch.ones(1)}}, "here: 0.weight is absent"),
    ],
    ids=str,
)
def test_a_state_of_another_training_is_refused(change, message):
    t = trainer()
    with pytest.raises(ApotfxError, match=re.escape(message)):
        t.load_state_dict(t.state_dict() | change, "here")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_after_the_step_and_saves(tmp_path, number):
    t = trainer()
    step = t._train_step

    def signalled_step(images, labels):
        step(images, labels)
        if t.step == 7:
            os.kill(os.getpid(), number)

    t._train_step = signalled_step
    with pytest.raises(Interrupted, match="step 7"):
        fit(t, tmp_path / "run")
    assert read_checkpoint(tmp_path / "run").resume["step"] == 7


def test_a_signal_that_was_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        t = trainer()
        step = t._train_step
        t._train_step = lambda *args: (step(*args), os.kill(os.getpid(), signal.SIGHUP))
        assert fit(t, tmp_path / "run").step == t.total_steps
    finally:
        signal.signal(signal.SIGHUP, before)


class Noisy(nn.Module):
    """Draws from every generator in each forward pass."""

    def __init__(self, model):
        super().__init__()
        self.model, self.drawn = model, []

    def forward(self, x):
        self.drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))
        return self.model(x) + self.drawn[-1][0]


def bits(t):
    return {key: t.state_dict()[key] for key in ("model", "ema", "momentum", "running", "best")}


def test_a_teacher_that_draws_random_numbers_shifts_nothing(tmp_path):
    config = replace(CONFIG, teacher_weight=0.0)
    alone = fit(trainer(config), tmp_path / "alone")
    taught = fit(trainer(config, teachers=[Noisy(network(32, 5)).train()]), tmp_path / "taught")
    assert len({*taught.teachers[0].drawn}) == 10  # another one in each step
    for key, value in bits(alone).items():
        assert equal(value, bits(taught)[key]), key


def test_random_numbers_between_steps_shift_nothing(tmp_path):
    results = []
    for disturbed in (False, True):
        t = trainer(model=Noisy(network()))
        step = t._train_step

        def disturbed_step(*batch, step=step):
            torch.rand(7), random.random(), np.random.rand()
            step(*batch)

        if disturbed:
            t._train_step = disturbed_step
        results.append((bits(fit(t, tmp_path / str(disturbed))), t.model.drawn[:10]))
    assert equal(*results)


def drawn_by(rank, step):
    t = trainer(model=Noisy(network()))
    t.processes.rank, t.step = rank, step
    t._train_step(torch.rand(8, 1, 10, 10, generator=torch.Generator().manual_seed(0)), torch.zeros(8, dtype=torch.long))
    return t.model.drawn[0]


def test_each_process_draws_its_own_numbers_and_goes_on_with_them():
    """They depend on the rank and the step, not on what was drawn before: a resumed process draws what it would have."""
    drawn = {(rank, step): drawn_by(rank, step) for rank in (0, 1) for step in (0, 3)}
    for numbers in zip(*drawn.values()):
        assert len({*numbers}) == 4
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    assert drawn_by(1, 3) == drawn[1, 3]


@pytest.mark.parametrize("option", [{}, {"amp": True}, {"ema": 0.0}, {"momentum": 0.0, "nesterov": False}], ids=str)
def test_training_learns_the_training_images(tmp_path, option):
    config = replace(CONFIG, epochs=40, augment="none", **option)
    t = fit(trainer(config), tmp_path / "run")
    assert evaluate(t.model, t.dataset.train, t.dataset, 10, CPU, Processes("cpu")) > 90  # chance is 40


@pytest.mark.parametrize("poison", ["weight", "input"])
def test_divergence_stops_names_the_place_and_keeps_the_checkpoint(tmp_path, poison):
    t = fit(trainer(replace(CONFIG, epochs=1)), tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    t.config = replace(t.config, epochs=2)
    if poison == "weight":
        nn.init.constant_(t.model.get_submodule("3").weight, math.nan)
        where = "parameter 3.weight"
    else:
        t.batches.std = torch.full((1, 1, 1), math.nan)
        where = "in the input images"
    with pytest.raises(ApotfxError, match=f"training diverged at step 5: the first value that is not finite is {where};"):
        fit(t, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_the_first_layer_that_is_not_finite_is_found_among_layers_and_gradients():
    model = network(32)
    assert first_non_finite(model, torch.rand(2, 1, 10, 10)) == "the loss"
    model.get_parameter("3.bias").grad = torch.full((6,), math.inf)
    assert first_non_finite(model, torch.rand(2, 1, 10, 10)) == "the gradient of 3.bias"
    nn.init.constant_(model.get_parameter("3.weight"), 3e38)
    assert first_non_finite(model, 1e3 * torch.rand(2, 1, 10, 10)) == "the output of 3"


def test_an_infinite_learning_signal_never_reaches_the_weights(tmp_path):
    t = trainer(model=network(32))
    before = {k: v.clone() for k, v in t.model.named_parameters()}
    images = torch.full((8, 1, 10, 10), math.inf)
    with pytest.raises(ApotfxError, match="diverged"):
        t._train_step(images, torch.zeros(8, dtype=torch.long))
    assert all(torch.equal(before[k], v) for k, v in t.model.named_parameters())


def test_unknown_batch_sizes_are_refused():
    with pytest.raises(ApotfxError, match="--batch-size 64: expected 1 to 40"):
        trainer(replace(CONFIG, batch_size=64))
