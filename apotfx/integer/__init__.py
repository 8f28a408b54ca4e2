"""From a quantized network to integers: export, load, run, compare, and translate to ONNX and C."""
