"""Classify images with a network that a search has left: `python -m odn_fast.predict MODEL IMAGE...`."""

import argparse
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor

from .data import DataError, Normalisation, read_image
from .export import Description, ModelError, describe, load


class Predictor:
    """A network with its pre-processing: the same as on validation.

    Args:
        folder: `model/` of a run, or the run folder.

    Raises:
        ModelError: the folder does not hold a usable network.
    """

    def __init__(self, folder: str | Path):
        self.description: Description = describe(folder)
        self._network = load(folder, fold=True)
        given = self.description.input
        logits = self._network(torch.zeros(1, *given.shape))
        if logits.shape != (1, len(self.description.class_names)):
            raise ModelError(f"model {folder}: gives outputs of {tuple(logits.shape)} for "
                             f"{len(self.description.class_names)} class names; network.json is damaged")
        self._normalisation = Normalisation(given.scale, given.mean, given.std)

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities (N, K) of images (N, C, H, W) as the data set stores them (uint8, 0..scale)."""
        return torch.softmax(self._network(self._normalisation(images)), 1)

    def read(self, path: str | Path) -> Tensor:
        """An image file as the network's input (1, C, H, W): its channels and size, levels 0..255 mapped to 0..scale.

        Raises DataError if the file is no image, ModelError if the network was trained on numbers that are no levels.
        """
        given = self.description.input
        if given.scale == 1:
            raise ModelError("model: was trained on arrays of floats, so levels of an image file mean nothing to it; "
                             "use odn_fast.predict.Predictor.probabilities from Python")
        levels = read_image(path, *given.shape)
        return levels if given.scale == 255 else (levels.double() * given.scale / 255).round().to(torch.uint8)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 if an image could not be read, 2 for an unusable model."""
    parser = argparse.ArgumentParser(
        prog="python -m odn_fast.predict",
        description="Print the class and its probability in percent for every image, one line each. Images are brought to the "
                    "network's size (shorter side, then centre crop) and channels, as in validation. Digits and letters are "
                    "expected as in MNIST: bright on dark.")
    parser.add_argument("model", metavar="FOLDER", help="folder `model` of a run, or the run folder")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image file (PNG, JPEG, ...)")
    options = parser.parse_args(arguments)
    try:
        predictor = Predictor(options.model)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    status = 0
    for path in options.images:
        try:
            probability, index = predictor.probabilities(predictor.read(path))[0].max(0)
            print(f"{path}\t{predictor.description.class_names[index]}\t{100 * probability:.1f} %")
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
        except ModelError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # behind `| head`, it ends as other tools do
    sys.exit(main())
