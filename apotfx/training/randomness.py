"""Random numbers as functions of what they are for, so that nothing shifts them: no teacher, no monitor, no resumption."""

import hashlib
import random

import numpy as np
import torch


def seed_of(*key: object) -> int:
    """A seed of 64 bits that depends on every part of `key`: numbers and strings."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def seed_generators(device: torch.device, *key: object) -> None:
    """Start the generators that networks draw from, those of torch (on the CPU and on `device`), Python and numpy, anew."""
    seed = seed_of(*key)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a hundred times as long
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
