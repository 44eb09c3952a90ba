"""Training, evaluation and what they need: the engine that the searches share."""

from .allocator import tune_allocator
from .convergence import Convergence, CosineEpochs, SteppedEpochs, StoppingRule, Training
from .device import check_device, wait_for
from .distillation import TeacherMaps, growth_loss, label_loss, logit_loss, numbered, teacher_logits
from .evaluation import Latency, accuracy, confusion, exit_confusions, measure_latency
from .fit import FitData, FitRecord, classification_loss, fit
from .interrupts import Interrupted, Interrupts
from .node_measures import NodeMeasure, measure
from .precision import autocast, resolve_precision
from .step import CaptureError, FitConfig, Loss, load_optimizer, make_adam, make_sgd

__all__ = [
    "CaptureError", "Convergence", "CosineEpochs", "FitConfig", "FitData", "FitRecord", "Interrupted", "Interrupts", "Latency", "Loss",
    "NodeMeasure", "SteppedEpochs", "StoppingRule", "TeacherMaps", "Training", "accuracy", "autocast", "check_device",
    "classification_loss", "confusion", "exit_confusions", "fit", "growth_loss", "label_loss", "load_optimizer", "logit_loss", "make_adam",
    "make_sgd", "measure", "measure_latency", "numbered", "resolve_precision", "teacher_logits", "tune_allocator", "wait_for",
]
