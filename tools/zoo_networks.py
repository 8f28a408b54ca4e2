"""The float networks that tools/zoo.py takes, with random weights, each with a small input."""

import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from bench_common import Skip, import_or_skip
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo_init import bind, initialize_from_data
from zoo_transformers import RECIPES, VOCABULARY, WIDTH, Recipe, text

BATCH = 2  # batch norm needs two values where the map is a single pixel
PIXELS = (64, 96, 112, 128, 192, 224, 256, 299)
CLIPS = ((4, 64), (8, 112), (16, 224))  # (frames, pixels)
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())  # ultralytics writes its settings there
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
AUXILIARY_HEADS = ("googlenet", "inception_v3")
# The smallest network of every family of timm, and those that were taken before.
TIMM = (
    "beit_base_patch16_224", "halonet_h1", "mobileone_s1", "cait_xxs24_224", "coat_tiny", "convit_tiny",
    "convmixer_768_32", "convnext_atto", "cpubone_nano", "crossvit_tiny_240", "csatv2", "cs3darknet_focus_s",
    "cspnext_tiny", "davit_tiny", "deepseek_vit_412m", "deit_tiny_patch16_224", "densenet121", "dla46x_c", "dpn48b",
    "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "mobilenetv2_035", "efficientvim_m1",
    "efficientvit_b0", "efficientvit_m0", "vit_tiny_patch16_dinov3_qkvb", "fasternet_t0", "fastvit_t8",
    "focalnet_tiny_srf", "gcvit_xxtiny", "gemma4_vit_167m", "ghostnet_050", "hardcorenas_b", "hgnetv2_b0",
    "hiera_tiny_224", "sam2_hiera_tiny", "hrnet_w18_small", "iformer_t", "inception_next_atto", "inception_resnet_v2",
    "inception_v3", "inception_v4", "lcnetv2_small", "levit_128s", "lowformer_b0", "mambaout_femto",
    "maxvit_pico_rw_256", "poolformerv2_s12", "gmlp_ti16_224", "mobilenetv3_small_050", "mobilenetv5_base",
    "mobilevit_xxs", "mvitv2_tiny", "naflexvit_base_patch16_parfac_gap", "nasnetalarge", "nest_tiny", "nextvit_small",
    "nf_regnet_b0", "pit_ti_224", "pnasnet5large", "pvt_v2_b0", "qwen3_vit_88m", "rdnet_tiny", "regnetx_002",
    "repghostnet_050", "repvit_m1", "res2next50", "resnest14d", "resnet10t", "resnetv2_18", "rexnet_100",
    "selecsls42", "legacy_seresnet18", "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s050", "swiftformer_xs",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window16_256", "swinv2_cr_tiny_224", "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small", "vgg11", "visformer_tiny", "vit_tiny_patch16_224",
    "vit_tiny_r_s16_p8_224", "vit_srelpos_small_patch16_224", "samvit_base_patch16_224", "vitamin_small_224",
    "volo_d1_224", "ese_vovnet19b_slim_dw", "legacy_xception", "xception41p", "xcit_nano_12_p8_224", "resnet18",
    "resnetv2_50x1_bit", "eca_nfnet_l0", "efficientnet_b0", "tf_efficientnet_b0", "deit_tiny_distilled_patch16_224",
    "mixer_s32_224", "resmlp_12_224", "poolformer_s12", "coat_lite_tiny", "maxxvit_rmlp_nano_rw_256", "regnety_002",
    "dla46_c", "xception41", "repvgg_a0", "xcit_nano_12_p16_224",
)  # fmt: skip
# What makes the smallest of a family small enough.
TIMM_OPTIONS = {
    "deepseek_vit_412m": {"depth": 2}, "gemma4_vit_167m": {"depth": 2}, "qwen3_vit_88m": {"depth": 2},
    "naflexvit_base_patch16_parfac_gap": {"depth": 2}, "samvit_base_patch16_224": {"depth": 2},
    "beit_base_patch16_224": {"depth": 2},
}  # fmt: skip
SMP = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN", "UPerNet",
       "Segformer")  # fmt: skip
YOLO = {
    "yolov3-tiny": "Detection", "yolov5n": "Detection", "yolov6n": "Detection", "yolov8n": "Detection",
    "yolov8n-cls": "Classification", "yolov8n-seg": "Segmentation", "yolov8n-pose": "Pose", "yolov8n-obb": "OBB",
    "yolov9t": "Detection", "yolov10n": "Detection", "yolo11n": "Detection", "yolo12n": "Detection",
    "yolo26n": "Detection",
}  # fmt: skip


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
    """Names, and how the network of a name is built; `package` is what it comes from, by importing `module`."""

    names: Callable[[], list[str]]
    build: Callable[[str], Subject]
    package: str = "torchvision"
    module: str = "torchvision"


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
    clips = (image_like(BATCH, 3, frames, pixels, pixels) for frames, pixels in CLIPS)
    return fitted(torchvision.models.get_model(name, weights=None), clips)


def build_detection(name: str) -> Subject:
    """The backbone alone; what finds boxes around it depends on the values that it computes."""
    return fitted(torchvision.models.get_model(name, weights=None, weights_backbone=None).backbone, images())


def build_timm(name: str) -> Subject:
    """At the smallest image that its constructor, or else its forward, takes."""
    create = functools.partial(import_or_skip("timm").create_model, name, **TIMM_OPTIONS.get(name, {}))
    config = import_or_skip("timm").get_pretrained_cfg(name)
    usual = config.input_size[-1]
    if not config.fixed_input_size:
        least = (config.min_input_size or (0,))[-1]
        return fitted(create(), images([pixels for pixels in PIXELS if pixels >= least]))
    for pixels in (p for p in PIXELS if p < usual):
        try:
            return fitted(create(img_size=pixels), images([pixels]))
        except Exception:  # a network may refuse a size in any way
            continue
    return fitted(create(), images([usual]))


def build_transformers(name: str) -> Subject:
    return fitted(RECIPES[name].build(), [RECIPES[name].inputs(BATCH)])


def build_symbolic(name: str) -> Subject:
    """Traced by transformers' own tracer."""
    symbolic_trace = import_or_skip("transformers.utils.fx").symbolic_trace
    inputs = text(BATCH)
    return fitted(symbolic_trace(SYMBOLIC[name].build(), list(inputs)), [inputs])


SYMBOLIC = {
    name: Recipe(f"{name}ForSequenceClassification", text, settings | {
        "class": f"{name}Config", "vocab_size": VOCABULARY, "attn_implementation": "eager"})
    for name, settings in {
        "Bert": WIDTH, "DistilBert": {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
    }.items()
}  # fmt: skip


def build_smp(name: str) -> Subject:
    smp = import_or_skip("segmentation_models_pytorch")
    return fitted(getattr(smp, name)("resnet18", encoder_weights=None, classes=4), images())


def build_yolo(name: str) -> Subject:
    model = getattr(import_or_skip("ultralytics.nn.tasks"), f"{YOLO[name]}Model")
    return fitted(model(f"{name}.yaml", verbose=False), images())


def image_like(*shape: int) -> Tensor:
    """Large areas of color, another in each image, and some noise: images that a mean can tell apart."""
    areas = F.interpolate(torch.randn(*shape[:2], *(2 for _ in shape[2:])), shape[2:])
    return areas + torch.randn(shape) / 4


def images(sizes: Sequence[int] = PIXELS) -> Iterable[Tensor]:
    return (image_like(BATCH, 3, pixels, pixels) for pixels in sizes)


def fitted(model: nn.Module, candidates: Iterable[Tensor | Mapping[str, Tensor]]) -> Subject:
    """`model` in training mode, initialized on the first inputs that it takes; raises what it says of the last."""
    for inputs in candidates:
        try:
            macs = count_macs(model.eval(), inputs)
        except Exception as error:  # a network may refuse a size in any way
            refusal = error
            continue
        initialize_from_data(model, inputs)
        return Subject(model.train(), inputs, macs)
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
    "timm": NetworkList(lambda: list(TIMM), build_timm, "timm", "timm"),
    "transformers": NetworkList(
        lambda: list(RECIPES), build_transformers, "transformers", "transformers.modeling_utils"
    ),
    "transformers-fx": NetworkList(
        lambda: list(SYMBOLIC), build_symbolic, "transformers", "transformers.modeling_utils"
    ),
    "smp": NetworkList(lambda: list(SMP), build_smp, "segmentation_models_pytorch", "segmentation_models_pytorch"),
    "yolo": NetworkList(lambda: list(YOLO), build_yolo, "ultralytics", "ultralytics.nn.tasks"),
}


def missing(name: str) -> str | None:
    """Why the list `name` cannot be had here."""
    try:
        import_or_skip(LISTS[name].module.partition(".")[0])
    except Skip as skip:
        return str(skip)
    return None
