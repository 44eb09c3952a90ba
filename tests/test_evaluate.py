"""Accuracy of a network from the command line: its own data, other data, public checkpoints, and what is refused."""

import io
import json
import os
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from test_export import DESCRIPTION
from test_teachers import trained_looking

from odn_fast import data as data_sets
from odn_fast import evaluate
from odn_fast.config import from_values, resolve, to_yaml
from odn_fast.export import Description, NetworkInput, save_model
from odn_fast.models import create
from odn_fast.models.resnet import CifarResNet
from odn_fast.models.teachers import PUBLIC_MEAN, PUBLIC_STD

SEED = 3


def network(in_channels=1, classes=10):
    return trained_looking(create("resnet18", in_channels, classes)).extract(1).eval()


@torch.no_grad()
def undecided(kept, x, last):
    """Bring the classes' logits on x to one mean, so that an untrained network does not call every image the same."""
    last.bias -= kept(x).mean(0)
    assert len(kept(x).argmax(1).unique()) > 1
    return kept


def write_run(folder, kept, **data):
    """A run folder whose configuration names `data`, with the network `kept` as its model."""
    given = data_sets.load(data["dataset"], seed=SEED)
    shape, how = given.input_shape, given.normalisation
    description = Description(NetworkInput(shape, how.scale, how.mean, how.std), given.class_names, "resnet18", 1)
    for place in ("model", "depths/01"):
        save_model(folder / place, kept, description, {"data_checksum": given.checksum()})
    values = {f"data.{name}": value for name, value in data.items()}
    (folder / "config.yaml").write_text(to_yaml(resolve(from_values({"run.seed": SEED, **values}))))
    return folder


@pytest.fixture
def run(tmp_path):
    kept = network()
    undecided(kept, data_sets.load("digits").train.images / 16, kept.head)
    return write_run(tmp_path / "run", kept, dataset="digits"), kept


@pytest.fixture
def pictures(tmp_path):
    """A file of 80 training images, 3x8x8 with levels around 180, of four classes, and no test split."""
    images = numpy.random.default_rng(0).integers(120, 240, (80, 3, 8, 8), dtype=numpy.uint8)
    numpy.savez(tmp_path / "pictures.npz", x=images, y=numpy.arange(80) % 4)
    return f"npz:{tmp_path / 'pictures.npz'}"


def write_folder(path, classes=2, number=12):
    """A folder of pictures of 40 x 30 pixels, a class a sub-folder."""
    draw = numpy.random.default_rng(1)
    for k in range(classes):
        (path / f"class {k}").mkdir(parents=True)
        for index in range(number):
            Image.fromarray(draw.integers(60 * k, 60 * k + 120, (30, 40, 3), dtype=numpy.uint8)).save(path / f"class {k}" / f"{index}.png")
    return f"imagefolder:{path}"


@torch.no_grad()
def right_by_class(kept, x, y, classes):
    """"right of all" for each class."""
    right = kept(x).argmax(1) == y
    return [f"{int(right[y == k].sum())} of {int((y == k).sum())}" for k in range(classes)]


def evaluated(capsys, *arguments):
    """What a command that ends well prints, line by line, and what it warns of."""
    assert evaluate.main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err


@pytest.mark.parametrize("name, arguments", [("test", []), ("validation", ["--split", "validation"]), ("train", ["--split", "train"])])
def test_accuracy_and_counts_are_those_of_the_network_on_the_split_of_its_run(run, capsys, name, arguments):
    folder, kept = run
    split = getattr(data_sets.load("digits", seed=SEED), name)
    expected = right_by_class(kept, split.images / 16, split.labels, 10)
    right, images = (sum(int(text.split(" of ")[position]) for text in expected) for position in (0, 1))
    for place in (folder, folder / "model", folder / "depths" / "01"):
        said, warned = evaluated(capsys, place, "--batch-size", "100", "--threads", "1", *arguments)
        assert not warned and "resnet18, depth 1, 75,338 parameters, fp32" in said[0]
        assert f"digits, {name} split, {images:,} images" in said[1]
        assert said[2].startswith(f"accuracy {100 * right / images:.2f} % ({right:,} of {images:,} correct), ") and "images/s" in said[2]
        assert [line.split("%")[1].strip() for line in said[3:]] == expected


def test_another_seed_s_data_set_is_another(run, capsys):
    folder, _ = run
    manifest = folder / "model" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"data_checksum": "0"}))
    assert "its checksum differs): images it was trained on may be in any split" in evaluated(capsys, folder)[1]


def test_a_folder_without_a_run_needs_the_name_of_a_data_set(tmp_path, capsys):
    save_model(tmp_path / "alone", network(), DESCRIPTION, {})
    assert evaluate.main([str(tmp_path / "alone")]) == 2
    assert "dataset: is not known from the network; give --dataset NAME, one of mnist" in capsys.readouterr().err
    said, warned = evaluated(capsys, tmp_path / "alone", "--dataset", "digits")
    assert len(said) == 13 and not warned


def test_without_a_test_split_validation_is_read(tmp_path, pictures, capsys):
    folder = write_run(tmp_path / "run", network(3, 4), dataset=pictures)
    assert "validation split, 8 images of 3x8x8, 4 classes" in evaluated(capsys, folder)[0][1]
    assert evaluate.main([str(folder), "--split", "test"]) == 2
    assert "has no test split; choose --split validation" in capsys.readouterr().err


def test_a_network_sees_images_as_it_was_trained_on_them(tmp_path, pictures, capsys):
    """The mean and std are the network's, not the data set's; the level that stands for 1 is the data set's."""
    kept, mean, std = network(3, 4), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    split = data_sets.load(pictures).train
    x = (split.images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    undecided(kept, x, kept.head)
    save_model(tmp_path / "alone", kept, Description(NetworkInput((3, 8, 8), 9.0, mean, std), tuple("0123"), "own", 1), {})
    said, _ = evaluated(capsys, tmp_path / "alone", "--dataset", pictures, "--split", "train")
    assert [line.split("%")[1].strip() for line in said[3:]] == right_by_class(kept, x, split.labels, 4)


def test_a_public_checkpoint_sees_images_as_it_was_trained_on_them(tmp_path, pictures, capsys):
    kept = trained_looking(CifarResNet(20, 4))
    split = data_sets.load(pictures).train
    x = (split.images / 255 - torch.tensor(PUBLIC_MEAN)[:, None, None]) / torch.tensor(PUBLIC_STD)[:, None, None]
    undecided(kept, x, kept.linear)
    torch.save({"state_dict": {f"module.{key}": value for key, value in kept.state_dict().items()}}, tmp_path / "public.th")
    said, _ = evaluated(capsys, tmp_path / "public.th", "--dataset", pictures, "--split", "train")
    assert "ResNet-20, 269,332 parameters" in said[0]
    assert [line.split("%")[1].strip() for line in said[3:]] == right_by_class(kept, x, split.labels, 4)


def test_pictures_are_brought_to_the_size_of_the_network(tmp_path, capsys):
    folder = write_folder(tmp_path / "pictures")
    description = Description(NetworkInput((3, 16, 16), 255.0, (0.4,) * 3, (0.2,) * 3), ("class 0", "class 1"), "own", 1)
    save_model(tmp_path / "alone", network(3, 2), description, {})
    torch.save(CifarResNet(20, 2).state_dict(), tmp_path / "public.th")
    for given, size in (("alone", "3x16x16"), ("public.th", "3x32x32")):
        said, warned = evaluated(capsys, tmp_path / given, "--dataset", folder, "--split", "train")
        assert f"train split, 22 images of {size}, 2 classes" in said[1] and not warned


def test_classes_called_otherwise_are_said(tmp_path, capsys):
    other = Description(DESCRIPTION.input, ("zero", *"123456789"), "resnet18", 1)
    save_model(tmp_path / "alone", network(), other, {})
    assert "its classes are called otherwise than the network's ('0' where that has 'zero')" in evaluated(
        capsys, tmp_path / "alone", "--dataset", "digits")[1]


def test_many_classes_are_not_printed_one_by_one():
    names = tuple(map(str, range(31)))
    assert len(evaluate.lines(torch.eye(31), names, 1.0)) == 1 and len(evaluate.lines(torch.eye(30), names[:30], 1.0)) == 31
    assert evaluate.lines(torch.tensor([[3, 1], [0, 0]]), ("cat", "catfish"), 2.0) == [
        "accuracy 75.00 % (3 of 4 correct), 2 images/s, 2.0 s", "  cat       75.00 %  3 of 4", "  catfish       -    0 of 0"]


@pytest.mark.parametrize("arguments, words", [
    (["none.th"], "network none.th: does not exist; give a run's folder, or a checkpoint"),
    (["EMPTY", "--dataset", "digits"], "model EMPTY: no network.json in it"),
    (["broken.th", "--dataset", "digits"], "broken.th: is no checkpoint of tensors alone"),
    (["twenty.th", "--dataset", "digits"], "twenty.th: does not fit ResNet-20 on (1, 8, 8) images"),
    (["twenty.th", "--dataset", "PICTURES"], "twenty.th: has 10 classes, the data set 4"),
    (["RUN", "--dataset", "PICTURES"], "is for images of 1x8x8, npz:"),
    (["ALONE", "--dataset", "digits"], "has 4 classes, digits has 10; give the data set it was made for"),
    (["RUN", "--dataset", "minst"], "no data set is called 'minst'"),
    (["RUN", "--dataset", "npz:none.npz"], "none.npz"),
    (["RUN", "--batch-size", "0"], "batch-size: expected at least 1, got 0"),
    (["RUN", "--threads", "-1"], "threads: expected at least 1, got -1"),
    (["RUN", "--device", "cuda:77"], "device: cuda:77 is not usable here"),
    (["DAMAGED"], "is not the file that manifest.json was written for"),
    (["VIEWS"], "is a radiance field, which has no accuracy")])
def test_what_cannot_be_evaluated_is_one_line_and_status_2(run, pictures, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    for name in ("EMPTY", "VIEWS"):
        Path(name).mkdir()
    Path("VIEWS/config.yaml").write_text("kind: grow-views\n")
    Path("broken.th").write_text("no archive")
    torch.save(CifarResNet(20, 10).state_dict(), "twenty.th")
    save_model(Path("ALONE"), network(classes=4), Description(DESCRIPTION.input, tuple("0123"), "own", 1), {})
    save_model(Path("DAMAGED/model"), network(), DESCRIPTION, {})
    write_run(Path("DAMAGED"), network(), dataset="digits")
    (Path("DAMAGED") / "model" / "model.safetensors").write_bytes(b"no weights")
    places = {"RUN": str(run[0]), "PICTURES": pictures}
    assert evaluate.main([places.get(argument, argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ") and words in captured.err and not captured.out


@pytest.mark.gpu
def test_a_gpu_counts_the_same(run, capsys):
    here, there = (evaluated(capsys, run[0], "--device", device)[0] for device in ("cpu", "cuda"))
    assert abs(int(here[2].split("(")[1].split()[0]) - int(there[2].split("(")[1].split()[0])) <= 1  # two logits may all but agree


def test_ctrl_c_is_no_traceback(run, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "confusion", interrupted)
    assert evaluate.main([str(run[0])]) == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_and_time_left_are_for_terminals(run, monkeypatch, terminal):
    output = io.StringIO()
    output.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setenv("TERM", "xterm")
    assert evaluate.main([str(run[0]), "--batch-size", "30"]) == 0
    assert ("batches" in output.getvalue() and "10/10" in output.getvalue() and ":" in output.getvalue().split("10/10")[1]) is terminal
    assert ("\x1b" in output.getvalue()) is terminal


def test_help_names_every_option_and_two_commands(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    text = capsys.readouterr().out
    for option in ("--dataset", "--data-dir", "--split", "--batch-size", "--threads", "--device"):
        assert f"  {option} " in text, option
    assert sum("python -m odn_fast.evaluate " in line for line in text.split("examples:")[1].splitlines()) == 2
    assert "(default: 512)" in text and "default: test; validation where there is no test" in " ".join(text.split())


@pytest.mark.slow
@pytest.mark.skipif("ODN_FAST_DATA" not in os.environ, reason="needs CIFAR-10 and the public checkpoints: set ODN_FAST_DATA")
@pytest.mark.parametrize("file, accuracy", [("resnet20-12fca82f.th", 91.73), ("resnet56-4bfd9763.th", 93.39)])
def test_public_checkpoints_reach_their_published_accuracy(capsys, file, accuracy):
    folder = Path(os.environ["ODN_FAST_DATA"])
    said, warned = evaluated(capsys, folder / "teachers" / file, "--dataset", "cifar10", "--data-dir", folder)
    assert float(said[2].split()[1]) == pytest.approx(accuracy, abs=0.02) and not warned and len(said) == 13
