"""Networks by name: the ResNets and small networks of this package, and torchvision's classification networks."""

import difflib
import math
import os

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from apotfx.errors import ApotfxError
from apotfx.models.resnet import RESNETS, build_resnet
from apotfx.models.small import SMALL, build_small

PREFIX = "torchvision/"
IMAGE_SIZES = (32, 64, 96, 128, 160, 224, 299)


def list_models() -> list[str]:
    """Every name that `build_model` takes: this package's ResNets and small networks, then `torchvision/NAME`."""
    return [*RESNETS, *SMALL, *(PREFIX + name for name in _torchvision_names())]


def require_known(arch: str) -> None:
    """Raises ApotfxError, with the nearest names, if `build_model` does not know `arch`."""
    if arch not in list_models():
        raise ApotfxError(_unknown(arch))


def build_model(
    arch: str, *, in_channels: int, num_classes: int, image_size: int, max_parameters: int | None = None
) -> tuple[nn.Module, int]:
    """Build a float network, randomly initialized from torch's global generator.

    A network of torchvision's that cannot take images of `image_size` pixels takes the next larger size that
    works of 32, 64, 96, 128, 160, 224 and 299, and vgg7 takes 8 or more; the caller resizes the images to it.

    Args:
        arch: A name from `list_models()`.
        in_channels: Channels of the images, >= 1.
        num_classes: Number of outputs, >= 1.
        image_size: Height and width of the data set's images in pixels, >= 1.
        max_parameters: That it may have; None for what fills half of the memory.

    Returns:
        The network in training mode, images [B, in_channels, S, S] -> logits [B, num_classes], and its S.

    Raises:
        ApotfxError: The name is unknown, the network takes none of the sizes, or it has too many parameters, which is
            found before they take memory.
    """
    require_known(arch)
    try:
        with _Weightless():
            model, size = _build(arch, in_channels, num_classes, image_size)
        count = sum(parameter.numel() for parameter in model.parameters())
    except (RuntimeError, TypeError):  # a size beyond 64 bits
        count = math.inf
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8  # half of it, as float32
    if count > min(memory, max_parameters or memory):
        raise ApotfxError(
            f"{arch} for {num_classes} classes and {in_channels} channels of {image_size} pixels has {count} parameters, "
            f"expected at most {min(memory, max_parameters or memory)}; choose another network, or smaller images"
        )
    if arch.startswith(PREFIX):
        return _torchvision_model(arch.removeprefix(PREFIX), in_channels, num_classes, size).train(), size
    return _build(arch, in_channels, num_classes, image_size)


class _Weightless(TorchFunctionMode):
    """Networks that are built in its context have weights without memory, on the meta device."""

    MAKERS = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)  # not those that compute sizes of layers

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.MAKERS:
            kwargs = kwargs | {"device": "meta"}
        return function(*args, **kwargs)


def _build(arch: str, in_channels: int, num_classes: int, image_size: int) -> tuple[nn.Module, int]:
    if arch in RESNETS:
        return build_resnet(arch, in_channels=in_channels, num_classes=num_classes), image_size
    if arch in SMALL:
        return build_small(arch, in_channels=in_channels, num_classes=num_classes, image_size=image_size)
    return _fitted_torchvision_model(arch.removeprefix(PREFIX), in_channels, num_classes, image_size)


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _unknown(arch: str) -> str:
    close = difflib.get_close_matches(arch, list_models(), n=4)
    if PREFIX + arch in list_models():
        close.insert(0, PREFIX + arch)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"unknown network {arch!r}: {hint}apotfx.models.list_models() lists all of them"


def _fitted_torchvision_model(name: str, in_channels: int, num_classes: int, image_size: int) -> tuple[nn.Module, int]:
    model = None
    sizes = [image_size, *(size for size in IMAGE_SIZES if size > image_size)]
    for size in sizes:
        try:
            # Only ViT and MaxViT depend on the size, and they refuse it before they draw a weight.
            model = model or _torchvision_model(name, in_channels, num_classes, size)
            _run_on_meta(model, in_channels, size)
            return model.train(), size
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
    raise ApotfxError(
        f"{PREFIX}{name} takes none of the image sizes {sizes} ({reason}); choose another network or another image size"
    )


def _torchvision_model(name: str, in_channels: int, num_classes: int, image_size: int) -> nn.Module:
    options = {}
    if name.startswith("vit_"):
        options = {"image_size": image_size}
    elif name.startswith("maxvit_"):
        options = {"input_size": (image_size, image_size)}
    elif name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    _replace_first_conv(model, in_channels)
    return model


def _replace_first_conv(model: nn.Module, in_channels: int) -> None:
    path, conv = next((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if conv.in_channels != in_channels:
        model.set_submodule(
            path,
            nn.Conv2d(
                in_channels,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
                conv.bias is not None,
                conv.padding_mode,
            ),
        )


def _run_on_meta(model: nn.Module, in_channels: int, image_size: int) -> None:
    """Pass one image's shape through `model`, put in evaluation mode; raises what the network raises."""
    meta = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    image = torch.empty(1, in_channels, image_size, image_size, device="meta")
    with torch.no_grad():
        torch.func.functional_call(model.eval(), meta, image)
