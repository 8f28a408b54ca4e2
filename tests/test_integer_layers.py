import re

import pytest
import torch
from helpers import INPUT_SHAPES, Conv1dNet, Net, check_equal, data, export_and_compare, policy, trained

from apotfx import ApotfxError, export_integer, load_integer
from apotfx.integer.layers import IntegerLayer


def test_other_threads_batches_and_layouts_give_the_same_bits(tmp_path):
    qmodel, model = trained(policy(scheme="uniform", weight_bits=8, activation_bits=8, granularity="channel"))
    imodel = export_and_compare(tmp_path, qmodel, model, data())
    x = data()
    with torch.no_grad():
        before = [layer.clone() for layer in _outputs(imodel, x)]
        assert len(before) == 5
        last = torch.channels_last
        for y in (_outputs(imodel, x.contiguous(memory_format=last)), _outputs(imodel.to(memory_format=last), x)):
            assert torch.equal(y[0], before[0])
    threads = torch.get_num_threads()
    try:
        for torch_threads in (1, 2):
            torch.set_num_threads(torch_threads)
            check_equal(qmodel, imodel, x)
    finally:
        torch.set_num_threads(threads)


def _outputs(model, x):
    """The outputs of all integer layers."""
    outputs, layers = [], [module for module in model.modules() if isinstance(module, IntegerLayer)]
    hooks = [layer.register_forward_hook(lambda *args: outputs.append(args[2])) for layer in layers]
    model(x)
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("model_type, shape, message", [
    (Net, (5, 1, 8, 8), "layer conv1: its input has the shape [5, 1, 8, 8], expected [N, 2, H, W]"),
    (Net, (5, 8, 8), "layer conv1: its input has the shape [5, 8, 8], expected [N, 2, H, W]"),
    (Net, (1, 5, 2, 8, 8), "layer conv1: its input has the shape [1, 5, 2, 8, 8], expected [N, 2, H, W]"),
    (Net, (), "layer conv1: its input has the shape [], expected [N, 2, H, W]"),
    (Conv1dNet, (5, 2, 9), "layer 4: its input has the shape [5, 36], expected [..., 32]"),
], ids=["channels", "one-dimension-less", "one-dimension-more", "no-dimension", "size"])  # fmt: skip
def test_an_image_of_another_shape_is_refused(model_type, shape, message, tmp_path):
    qmodel, model = trained(policy(), model_type)
    imodel = load_integer(export_integer(qmodel, tmp_path / "export"), model)
    with pytest.raises(ApotfxError, match=f"^{re.escape(message)}; pass images of the size and the channels"):
        imodel(torch.zeros(shape))
    assert imodel(torch.zeros(INPUT_SHAPES[model_type])).isfinite().all()


def test_autocast_changes_nothing(tmp_path):
    qmodel, model = trained(policy(scheme="uniform", weight_bits=8, activation_bits=8))
    imodel = load_integer(export_integer(qmodel, tmp_path / "export"), model)
    expected = imodel(data())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(imodel(data()), expected)
