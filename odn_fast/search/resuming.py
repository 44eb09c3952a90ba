"""Going on from Python with the run of any search."""

from pathlib import Path

from ..config import GrowConfig, GrowViewsConfig
from ..data import DataSet
from ..models import DepthNetwork
from ..models.teachers import Teacher
from .display import Display, Silent
from .expansion import Result, resume_expansion
from .growth import GrowResult, resume_growth
from .lifecycle import given_data, kind_of, settings_of
from .radiance_growth import ViewsResult, resume_views_growth


def resume(folder: str | Path, *, model: DepthNetwork | None = None, teacher: Teacher | None = None,
           dataset: DataSet | None = None, train=None, validation=None, test=None, class_names=None,
           progress: bool = False) -> Result | GrowResult | ViewsResult:
    """Go on with the run in `folder`, to the same bits that an uninterrupted run would have given.

    Args:
        model, teacher, dataset, train, validation, test, class_names: again what `expand` or `grow` was given, where it was
            no name.

    Raises:
        ConfigError, RunError, Interrupted: as `expand` and `grow`.
    """
    given = given_data(dataset, train, validation, test, class_names, settings_of(folder))
    display = Display() if progress else Silent()
    if kind_of(folder) is GrowViewsConfig:
        return resume_views_growth(folder, display=display)
    if kind_of(folder) is GrowConfig:
        return resume_growth(folder, teacher=teacher, data=given, display=display)
    return resume_expansion(folder, model=model, data=given, display=display)
