"""Training, evaluation and what they need: the engine that both searches share."""

from .allocator import tune_allocator
from .convergence import Convergence, CosineEpochs, SteppedEpochs, StoppingRule, Training
from .device import check_device
from .distillation import TeacherMaps, growth_loss, label_loss, logit_loss, numbered, teacher_logits
from .evaluation import Latency, accuracy, confusion, measure_latency
from .fit import FitConfig, FitData, FitRecord, Loss, classification_loss, fit
from .interrupts import Interrupted, Interrupts
from .node_measures import NodeMeasure, measure
from .precision import autocast, resolve_precision

__all__ = ["Convergence", "CosineEpochs", "FitConfig", "FitData", "FitRecord", "Interrupted", "Interrupts", "Latency", "Loss",
           "NodeMeasure", "SteppedEpochs", "StoppingRule", "TeacherMaps", "Training", "accuracy", "autocast", "check_device",
           "classification_loss", "confusion", "fit", "growth_loss", "label_loss", "logit_loss", "measure", "measure_latency",
           "numbered", "resolve_precision", "teacher_logits", "tune_allocator"]
