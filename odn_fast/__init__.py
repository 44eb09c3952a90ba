"""Finds the smallest network that meets a target, with fused kernels that need no compile step."""

__version__ = "0.1.0"

from . import _extension, models, nn, ops  # noqa: F401  (the extension registers its kernels on import)
from .export import load
from .models import profile

__all__ = ["__version__", "load", "models", "nn", "ops", "profile"]
