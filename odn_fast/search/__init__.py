"""The searches: `expand` finds the smallest depth of a network that meets a target accuracy, `grow` grows a teacher's student."""

from .expansion import Result, expand
from .growth import GrowResult, grow
from .resuming import resume

__all__ = ["GrowResult", "Result", "expand", "grow", "resume"]
