import math
import os
import pickle
import random
import re
import resource
import signal
from dataclasses import asdict

import pytest
import torch
from torch import nn

import apotfx
from apotfx.errors import ApotfxError
from apotfx.tensors import Damaged, pack, unpack
from apotfx.state import uncalibrated
from apotfx.training.checkpoint import FORMAT, load_state, read_checkpoint, save_checkpoint
from apotfx.training.config import TrainConfig
from apotfx.training.published import convert_published


def small(bits=4):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    )
    return net if bits == 32 else apotfx.quantize(net, apotfx.BitPolicy.default(bits))


def content(model, **more):
    return {"config": asdict(TrainConfig()), "model": model.state_dict(), **more}


TRAINING = {
    "ema_count": 7,
    "momentum": {"0.weight": torch.ones(4, 1, 3, 3)},
    "step": 7,
    "seconds": 1.5,
    "clock": {"data": 0.25},
    "best": {"val_acc": 50.0, "epoch": 1},
    "running": {"loss": 1.0, "correct": 2.0, "images": 3.0},
    "made_with": {"threads": "2"},
}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_round_trip(tmp_path):
    model = small()
    save_checkpoint(tmp_path / "best.pt", content(model))
    checkpoint = read_checkpoint(tmp_path / "best.pt")
    assert equal(checkpoint.state, model.state_dict())
    assert checkpoint.config == TrainConfig() and checkpoint.resume is None and not checkpoint.is_float


def test_a_directory_means_its_last_checkpoint_and_the_average_comes_first(tmp_path):
    model, average = small(), small()
    with torch.no_grad():
        average.get_submodule("0").weight.add_(1)
    save_checkpoint(tmp_path / "checkpoint.pt", content(model, ema=average.state_dict(), **TRAINING))
    checkpoint = read_checkpoint(tmp_path)
    assert equal(checkpoint.state, average.state_dict())
    assert equal(checkpoint.resume["model"], model.state_dict())
    assert checkpoint.resume["step"] == 7
    assert checkpoint.best == TRAINING["best"] and checkpoint.made_with == {"threads": "2"}


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, content(small()))
    before = path.read_bytes()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large; what was there before is kept: '.*checkpoint.pt'"):
            save_checkpoint(path, content(small(5)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    "wrap", [lambda b: b, lambda b: {"format": "apotfx-checkpoint", "model": b}], ids=["bare", "inside"]
)
def test_pickled_code_is_refused_and_not_run(tmp_path, monkeypatch, wrap):
    monkeypatch.chdir(tmp_path)
    torch.save(wrap(Bomb()), "evil.pt")
    with pytest.raises(ApotfxError, match=r"evil\.pt: holds pickled code or is damaged, and was not run"):
        read_checkpoint("evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ApotfxError, match="plain.pt"):
        read_checkpoint("plain.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path, share):
    path = tmp_path / "best.pt"
    save_checkpoint(path, content(small()))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ApotfxError, match=r"best\.pt: .*damaged.*; use another copy") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = small()
    torch.nn.init.constant_(model.get_submodule("3").bias, float("nan"))
    save_checkpoint(tmp_path / "x.pt", content(model))
    with pytest.raises(ApotfxError, match="x.pt: 3.bias is not finite"):
        read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": 3}, "config is a int"),
        ({"config": {"bit": "4"}}, "bit is a str, which it cannot be"),
        ({"config": {"bit": 9}}, "--bit 9: expected 2 to 8"),
        ({"config": {"policy": {"rules": [{"bitz": 4}]}}}, "rule 1: unknown key 'bitz'"),
        ({"model": {}}, "model is a NoneType"),
        ({"version": 3}, "version is 3, expected a whole number from 2 to 2"),
        ({"made_with": {"torch": "2\n"}}, "made_with is not made of texts"),
        ({"ema": None}, "ema is absent, with --ema 0.998"),
        ({"step": -1}, "step is -1, expected a whole number"),
        ({"step": 1.0}, "step is 1.0, expected a whole number"),
        ({"step": 2**60}, "step is 1152921504606846976"),
        ({"seconds": "x"}, "seconds is x, expected a number"),
        ({"ema_count": True}, "ema_count is True"),
        ({"best": {}}, "best is absent"),
        ({"best": {"val_acc": 50, "epoch": 26}}, "best/epoch is 26"),
        ({"best": {"val_acc": 101, "epoch": 2}}, "best/val_acc is 101"),
        ({"running": {"loss": 1.0}}, "running/correct is None"),
        ({"clock": {"a\n": 1}}, "clock has parts without a name"),
        ({"momentum": {"x": torch.tensor(math.nan)}}, "x is not finite"),
    ],
    ids=str,
)
def test_a_checkpoint_made_by_hand_is_refused(tmp_path, change, message):
    model = small()
    made = content(model, ema=model.state_dict(), **TRAINING)
    save_checkpoint(tmp_path / "x.pt", made)
    assert read_checkpoint(tmp_path / "x.pt").resume is not None
    save_checkpoint(tmp_path / "x.pt", made | change)
    with pytest.raises(ApotfxError, match=re.escape(message)) as error:
        read_checkpoint(tmp_path / "x.pt")
    assert str(error.value).startswith(f"checkpoint {tmp_path}/x.pt: ") and "\n" not in str(error.value)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    for path in (tmp_path / "x.pt", "/dev/zero"):
        with pytest.raises(ApotfxError, match=f"checkpoint {path}: is not a file"):
            read_checkpoint(path)
    for name in ("a\0b", "x" * 300, "\udcff"):
        with pytest.raises(ApotfxError, match="^checkpoint [^:]+: no such file"):
            read_checkpoint(name)


def test_a_missing_checkpoint_is_named():
    with pytest.raises(ApotfxError, match=r"checkpoint nowhere\.pt: no such file"):
        read_checkpoint("nowhere.pt")


@pytest.mark.parametrize(
    "other", [{"a": 1}, [1, 2], {"state_dict": {"module.x": 1}}], ids=["dict", "list", "other script"]
)
def test_other_files_of_tensors_are_refused(tmp_path, other):
    torch.save(other, tmp_path / "x.pt")
    with pytest.raises(ApotfxError, match="not one of this tool's nor a published one"):
        read_checkpoint(tmp_path / "x.pt")


def test_another_architecture_is_refused_by_the_first_name_that_does_not_fit(tmp_path):
    save_checkpoint(tmp_path / "x.pt", content(small()))
    other = nn.Sequential(nn.Conv2d(1, 5, 3))
    with pytest.raises(
        ApotfxError,
        match=re.escape("(written by --arch resnet18): 0.weight is (4, 1, 3, 3), the network has (5, 1, 3, 3)"),
    ):
        load_state(other, read_checkpoint(tmp_path / "x.pt"), carry_over=True)


def test_carry_over_to_other_bits_keeps_weights_and_clips(tmp_path):
    source, target = small(4), small(2)
    apotfx.calibrate(source, [torch.rand(2, 1, 8, 8)])
    save_checkpoint(tmp_path / "x.pt", content(source))
    load_state(target, read_checkpoint(tmp_path / "x.pt"), carry_over=True)
    assert equal(target.state_dict(), source.state_dict())
    assert target.get_submodule("3").weight_quantizer.levels.bits == 2


def test_carry_over_from_float_leaves_the_clips_alone(tmp_path):
    save_checkpoint(tmp_path / "x.pt", content(small(32)))
    target = small(4)
    with torch.no_grad():
        target.get_submodule("3").weight.zero_()
        target.get_submodule("3").weight_quantizer.clip.fill_(1.25)
    load_state(target, read_checkpoint(tmp_path / "x.pt"), carry_over=True)
    assert torch.equal(target.get_submodule("3").weight, small(32)[3].weight)
    assert target.get_submodule("3").weight_quantizer.clip == 1.25


def test_published_names_become_ours():
    state = {
        "module.conv1.weight": torch.tensor([0.5, -2.0]),
        "module.layer1.0.conv1.weight": torch.ones(2),
        "module.layer1.0.conv1.act_alpha": torch.tensor(5.0),
        "module.layer1.0.conv1.weight_alpha": torch.tensor(-0.25),
        "module.fc.weight": torch.tensor([1.0]),
        "module.fc.bias": torch.tensor([3.0]),
    }
    converted = convert_published(state)
    assert converted["layer1.0.conv1.input_quantizer.clip"] == 5.0
    assert converted["layer1.0.conv1.weight_quantizer.clip"] == 0.25  # only its magnitude counts
    assert converted["conv1.weight_quantizer.clip"] == 2.0
    assert converted["fc.bias"] is state["module.fc.bias"]
    for name in ("module.fc.weight", "module.layer1.0.conv1.act_alpha"):
        for value in (torch.empty(0), torch.tensor([1])):
            with pytest.raises(Damaged, match=f"{name.removeprefix('module.')} holds no numbers|{name} holds no numbers"):
                convert_published(state | {name: value})


def test_a_weight_of_another_type_is_refused(tmp_path):
    model = small()
    state = model.state_dict() | {"0.weight": model.get_parameter("0.weight").detach().to(torch.int64)}
    save_checkpoint(tmp_path / "x.pt", content(model) | {"model": state})
    with pytest.raises(ApotfxError, match=re.escape("0.weight is (4, 1, 3, 3) int64, the network has (4, 1, 3, 3);")):
        load_state(small(), read_checkpoint(tmp_path / "x.pt"))


def test_flags_of_earlier_versions_are_read(tmp_path):
    source = apotfx.calibrate(small(), [torch.rand(2, 1, 8, 8)])
    state, stray = source.state_dict(), {"9.weight_quantizer.calibrated": torch.tensor(True)}
    flags = {f"{key.removesuffix('clip')}calibrated": torch.tensor(True) for key in state if key.endswith("quantizer.clip")}
    for saved in (state | stray, state | flags, state):
        save_checkpoint(tmp_path / "x.pt", content(source) | {"model": saved})
        target = small()
        load_state(target, read_checkpoint(tmp_path / "x.pt"))
        assert equal(target.state_dict(), state) and not uncalibrated(target)


def test_a_checkpoint_with_the_state_of_generators_is_read(tmp_path):
    generators = {f"random/{name}": torch.get_rng_state() for name in ("torch", "cuda")}
    save_checkpoint(tmp_path / "checkpoint.pt", content(small(), **TRAINING, ema=small().state_dict()))
    expected = read_checkpoint(tmp_path)
    tensors, document = unpack((tmp_path / "checkpoint.pt").read_bytes(), FORMAT)
    (tmp_path / "checkpoint.pt").write_bytes(pack(tensors | generators, document, FORMAT))
    found = read_checkpoint(tmp_path)
    assert equal(found.state, expected.state) and found.resume.keys() == expected.resume.keys()


def save_version_1(path, **more):
    torch.save({"format": "apotfx-checkpoint", "version": 1, **content(small(), ema=small().state_dict()), **more}, path)


def test_a_checkpoint_of_version_1_is_read(tmp_path):
    save_version_1(tmp_path / "best.pt", ema=None, val_acc=50.0, epoch=3)
    best = read_checkpoint(tmp_path / "best.pt")
    assert equal(best.state, small().state_dict()) and best.resume is None
    assert best.best == {"val_acc": 50.0, "epoch": 3}

    buffers = [torch.rand(4, 1, 3, 3), torch.rand(4)]
    training = {key: value for key, value in TRAINING.items() if key not in ("momentum", "made_with")}
    training["optimizer"] = {"state": {i: {"momentum_buffer": b} for i, b in enumerate(buffers)}, "param_groups": []}
    training["random"] = {"torch": torch.get_rng_state(), "cuda": [], "python": list(random.getstate()[1])}
    save_version_1(tmp_path / "checkpoint.pt", **training)
    last = read_checkpoint(tmp_path)
    assert equal(last.resume["momentum"], dict(enumerate(buffers))) and not last.made_with
    for change in ({"optimizer": 3}, {"optimizer": {"state": {0: 3}}}, {"version": "1"}):
        save_version_1(tmp_path / "checkpoint.pt", **(training | change))
        with pytest.raises(ApotfxError, match="damaged or made by hand"):
            read_checkpoint(tmp_path)
