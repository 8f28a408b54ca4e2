"""The hyperparameters that the published MNIST networks were trained with, and their policy (`BitPolicy.published`).

    python tools/train.py --recipe published --arch resnet10 --bit 4

One learning rate throughout, no average of the weights, and flips, which mirror digits. Inputs of the first and the last
layer stay in float.
"""

SETTINGS = {
    "batch_size": 128,
    "lr": 0.01,
    "weight_decay": 1e-4,
    "momentum": 0.9,
    "nesterov": False,
    "schedule": "constant",
    "augment": "flip",
    "ema": 0.0,
    "clip_init": "paper",
    "clip_lr": 1.0,
    "decay_all": True,
}
