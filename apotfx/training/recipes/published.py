"""The hyperparameters that the published MNIST networks were trained with, and their policy (`BitPolicy.published`).

    python tools/train.py --recipe published --arch resnet10 --bit 4

One learning rate throughout, no average of the weights, and flips, which mirror digits. Inputs of the first and the
last layer stay in float.

On MNIST, one seed, after the last epoch: ResNet-10 98.65% of the test images and 99.56% of the training images at 5
bits, 98.90 and 99.45 at 4, 98.54 and 99.11 at 3, 97.71 and 98.02 at 2. One core of an AMD EPYC with AVX512-VNNI takes 5
minutes.
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
