"""Configuration: unknown keys refused, gaps filled from the data set's recipe, YAML there and back."""

import pytest
import yaml

from odn_fast.config import (
    ConfigError, ExpandConfig, GrowConfig, flat, from_values, parse_size, parse_value, read_yaml, resolve, to_yaml)


def test_unknown_settings_are_refused_by_name():
    with pytest.raises(ConfigError, match="search.targt: no such setting; settings are model, data.dataset"):
        from_values({"search.targt": 97})


@pytest.mark.parametrize("path, value", [
    ("search.target_accuracy", 150), ("search.target_accuracy", 0), ("search.target_accuracy", float("nan")),
    ("search.tolerance", -1), ("search.initial_depth", 0), ("training.batch_size", 1), ("training.lr", 0),
    ("run.threads", 0), ("run.precision", "fp8"), ("data.val_fraction", 1.0), ("search.epochs_per_depth", []),
    ("run.seed", -1), ("search.baseline", "half"), ("training", 3)])
def test_values_out_of_range_are_one_line(path, value):
    with pytest.raises(ConfigError) as error:
        from_values({path: value})
    assert path in str(error.value) and "\n" not in str(error.value)


def test_a_value_is_no_section():
    with pytest.raises(ConfigError, match="not a section"):
        from_values({"model.name": "resnet18"}, {"model": "resnet18"})


def test_recipes_fill_what_was_left_out():
    digits = resolve(ExpandConfig())
    assert (digits.search.target_accuracy, digits.search.epochs_cap, digits.training.lr) == (98, 8, 0.01)
    svhn = resolve(from_values({"data.dataset": "svhn", "training.warm_up_lr": 0.5}))
    assert (svhn.training.lr, svhn.training.warm_up_lr, svhn.search.epochs_cap) == (0.1, 0.5, None)
    cifar = resolve(from_values({"data.dataset": "cifar10"}))
    assert (cifar.training.warm_up_epochs, cifar.training.deeper_lr_scale) == (0, 1)


def test_exact_epochs_leave_out_the_recipes_cap_and_refuse_a_given_one():
    assert resolve(from_values({"search.epochs_per_depth": [3, 2]})).search.epochs_cap is None
    with pytest.raises(ConfigError, match="does not go with"):
        resolve(from_values({"search.epochs_per_depth": [3, 2], "search.epochs_cap": 8}))


def test_yaml_there_and_back(tmp_path):
    config = resolve(from_values({"search.target_accuracy": 97, "search.epochs_per_depth": [2, 1]}))
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert from_values({}, read_yaml(path)) == config
    assert set(flat(config)) == set(flat(ExpandConfig()))


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "!!python/object/apply:os.system ['true']\n", "3\n", ""])
def test_files_that_are_no_configuration(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="config .*config.yaml"):
        read_yaml(path)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_written_yaml_is_plain():
    assert yaml.safe_load(to_yaml(ExpandConfig()))["model"] == "resnet18"


@pytest.mark.parametrize("text, value", [("3", 3), ("1e-4", 1e-4), ("null", None), ("[2, 1]", [2, 1]), ("full", "full"), ("", None)])
def test_values_of_set(text, value):
    assert parse_value("training.lr", text) == value


def test_value_of_set_that_is_none():
    with pytest.raises(ConfigError, match="set run.seed"):
        parse_value("run.seed", "[1")


def test_a_whole_section_is_no_setting():
    with pytest.raises(ConfigError, match="search: no such setting; settings are model"):
        from_values({"search": {"target_accuracy": 90}})


@pytest.mark.parametrize("text, size", [("0.4M", 400_000), ("63M", 63_000_000), ("85k", 85_000), ("400_000", 400_000),
                                        ("1.5G", 1_500_000_000), (".5M", 500_000), (85_000, 85_000)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["many", "0.4 m", "1e3", "", "-3", "4 000"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="growth.budget: expected a number such as 400000, 85k or 0.4M, got"):
        from_values({"growth.budget": text}, kind=GrowConfig)


@pytest.mark.parametrize("path, value", [
    ("growth.budget", "0"), ("growth.budget", "0.4 MB"), ("growth.budget_flops", -1), ("growth.score", "rank"), ("growth.c", 1.1),
    ("growth.controls", ["label"]), ("growth.width", 0), ("growth.cache_gib", -1), ("teacher.train", "resnet18"), ("kind", "expand"),
    ("training.batch_size", 1), ("growth.augment", True)])
def test_values_of_growth_out_of_range_are_one_line(path, value):
    with pytest.raises(ConfigError) as error:
        from_values({path: value}, kind=GrowConfig)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_settings_of_one_search_are_none_of_the_other():
    with pytest.raises(ConfigError, match="search.target_accuracy: no such setting; settings are kind, teacher.file"):
        from_values({"search.target_accuracy": 97}, kind=GrowConfig)
    with pytest.raises(ConfigError, match="growth.budget: no such setting; settings are model, data.dataset"):
        from_values({"growth.budget": 97})


def test_recipes_of_growth():
    digits = resolve(GrowConfig())
    assert (digits.teacher.train, digits.teacher.epochs, digits.growth.budget, digits.training.batch_size) == ("resnet20", 30, 85_000, 64)
    cifar = resolve(from_values({"data.dataset": "cifar10", "growth.budget_flops": "63M"}, kind=GrowConfig))
    assert (cifar.teacher.train, cifar.growth.budget, cifar.growth.budget_flops) == ("resnet56", None, 63_000_000)
    given = resolve(from_values({"teacher.file": "here.th"}, kind=GrowConfig))
    assert given.teacher.train is None and given.teacher.file.startswith("/") and given.growth.max_flops is None


@pytest.mark.parametrize("values, words", [
    ({"growth.budget": 1000, "growth.budget_flops": 1000}, "give one budget"),
    ({"growth.budget_flops": 1000, "growth.max_flops": 1000}, "bounds the FLOPs already"),
    ({"teacher.file": "x", "teacher.train": "resnet20"}, "does not go with teacher.file"),
    ({"growth.controls": ["labels", "labels"]}, "names one twice")])
def test_settings_of_growth_that_contradict_each_other(values, words):
    with pytest.raises(ConfigError, match=words):
        resolve(from_values(values, kind=GrowConfig))


def test_yaml_of_growth_there_and_back(tmp_path):
    config = resolve(from_values({"growth.budget": "0.1M", "growth.controls": []}, kind=GrowConfig))
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert yaml.safe_load(path.read_text())["growth"]["budget"] == 100_000
    assert from_values({}, read_yaml(path), GrowConfig) == config
