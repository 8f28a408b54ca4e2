"""ResNets in the published MNIST shape and in the CIFAR shape, under torchvision's module names."""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

STEM_CHANNELS = 16

MNIST_RESNETS = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet14": (BasicBlock, (2, 1, 1, 2)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
CIFAR_RESNETS = {f"resnet{6 * n + 2}": (BasicBlock, (n, n, n)) for n in (3, 5, 7, 9, 18)}
RESNETS = MNIST_RESNETS | CIFAR_RESNETS


class ResNet(nn.Module):
    """A ResNet with one stage per entry of `depths`; stage i has 16 * 2**i planes, all but the first halve.

    Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385.

    Args:
        block: torchvision's `BasicBlock` or `Bottleneck`.
        depths: Blocks per stage.
        in_channels: Channels C of the images.
        num_classes: Number of outputs.
        small_stem: 3x3 stride-1 stem without max-pool (CIFAR) instead of 7x7 stride 2 with it (ImageNet).

    Shapes: images [B, C, H, W] -> logits [B, num_classes], for any H and W.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        *,
        in_channels: int,
        num_classes: int,
        small_stem: bool,
    ):
        super().__init__()
        kernel_size, stride = (3, 1) if small_stem else (7, 2)
        self.conv1 = nn.Conv2d(in_channels, STEM_CHANNELS, kernel_size, stride, kernel_size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = None if small_stem else nn.MaxPool2d(3, stride=2, padding=1)
        channels = STEM_CHANNELS
        self.stages = [f"layer{i + 1}" for i in range(len(depths))]
        for i, (name, depth) in enumerate(zip(self.stages, depths)):
            planes = STEM_CHANNELS * 2**i
            self.add_module(name, _stage(block, channels, planes, depth, stride=1 if i == 0 else 2))
            channels = planes * block.expansion
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        if self.maxpool is not None:
            x = self.maxpool(x)
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(self.avgpool(x).flatten(1))


def build_resnet(name: str, *, in_channels: int, num_classes: int) -> ResNet:
    """The ResNet called `name`, a key of `RESNETS`."""
    block, depths = RESNETS[name]
    return ResNet(block, depths, in_channels=in_channels, num_classes=num_classes, small_stem=name in CIFAR_RESNETS)


def _stage(block: type[BasicBlock | Bottleneck], channels: int, planes: int, depth: int, stride: int) -> nn.Sequential:
    out_channels = planes * block.expansion
    downsample = None
    if stride != 1 or channels != out_channels:
        downsample = nn.Sequential(
            nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )
    rest = [block(out_channels, planes) for _ in range(depth - 1)]
    return nn.Sequential(block(channels, planes, stride, downsample), *rest)
