"""Training: data, augmentation and the loop."""
