"""The float networks that tools/zoo.py takes, with random weights, each with a small input."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torchvision
from bench_common import Skip, import_or_skip
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from apotfx.graph.tracing import bind

BATCH = 2  # batch norm needs two values where the map is a single pixel
PIXELS = (64, 96, 112, 128, 224, 256, 299)
CLIPS = ((4, 64), (8, 112), (16, 224))  # (frames, pixels)
AUXILIARY_HEADS = ("googlenet", "inception_v3")
TIMM = (
    "resnet18", "resnetv2_50x1_bit", "eca_nfnet_l0", "efficientnet_b0", "tf_efficientnet_b0", "mobilenetv3_small_050",
    "convnext_atto", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224", "mixer_s32_224", "resmlp_12_224", "poolformer_s12", "coat_lite_tiny",
    "maxxvit_rmlp_nano_rw_256", "regnety_002", "dla46_c", "inception_v4", "xception41", "repvgg_a0", "ghostnet_050",
    "hrnet_w18_small", "levit_128s", "mobilevit_xxs", "edgenext_xx_small", "efficientformer_l1", "xcit_nano_12_p16_224",
    "cait_xxs24_224", "volo_d1_224",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A float network and what to run it on.

    Attributes:
        model: in the mode in which it is to be quantized.
        inputs: a tensor, or tensors by keyword.
        macs: multiply-accumulates on `inputs` in evaluation, by operator; also of two activations, as in attention.
    """

    model: nn.Module
    inputs: Tensor | Mapping[str, Tensor]
    macs: Mapping[str, int]


@dataclass(frozen=True)
class NetworkList:
    """Names, and how the network of a name is built; `package` is what it comes from."""

    names: Callable[[], list[str]]
    build: Callable[[str], Subject]
    package: str = "torchvision"


def of_module(module) -> Callable[[], list[str]]:
    return functools.partial(torchvision.models.list_models, module=module)


def build_classification(name: str) -> Subject:
    options = {}
    if name.startswith("vit_"):
        patch = int(name.rpartition("_")[2])
        options["image_size"] = next(pixels for pixels in PIXELS if pixels % patch == 0)
    subject = fitted(torchvision.models.get_model(name, weights=None, **options), images())
    # With its auxiliary heads, which only train, a network has two outputs, one of which is not what it is for.
    subject.model.train(name not in AUXILIARY_HEADS)
    return subject


def build_segmentation(name: str) -> Subject:
    return fitted(torchvision.models.get_model(name, weights=None, weights_backbone=None), images())


def build_video(name: str) -> Subject:
    clips = (torch.randn(BATCH, 3, frames, pixels, pixels) for frames, pixels in CLIPS)
    return fitted(torchvision.models.get_model(name, weights=None), clips)


def build_detection(name: str) -> Subject:
    """The backbone alone; what finds boxes around it depends on the values that it computes."""
    return fitted(torchvision.models.get_model(name, weights=None, weights_backbone=None).backbone, images())


def build_timm(name: str) -> Subject:
    model = import_or_skip("timm").create_model(name, pretrained=False)
    config = model.default_cfg
    if config.get("fixed_input_size"):
        return fitted(model, images([config["input_size"][-1]]))
    least = config.get("min_input_size", (0,))[-1]
    return fitted(model, images([pixels for pixels in PIXELS if pixels >= least]))


def build_transformers(name: str) -> Subject:
    transformers = import_or_skip("transformers")
    transformers.logging.set_verbosity_error()
    config = getattr(transformers, f"{name}Config")(**TRANSFORMERS[name], vocab_size=100, attn_implementation="eager")
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    tokens = torch.randint(config.vocab_size, (BATCH, 16))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    traced = import_or_skip("transformers.utils.fx").symbolic_trace(model, list(inputs))
    return fitted(traced, [inputs])


TRANSFORMERS = {
    "Bert": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "DistilBert": {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
}


def images(sizes: tuple[int, ...] | list[int] = PIXELS) -> Iterator[Tensor]:
    return (torch.randn(BATCH, 3, pixels, pixels) for pixels in sizes)


def fitted(model: nn.Module, candidates: Iterator[Tensor] | list[Mapping[str, Tensor]]) -> Subject:
    """`model` in training mode, with the first inputs that it takes; raises what it says of the last."""
    for inputs in candidates:
        try:
            macs = count_macs(model.eval(), inputs)
            return Subject(model.train(), inputs, macs)
        except Exception as error:  # a network may refuse a size in any way
            refusal = error
    raise refusal


def count_macs(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> dict[str, int]:
    """By operator, in one run."""
    args, kwargs = bind(inputs)
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # FlopCounterMode cannot see into it, nor into fused attention
    try:
        # Without gradients FlopCounterMode stumbles over views of parameters.
        with torch.enable_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
    return {str(operator): flops // 2 for operator, flops in counter.get_flop_counts()["Global"].items()}


LISTS = {
    "classification": NetworkList(of_module(torchvision.models), build_classification),
    "segmentation": NetworkList(of_module(torchvision.models.segmentation), build_segmentation),
    "video": NetworkList(of_module(torchvision.models.video), build_video),
    "detection": NetworkList(of_module(torchvision.models.detection), build_detection),
    "timm": NetworkList(lambda: list(TIMM), build_timm, "timm"),
    "transformers": NetworkList(lambda: list(TRANSFORMERS), build_transformers, "transformers"),
}


def missing(name: str) -> str | None:
    """Why the list `name` cannot be had here."""
    try:
        import_or_skip(LISTS[name].package)
    except Skip as skip:
        return str(skip)
    return None
