"""The program in torch, step by step: the definition of what an export computes, on any device."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from apotfx.errors import ApotfxError
from apotfx.graph.network import Network
from apotfx.integer.layers import IntegerLayer
from apotfx.integer.build import build_program
from apotfx.integer.program import Input, Program, Step, decode
from apotfx.modules import attribute


class IntegerNetwork(nn.Module):
    """Executes a program. What each step rounds, and how, its docstring says; between the steps nothing is rounded.

    Attributes:
        program: without foreign steps.

    Args:
        layers: the quantized layers, by name.
        tensors: the float tensors that the program refers to, by name.
        modules: those of the float network that foreign steps call. Other foreign steps are refused when they run.
    """

    def __init__(
        self,
        program: Program,
        layers: Mapping[str, IntegerLayer],
        tensors: Mapping[str, Tensor],
        modules: Mapping[str, nn.Module] = MappingProxyType({}),
    ):
        super().__init__()
        self.program = program
        self._names = {name: f"tensor_{i}" for i, name in enumerate(tensors)}
        for name, key in self._names.items():
            self.register_buffer(key, tensors[name])
        self._modules_called = (modules,)  # in a tuple: they are no submodules
        self._layer_list = nn.ModuleList(layers.values())
        self._layer_names = {name: i for i, name in enumerate(layers)}
        last: dict[str, Step] = {name: step for step in program.steps for name in step.inputs}
        self._results = set(program.results)
        self._unneeded = {
            step.name: [name for name in dict.fromkeys(step.inputs) if last[name] is step and name not in self._results]
            for step in program.steps
        }

    def layer(self, name: str) -> IntegerLayer:
        """The quantized layer of that name."""
        return self._layer_list[self._layer_names[name]]

    def tensor(self, name: str) -> Tensor:
        """The float tensor of that name."""
        return getattr(self, self._names[name])

    def module(self, name: str) -> nn.Module:
        """The module of the float network of that name."""
        if (reason := self.what_lacks()) is not None:
            raise ApotfxError(reason)
        return self._modules_called[0][name]

    def what_lacks(self) -> str | None:
        """Why the program cannot be executed; None if it can."""
        foreign = [step for step in self.program.foreign if step.module not in self._modules_called[0]]
        if not foreign:
            return None
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        return f"the step {foreign[0].name} ({foreign[0].calls}){more} can be computed only by the float network's code"

    @property
    def input_names(self) -> list[str]:
        """The arguments of `forward`, in order."""
        return [step.name for step in self.program.steps if isinstance(step, Input)]

    @torch.no_grad()
    def forward(self, *args: object, **kwargs: object) -> object:
        results = {step.name: value for step, value in self.run(args, kwargs) if step.name in self._results}
        return self.result(results)

    def run(self, args: tuple, kwargs: Mapping[str, object]) -> Iterator[tuple[Step, object]]:
        """(step, its value) of every step, in order; a value that no later step reads is forgotten."""
        values = self._bound(args, kwargs)
        for step in self.program.steps:
            if step.name not in values:
                values[step.name] = step.compute(self, *(values[name] for name in step.inputs))
            yield step, values[step.name]
            for name in self._unneeded[step.name]:
                del values[name]

    def result(self, values: Mapping[str, object]) -> object:
        """What the network returns, from the values of its steps."""
        return decode(self.program.outputs, [values[name] for name in self.program.results])

    def _bound(self, args: tuple, kwargs: Mapping[str, object]) -> dict[str, object]:
        inputs = [step for step in self.program.steps if isinstance(step, Input)]
        names = [step.name for step in inputs]
        given = dict(zip(names, args)) | dict(kwargs)
        missing = [step.name for step in inputs if step.required and step.name not in given]
        if len(args) > len(names) or given.keys() - names or missing:
            what = f"{missing[0]} is missing" if missing else f"got {len(args)} and {', '.join(kwargs) or 'no others'}"
            raise ApotfxError(f"the network takes the arguments {', '.join(names)}: {what}; pass these")
        return {step.name: given.get(step.name, step.default) for step in inputs}

    def extra_repr(self) -> str:
        return f"{len(self.program.steps)} steps"


def as_program(network: nn.Module) -> IntegerNetwork:
    """What `load_integer` returned, with or without the float model, as a network that executes a program.

    Raises:
        ApotfxError: it is none.
    """
    if isinstance(network, IntegerNetwork):
        return network
    layers = {name: module for name, module in network.named_modules() if isinstance(module, IntegerLayer)}
    if not isinstance(network, Network) or not layers:
        raise ApotfxError(
            f"network: expected what load_integer returns with backend reference, got a {type(network).__name__} without a "
            "graph of integer layers"
        )
    program = build_program(network)
    names = dict.fromkeys(name for step in program.steps for name in step.tensors())
    modules = {step.module: network.get_submodule(step.module) for step in program.foreign if step.module}
    return IntegerNetwork(program, layers, {name: attribute(network, name).detach() for name in names}, modules)


def shapes_of(network: IntegerNetwork, input_shape: tuple[int, ...]) -> dict[str, torch.Size]:
    """The shape of every value that is a tensor, for a single input of `input_shape`.

    Raises:
        ApotfxError: the network takes several inputs; or the shape is none.
    """
    if not isinstance(input_shape, (tuple, list)) or not all(type(size) is int and size > 0 for size in input_shape):
        raise ApotfxError(
            f"input_shape {input_shape!r}: expected sizes of at least 1, such as (channels, height, width)"
        )
    needed = [step.name for step in network.program.steps if isinstance(step, Input) and step.required]
    if len(needed) != 1:
        raise ApotfxError(
            f"the network takes the inputs {', '.join(needed)}, expected one; only such can be translated"
        )
    with torch.no_grad():
        values = network.run((torch.zeros(1, *input_shape),), {})
        return {step.name: value.shape for step, value in values if isinstance(value, Tensor)}
