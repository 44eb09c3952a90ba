"""Configuration: unknown keys refused, gaps filled from the data set's recipe, YAML there and back."""

import pytest
import yaml

from odn_fast.config import ConfigError, ExpandConfig, flat, from_values, parse_value, read_yaml, resolve, to_yaml


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
