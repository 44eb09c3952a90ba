"""The searches.

`expand` finds the smallest depth of a network that meets a target accuracy, `grow` grows a teacher's student, `grow_views` a
radiance field.
"""

from .expansion import Result, expand
from .growth import GrowResult, grow
from .radiance_growth import ViewsResult, grow_views, load_field
from .resuming import resume

__all__ = ["GrowResult", "Result", "ViewsResult", "expand", "grow", "grow_views", "load_field", "resume"]
