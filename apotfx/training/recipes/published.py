"""The hyperparameters that the published MNIST networks were trained with, and their policy (`BitPolicy.published`).

    python tools/train.py --recipe published --arch resnet10 --bit 4

One learning rate throughout, no average of the weights, and flips, which mirror digits. Inputs of the first and the
last layer stay in float.

On MNIST, mean and standard deviation of two seeds, after the last epoch: ResNet-10 APoT 98.67 ± 0.04% of the test
images and 99.62 ± 0.09% of the training images at 5 bits, 98.64 ± 0.37 and 99.36 ± 0.13 at 4, 98.36 ± 0.25 and 99.00 ±
0.16 at 3, 97.65 ± 0.08 and 97.91 ± 0.16 at 2. One core of an AMD EPYC with AVX512-VNNI takes 5 minutes.
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
