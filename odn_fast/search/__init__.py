"""The searches.

    expansion*            expand: the smallest depth of a network that meets a target accuracy
    growth*               grow: a teacher's student, grown until it fills a budget
    radiance*             grow_views: a radiance field, grown likewise

What they share: lifecycle, training, recorder, state, setup, display, options and resuming.
"""

from .expansion import Result, expand
from .growth import GrowResult, grow
from .radiance_growth import ViewsResult, grow_views, load_field
from .resuming import resume

__all__ = ["GrowResult", "Result", "ViewsResult", "expand", "grow", "grow_views", "load_field", "resume"]
