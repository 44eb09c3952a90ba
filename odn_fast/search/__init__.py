"""The searches.

    expand       the smallest depth of a network that meets a target accuracy: expansion, phases, depths, strategies, workers,
                 preview, state
    grow         a teacher's student, grown until it fills a budget: growth and growth_*
    grow_views   a radiance field, grown likewise: radiance_*

What they share: lifecycle, training, recorder, setup, display, options and resuming.
"""

from .expansion import Result, expand
from .growth import GrowResult, grow
from .radiance_growth import ViewsResult, grow_views, load_field
from .resuming import resume

__all__ = ["GrowResult", "Result", "ViewsResult", "expand", "grow", "grow_views", "load_field", "resume"]
