"""Float networks for image classification; they know nothing of quantization."""

from apotfx.models.zoo import build_model, list_models, require_known

__all__ = ["build_model", "list_models", "require_known"]
