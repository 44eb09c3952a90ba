"""Configuration of a search: pydantic models, unknown keys refused, read from and written to YAML.

A value left out is taken from the recipe of the data set (`RECIPES`); `resolve` fills every gap, so that a run's
`config.yaml` says everything. Nothing in a file is evaluated.
"""

import contextlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line."""


def parse_size(value: object) -> object:
    """A number of parameters or FLOPs written as "0.4M", "85k" or "400_000"; what is no text, as it is. Raises ValueError."""
    if not isinstance(value, str):
        return value
    written = re.fullmatch(r"([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([kMG]?)", value.strip())
    if written is None:
        raise ValueError("expected a number such as 400000, 85k or 0.4M")
    return round(float(written[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[written[2]])


def in_percent(value: float) -> float:
    """Refuse 0.97 where 97 is meant: every network reaches it. Raises ValueError."""
    if value < 1:
        raise ValueError("expected percent from 1 to 100, such as 97")
    return value


def written_as(pattern: str, meaning: str) -> AfterValidator:
    """Refuses a text that is not wholly of this regular expression; it says what is expected instead. Raises ValueError."""
    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValueError(f"expected {meaning}")
        return text

    return AfterValidator(check)


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=1, lt=2**63)]
Percent = Annotated[float, AfterValidator(in_percent), Field(le=100, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())


class DataConfig(_Section):
    dataset: str = "digits"
    data_dir: str = "data"
    image_size: Count | None = None
    val_fraction: Fraction | None = None
    test_fraction: Fraction | None = None
    limit_train: Count | None = None
    loader: Literal["auto", "resident", "dali", "torch"] = "auto"
    crop: Literal["centre", "random"] = "centre"
    corrupt_limit: Annotated[int, Field(ge=0)] = 10


class SearchConfig(_Section):
    target_accuracy: Percent | None = None
    tolerance: Annotated[float, Field(ge=0, lt=100)] = 0.5
    initial_depth: Count = 1
    max_depth: Count | None = None
    epochs_cap: Count | None = None
    epochs_per_depth: list[Count] | None = Field(default=None, min_length=1)
    strategy: Literal["linear", "parallel", "bisect"] = "linear"
    workers: Annotated[int, Field(ge=1, le=256)] | None = None
    measure_warm_up: bool = False
    require_target: bool = False
    baseline: Literal["none", "full"] = "none"


class TrainingConfig(_Section):
    batch_size: Annotated[int, Field(ge=2)] = 128
    lr: Positive | None = None
    deeper_lr_scale: Positive | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    warm_up_epochs: Annotated[int, Field(ge=0)] | None = None
    warm_up_lr: Positive | None = None


class RunConfig(_Section):
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "cpu"
    capture: bool = True
    checkpoint_minutes: Positive = 5.0
    malloc_tuning: bool = True


class ExpandConfig(_Section):
    """Everything that decides a depth search. `model` names a network; None stands for one handed over in Python."""

    model: str | None = "resnet18"
    data: DataConfig = DataConfig()
    search: SearchConfig = SearchConfig()
    training: TrainingConfig = TrainingConfig()
    run: RunConfig = RunConfig()


class TeacherConfig(_Section):
    file: str | None = None
    train: Literal["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"] | None = None
    epochs: Count | None = None
    lr: Positive | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4


class GrowthConfig(_Section):
    budget: Size | None = None
    budget_flops: Size | None = None
    max_flops: Size | None = None
    stage_epochs: Count = 10
    retrain_epochs: Count | None = None
    retrain_from: Literal["grown", "scratch"] = "grown"
    score: Literal["s", "r", "relative", "random"] = "s"
    c: Annotated[float, Field(ge=0, le=1)] = 0.5
    skip: Literal["auto", "always"] = "auto"
    standardize: bool = True
    width: Positive | None = None
    augment: Literal["none", "stages", "retrain", "both"] = "none"
    cache_gib: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 4.0
    controls: list[Literal["labels", "logits", "scratch"]] = ["labels", "logits"]


class GrowTrainingConfig(_Section):
    batch_size: Annotated[int, Field(ge=2)] | None = None
    lr: Positive = 0.025
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 3e-4


class GrowConfig(_Section):
    """Everything that decides a growth. Without `teacher.file` and `teacher.train` the teacher was handed over in Python."""

    kind: Literal["grow"] = "grow"
    teacher: TeacherConfig = TeacherConfig()
    data: DataConfig = DataConfig()
    growth: GrowthConfig = GrowthConfig()
    training: GrowTrainingConfig = GrowTrainingConfig()
    run: RunConfig = RunConfig()


class ViewsConfig(_Section):
    dataset: Annotated[str, written_as("analytic|views:.+", "analytic or views:FOLDER")] = "analytic"
    size: Count | None = None
    near: Positive = 2.0
    far: Positive = 6.0


class RadianceConfig(_Section):
    teacher: Annotated[str, written_as("[1-9][0-9]?x[1-9][0-9]{0,3}", "LAYERSxWIDTH, such as 4x64")] = "4x64"
    point_frequencies: Annotated[int, Field(ge=0, le=16)] = 6
    direction_frequencies: Annotated[int, Field(ge=0, le=16)] = 2
    start: Count | None = None
    step: Count | None = None
    budget_share: Fraction = 0.5
    score: Literal["r", "relative", "random"] = "r"
    teacher_epochs: Count = 40
    stage_epochs: Count = 3
    retrain_epochs: Count = 20
    controls: list[Literal["random", "half", "narrow"]] = ["random", "narrow"]


class RaysConfig(_Section):
    rays: Annotated[int, Field(ge=2)] = 256
    samples: Annotated[int, Field(ge=2)] = 32
    steps_per_epoch: Count = 50
    lr: Positive | None = None


class GrowViewsConfig(_Section):
    """Everything that decides the growth of a radiance field. An epoch is a number of steps, not a pass over all rays."""

    kind: Literal["grow-views"] = "grow-views"
    data: ViewsConfig = ViewsConfig()
    growth: RadianceConfig = RadianceConfig()
    training: RaysConfig = RaysConfig()
    run: RunConfig = RunConfig()


Config = TypeVar("Config", ExpandConfig, GrowConfig, GrowViewsConfig)

# Targets and learning rates of the paper's experiments and the authors' notebooks. Digits: one block solves the set
# when trained to convergence, so its search asks for the smallest depth that gets there within eight epochs.
_DEFAULT_RECIPE = {
    "search.target_accuracy": 95.0,
    "training.lr": 0.01,
    "training.deeper_lr_scale": 0.5,
    "training.warm_up_epochs": 3,
    "training.warm_up_lr": 1e-3,
}
RECIPES = {
    "digits": {"search.target_accuracy": 98.0, "search.epochs_cap": 8},
    "mnist": {"search.target_accuracy": 99.5},
    "fashion-mnist": {"search.target_accuracy": 94.5},
    "emnist-letters": {"search.target_accuracy": 95.0},
    "svhn": {"search.target_accuracy": 96.0, "training.lr": 0.1, "training.warm_up_lr": 0.01},
    "cifar100": {"search.target_accuracy": 70.0},
    "cifar10": {"search.target_accuracy": 94.5, "training.warm_up_epochs": 0, "training.deeper_lr_scale": 1.0},
}


_DEFAULT_GROW_RECIPE = {
    "teacher.train": "resnet56",
    "teacher.epochs": 200,
    "teacher.lr": 0.1,
    "growth.budget": 400_000,
    "growth.retrain_epochs": 400,
    "training.batch_size": 128,
}
# Digits: the whole growth, controls included, takes about a minute on one core, and no less on two: its steps are short.
GROW_RECIPES = {
    "digits": {"teacher.train": "resnet20", "teacher.epochs": 30, "teacher.lr": 0.05, "growth.budget": 85_000,
               "growth.retrain_epochs": 20, "training.batch_size": 64, "run.threads": 1},
}


def kind_named(name: object) -> type[ExpandConfig] | type[GrowConfig] | type[GrowViewsConfig]:
    """Of which search a configuration is, by its `kind` or a command's name; expand's has none."""
    return {"grow": GrowConfig, "grow-views": GrowViewsConfig}.get(str(name), ExpandConfig)


def from_values(values: dict[str, Any], base: dict | None = None, kind: type[Config] = ExpandConfig) -> Config:
    """A configuration from dotted values such as {"search.target_accuracy": 97}, laid over the nested dict `base`.

    kind: of which search.

    Raises:
        ConfigError: an unknown key or a value out of range, named with what is expected.
    """
    nested = _copied(base or {})
    for path, value in values.items():
        *sections, leaf = path.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{path}: {section!r} is not a section")
        if path not in flat(kind()):
            raise _unknown(path, kind)
        place[leaf] = value
    try:
        return kind.model_validate(nested)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise _unknown(path, kind) from None
        said = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}: {said[0].lower()}{said[1:]}, got {first['input']!r}") from None


def _unknown(path: str, kind: type[BaseModel]) -> ConfigError:
    return ConfigError(f"{path}: no such setting; settings are {', '.join(flat(kind()))}")


def resolve(config: Config) -> Config:
    """The same configuration with every value that depends on the data set filled in.

    Raises:
        ConfigError: settings that contradict each other.
    """
    recipe = {ExpandConfig: _expand_recipe, GrowConfig: _grow_recipe, GrowViewsConfig: _views_recipe}[type(config)](config)
    values = flat(config)
    values |= {path: value for path, value in recipe.items() if values[path] is None}
    return absolute_paths(from_values(values, kind=type(config)))


def _expand_recipe(config: ExpandConfig) -> dict[str, Any]:
    recipe = _DEFAULT_RECIPE | RECIPES.get(config.data.dataset, {})
    fixed = config.search.epochs_per_depth is not None
    if fixed and config.search.epochs_cap is not None:
        raise ConfigError("search.epochs_cap: does not go with search.epochs_per_depth, which fixes the epochs")
    if config.search.workers is not None and config.search.strategy != "parallel":
        raise ConfigError(f"search.workers: goes with --strategy parallel only; {config.search.strategy} trains one depth at a time")
    target = config.search.target_accuracy or recipe["search.target_accuracy"]
    if config.search.tolerance >= target:
        raise ConfigError(f"search.tolerance: expected less than the target, {target:g}, or any depth would pass; got "
                          f"{config.search.tolerance:g}")
    if fixed or "epochs_cap" in config.search.model_fields_set:  # given, perhaps as null: no cap
        recipe.pop("search.epochs_cap", None)
    return recipe


def _grow_recipe(config: GrowConfig) -> dict[str, Any]:
    recipe = _DEFAULT_GROW_RECIPE | GROW_RECIPES.get(config.data.dataset, {})
    growth, teacher = config.growth, config.teacher
    if teacher.file is not None:
        if teacher.train is not None:
            raise ConfigError("teacher.train: does not go with teacher.file, a teacher that is trained already")
        recipe.pop("teacher.train")
    if growth.budget_flops is not None:
        if growth.budget is not None:
            raise ConfigError("growth.budget_flops: does not go with growth.budget; give one budget")
        if growth.max_flops is not None:
            raise ConfigError("growth.max_flops: does not go with growth.budget_flops, which bounds the FLOPs already")
        recipe.pop("growth.budget")
    if len(set(growth.controls)) < len(growth.controls):
        raise ConfigError(f"growth.controls: names one twice: {', '.join(growth.controls)}")
    return recipe


def _views_recipe(config: GrowViewsConfig) -> dict[str, Any]:
    """The paper's 8x256 starts at 8x32 and grows by 32; others do in proportion. Small fields learn at larger rates."""
    width = int(config.growth.teacher.partition("x")[2])
    if len(set(config.growth.controls)) < len(config.growth.controls):
        raise ConfigError(f"growth.controls: names one twice: {', '.join(config.growth.controls)}")
    if config.data.near >= config.data.far:
        raise ConfigError(f"data.near: expected less than data.far, {config.data.far:g}, got {config.data.near:g}")
    part = max(1, width // 8)
    return {"growth.start": part, "growth.step": part, "training.lr": 5e-3 if width <= 128 else 5e-4}


def views_dataset(views: str | Path) -> str:
    """How a configuration names views: a folder of them, or "analytic"."""
    return "analytic" if str(views) == "analytic" else f"views:{views}"


def absolute_paths(config: Config) -> Config:
    """The same configuration with absolute paths: a run is resumed from any folder."""
    kind, colon, path = config.data.dataset.partition(":")
    dataset = f"{kind}:{Path(path).expanduser().resolve()}" if colon and path else config.data.dataset
    paths = {"data.dataset": dataset}
    if not isinstance(config, GrowViewsConfig):
        paths["data.data_dir"] = str(Path(config.data.data_dir).expanduser().resolve())
    if isinstance(config, GrowConfig) and config.teacher.file is not None:
        paths["teacher.file"] = str(Path(config.teacher.file).expanduser().resolve())
    return from_values(paths, config.model_dump(), type(config))


def flat(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """The configuration as dotted paths and plain values."""
    values = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file. Raises ConfigError if the file cannot be read or holds something else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"config {path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"config {path}: is not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: expected sections such as 'search:', got {type(values).__name__}")
    return values


def parse_value(setting: str, text: str) -> Any:
    """A value written as in YAML, such as 3, 1e-4, [2, 1] or null. Raises ConfigError naming `setting`."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"set {setting}: {text} is not a value; write it as in YAML, such as 3, 0.1, [2, 1] or null") from None
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # YAML reads 1e-4, without a point, as text
            return float(value)
    return value


def to_yaml(config: BaseModel) -> str:
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _copied(nested: dict) -> dict:
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in nested.items()}
