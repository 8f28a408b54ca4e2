"""From scratch in 25 epochs: what `tools/train.py` does if it is told nothing. The settings are `TrainConfig`'s own.

    python tools/train.py --arch resnet18 --bit 4
"""

SETTINGS: dict = {}
