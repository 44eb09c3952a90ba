"""An epoch's batches on the device: resident, through NVIDIA DALI, and from a DataLoader that treats one image at a time.

    pytest bench/bench_data.py -s

Grey 28x28 and, cropped and flipped, 32x32 colour images come from arrays, as MNIST and CIFAR-10 do; pictures of 320x240 come
from JPEG files, brought to 64x64. "loader" is the authors' way (`authors.py`): a PIL image, or a tensor where images are
augmented, through per-sample transforms, in this process, no workers; "plain" decodes the same files with Pillow in threads,
as `--loader torch` does. Each arm goes through the whole epoch, with all that beginning and ending one takes.

Before anything is timed, all arms give the same images where nothing is drawn: exactly where Pillow decodes, within one
level inside (DALI's border differs with noise) where DALI does.
"""

import statistics
import tempfile
import warnings
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch.utils.data import DataLoader

import authors
import harness
import harness_cuda
from odn_fast.data import DataError, Normalisation, Split, load, training_batches
from odn_fast.data.batches import Batches
from odn_fast.data.dali import ArrayBatches, need_dali
from odn_fast.data.image import fit, read_picture

BATCH = 128
IMAGES, PICTURES = (512, 128) if harness.QUICK else (8192, 512)
REACH, REACH_CUDA, REACH_IMAGES = 20.0, 50.0, 1e6  # over the loader and, on a GPU, images/s: of resident 28x28 images
SIZE = 64


def without_dali():
    """Why DALI is left out, or None."""
    try:
        need_dali()
    except DataError as error:
        return str(error)
    return None


class Files(authors.Single):
    """Pictures of files, brought to SIZE x SIZE; `images` are their paths."""

    def tensor(self, place):
        picture = fit(self.images[place], read_picture(self.images[place], "RGB"), SIZE, SIZE)
        return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1).float().div(255)


def passes(sources, device):
    """{arm: function that goes through an epoch}, from {arm: function that gives its batches}."""
    def through(batches):
        def run():
            for x in batches():
                x = x[0] if isinstance(x, (tuple, list)) else x
                x.to(device, non_blocking=True)
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
        return run

    return {name: through(batches) for name, batches in sources.items()}


def array_sources(split, how, augment):
    """resident, dali (where it is installed) and loader on a split of arrays."""
    def epoch(kind):
        return lambda: kind(split, how, BATCH, 0, augment).epoch("bench", 0)

    if augment:
        single = authors.Single(split.images.cpu(), 4, True, how.mean, how.std)
        loader = DataLoader(single, BATCH, shuffle=True)
    else:
        loader = authors.loader(Split(split.images.cpu(), split.labels.cpu()), how, BATCH, shuffle=True)
    dali = {} if without_dali() else {"dali": epoch(ArrayBatches)}
    return {"resident": epoch(Batches), **dali, "loader": lambda: loader}


def check_arrays(split, how, augment):
    """Ours and DALI's batches are alike, and the loader's images are ours."""
    ours = array_sources(split, how, augment)
    if "dali" in ours:
        for (x, y), (u, v) in zip(ours["resident"](), ours["dali"](), strict=True):
            assert torch.equal(y, v) and (x - u).abs().max() < 1e-4, "DALI's batches are others, so their speed says nothing"
    plain = authors.Single(split.images.cpu(), 0, False, how.mean, how.std)
    first = torch.stack([plain[place] for place in range(BATCH)])
    assert (first - how(split.images[:BATCH]).cpu()).abs().max() < 1e-5, "the loader's images are others"


def bench_arrays(channels, size, augment, device, repetitions):
    torch.manual_seed(0)
    split = Split(torch.randint(0, 256, (IMAGES, channels, size, size), dtype=torch.uint8), torch.randint(0, 10, (IMAGES,))).to(device)
    how = Normalisation(255, (0.4,) * channels, (0.3,) * channels)
    check_arrays(split, how, augment)
    return figures(passes(array_sources(split, how, augment), device), "resident", IMAGES, repetitions)


def write_pictures(root):
    """JPEG files that take as many bytes as photographs do: clouds of several sizes."""
    generator = numpy.random.default_rng(0)
    for number in range(PICTURES):
        layers = [Image.fromarray(generator.integers(0, 256, (240 // step, 320 // step, 3), dtype=numpy.uint8)).resize((320, 240))
                  for step in (60, 20, 5)]
        place = root / "train" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.blend(Image.blend(layers[0], layers[1], 0.4), layers[2], 0.2).save(place / f"{number:05}.jpg", quality=90)


def picture_sources(root, device):
    """resident, plain, dali (where it is installed) and loader on a folder of pictures, without a validation split to speak of."""
    def source(loader):
        data = load(f"imagefolder:{root}", image_size=SIZE, val_fraction=0.02, loader=loader).to(device)
        return data, lambda: training_batches(data, BATCH, 0, False).epoch("bench", 0)

    data, plain = source("torch")
    how = data.normalisation
    files = DataLoader(Files(data.train.files, 0, False, how.mean, how.std), BATCH, shuffle=True)
    dali = {} if without_dali() else {"dali": source("dali")[1]}
    return {"resident": source("resident")[1], "plain": plain, **dali, "loader": lambda: files}, how, len(data.train)


def check_pictures(sources, how, device):
    scale = 255 * torch.tensor(how.std, device=device)[:, None, None]
    for (x, _), (u, _) in zip(sources["resident"](), sources["plain"](), strict=True):
        assert torch.equal(x, u), "the plain reader's images are others"
    for (x, _), (u, _) in zip(sources["resident"](), sources.get("dali", sources["plain"])(), strict=True):
        assert ((x - u) * scale)[:, :, 1:-1, 1:-1].abs().max() < 2.5, "DALI's images are others, so their speed says nothing"
    kept = torch.cat([x for x, _ in sources["resident"]()]).mean()
    assert abs(torch.cat(list(sources["loader"]())).mean().to(device) - kept) < 1e-3, "the loader's images are others"


def bench_pictures(device, repetitions):
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder))
        sources, how, images = picture_sources(folder, device)
        check_pictures(sources, how, device)
        return figures(passes(sources, device), "plain", images, repetitions)


def figures(arms, ours, images, repetitions):
    """`over`: how many times as long as `ours` the other arms take."""
    measured = harness.measure(arms, repetitions, warm_up=1)
    times = measured.times
    return {
        "milliseconds": {"epoch": times}, "quiet": measured.quiet,
        "images_per_second": {name: 1e3 * images / statistics.median(each) for name, each in times.items()},
        "over": {name: harness.ratio(each, times[ours]) for name, each in times.items() if name != ours},
        "over_loader": {name: harness.ratio(times["loader"], each) for name, each in times.items() if name != "loader"},
    }


def results_on(device, repetitions):
    return {
        "28x28, grey": bench_arrays(1, 28, False, device, repetitions),
        "32x32, colour, crop and flip": bench_arrays(3, 32, True, device, repetitions),
        f"JPEG 320x240 to {SIZE}x{SIZE}": bench_pictures(device, max(2, repetitions // 4)),
    }


def tell(title, results):
    names = ("resident", "plain", "dali", "loader")
    rows = [("images", *(f"{name}, images/s" for name in names), *(f"{name} over loader" for name in names[:3]))]
    for name, each in results.items():
        speeds = [each["images_per_second"].get(arm) for arm in names]
        over = [each["over_loader"].get(arm) for arm in names[:3]]
        rows.append((name, *("-" if speed is None else f"{speed:,.0f}" for speed in speeds),
                     *("-" if ratio is None else f"{ratio:.1f}" for ratio in over)))
    print(f"\n{harness.machine()}\n{title}, batch {BATCH}; {without_dali() or 'with DALI'}\n{harness.table(rows)}")


def test_bench_data(repetitions=3 if harness.QUICK else 20):
    harness.prepare(threads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a picture that another stands in for would be measured twice
        results = results_on("cpu", repetitions)
    tell("an epoch's batches on the CPU", results)
    figure = results["28x28, grey"]["over_loader"]["resident"]
    print(f"resident over the loader, 28x28: {figure:.1f}, reach {REACH}: {'met' if figure >= REACH else 'MISSED'}")
    harness.settle(results)
    harness.report("data", {"batch": BATCH, "images": IMAGES, "pictures": PICTURES, "cases": results})


@harness_cuda.needs_gpu
def test_bench_data_cuda(repetitions=3 if harness.QUICK else 20):
    harness.prepare()
    results = results_on("cuda", repetitions)
    tell("an epoch's batches on the GPU", results)
    figure, speed = results["28x28, grey"]["over_loader"]["resident"], results["28x28, grey"]["images_per_second"]["resident"]
    met = "met" if figure >= REACH_CUDA and speed >= REACH_IMAGES else "MISSED"
    print(f"resident over the loader, 28x28: {figure:.1f}, reach {REACH_CUDA}; {speed:,.0f} images/s, reach {REACH_IMAGES:,.0f}: {met}")
    harness.settle(results)
    harness_cuda.report("data", {"batch": BATCH, "images": IMAGES, "pictures": PICTURES, "cases": results})
