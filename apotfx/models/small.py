"""Small networks without batch norm: a perceptron, a VGG and a vision transformer.

Test accuracy in float on MNIST, seed 0: `python tools/train.py --bit 32 --arch mlp --epochs 8` 98.69,
`--arch vgg7 --epochs 6` 99.54, `--arch vit --epochs 10` 98.86.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

MIN_VGG_SIZE = 8  # pixels, which three max-pools halve


class MLP(nn.Sequential):
    """Two hidden layers of 256 and 128 units with ReLU.

    Shapes: images [B, in_channels, image_size, image_size] -> logits [B, num_classes].
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: int):
        super().__init__(
            nn.Flatten(),
            nn.Linear(in_channels * image_size**2, 256),
            nn.ReLU(inplace=True),
            nn.Linear(256, 128),
            nn.ReLU(inplace=True),
            nn.Linear(128, num_classes),
        )


class VGG7(nn.Module):
    """Six 3x3 convolutions with ReLU, a max-pool after every second, and a linear layer; no batch norm.

    Very Deep Convolutional Networks for Large-Scale Image Recognition, https://arxiv.org/abs/1409.1556.

    Shapes: images [B, in_channels, image_size, image_size] -> logits [B, num_classes], for image_size >= 8.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: int):
        super().__init__()
        layers, channels = [], in_channels
        for planes in (16, 32, 64):
            for _ in range(2):
                layers += [nn.Conv2d(channels, planes, 3, padding=1), nn.ReLU(inplace=True)]
                channels = planes
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * (image_size // 8) ** 2, num_classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                # Without a batch norm behind it, torch's default would shrink the values from layer to layer.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class EncoderBlock(nn.Module):
    """Self-attention and a GELU perceptron, each behind a layer norm and beside a skip connection.

    Shapes: tokens [B, N, dim] -> the same.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer of four blocks over at least 4x4 patches (of 4x4 or more pixels), 64 wide, with four heads.

    An Image is Worth 16x16 Words, https://arxiv.org/abs/2010.11929; the mean over the patches takes the place of the
    class token.

    Shapes: images [B, in_channels, image_size, image_size] -> logits [B, num_classes].
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: int, *, dim: int = 64, depth: int = 4):
        super().__init__()
        patch = max(1, image_size // 4)
        self.patches = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image_size // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(EncoderBlock(dim, num_heads=4) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(tokens + self.positions)).mean(1))


SMALL: dict[str, Callable[[int, int, int], nn.Module]] = {"mlp": MLP, "vgg7": VGG7, "vit": ViT}


def build_small(name: str, *, in_channels: int, num_classes: int, image_size: int) -> tuple[nn.Module, int]:
    """The network called `name`, a key of `SMALL`, and the image size that it takes."""
    if name == "vgg7":
        image_size = max(image_size, MIN_VGG_SIZE)
    return SMALL[name](in_channels, num_classes, image_size), image_size
