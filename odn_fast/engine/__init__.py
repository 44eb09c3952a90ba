"""Training, evaluation and what they need: the engine that both searches share."""

from .allocator import tune_allocator
from .convergence import Convergence, CosineEpochs, Training
from .evaluation import Latency, accuracy, confusion, measure_latency
from .fit import FitConfig, FitData, FitRecord, classification_loss, fit
from .interrupts import Interrupted, Interrupts
from .precision import autocast, resolve_precision

__all__ = ["Convergence", "CosineEpochs", "FitConfig", "FitData", "FitRecord", "Interrupted",
           "Interrupts", "Latency", "Training", "accuracy", "autocast", "classification_loss", "confusion", "fit",
           "measure_latency", "resolve_precision", "tune_allocator"]
