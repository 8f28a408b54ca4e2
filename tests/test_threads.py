"""Loading and quantizing beside networks that run, in threads of one process."""

import threading
import time

import torch
from torch import nn
from torch.nn import functional as TF

from apotfx import BitPolicy, calibrate, export_integer, load_integer, quantize

SECONDS = 10


class Net(nn.Module):
    """With what tracing looks at: submodules, parameters of its own, an activation in place, a view that is written to."""

    def __init__(self):
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 8, 3), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        y = self.inner(self.conv(x))
        half = y[:, :4]
        half += 1
        return TF.linear(y.mean((2, 3)), self.weight)


def test_loading_and_quantizing_beside_running_networks(tmp_path):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    policy = BitPolicy.default(bits=4)
    qmodel = calibrate(quantize(model, policy).eval(), [x])
    path = export_integer(qmodel, tmp_path / "export")
    imodel = load_integer(path, model)
    with torch.no_grad():
        served = [(network, network(x)) for network in (model, qmodel, imodel, imodel)]
    failures, counts, end = [], dict.fromkeys(("serve", "load", "quantize"), 0), time.monotonic() + SECONDS

    def repeat(what, action):
        while time.monotonic() < end and not failures:
            try:
                with torch.no_grad():
                    action()
                counts[what] += 1
            except BaseException as error:  # whatever it is, it is a failure
                failures.append((what, repr(error)))

    def serve(network, expected):
        assert torch.equal(network(x), expected)

    def load():
        assert torch.equal(load_integer(path, model)(x), served[2][1])

    def quantize_again():
        again = calibrate(quantize(model, policy, example_inputs=x).eval(), [x])
        assert torch.equal(again(x), served[1][1])

    actions = [("serve", lambda s=s: serve(*s)) for s in served] + [("load", load)] * 2 + [("quantize", quantize_again)]
    threads = [threading.Thread(target=repeat, args=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and all(counts.values()), (failures, counts)
    with torch.no_grad():
        assert torch.equal(nn.Linear(4, 4)(x[0, 0, :, :4]).isfinite(), torch.ones(8, 4, dtype=torch.bool))
