"""Views of a scene: nerf_synthetic's files, what may be wrong with them, and the analytic scene."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from odn_fast.data import DataError
from odn_fast.data.views import RayBatches, Views, analytic_scene, load_views

POSE = [[1.0, 0, 0, 0], [0, 0, -1.0, -4.0], [0, 1.0, 0, 0], [0, 0, 0, 1.0]]  # from y = -4, looking along +y, z up


@pytest.fixture
def folder(tmp_path):
    """A data set of one red picture a split, half of it transparent."""
    for split in ("train", "val", "test"):
        write(tmp_path, split)
    return tmp_path


def write(folder, split="train", angle=math.pi / 2, size=4, **frame):
    (folder / split).mkdir(exist_ok=True)
    levels = np.zeros((size, size, 4), np.uint8)
    levels[:, :size // 2] = (255, 0, 0, 255)
    levels[:, size // 2:] = (255, 0, 0, 51)
    Image.fromarray(levels).save(folder / split / "r_0.png")
    frames = [{"file_path": f"./{split}/r_0", "transform_matrix": POSE} | frame]
    (folder / f"transforms_{split}.json").write_text(json.dumps({"camera_angle_x": angle, "frames": frames}))


def test_pictures_are_laid_on_white_and_cameras_read(folder):
    scene = load_views(folder)
    assert scene.train.images.shape == (1, 4, 4, 3) and scene.train.images.dtype == torch.float32
    assert scene.train.images[0, 0, 0].tolist() == [1, 0, 0]
    torch.testing.assert_close(scene.train.images[0, 0, 3], torch.tensor([1, 0.8, 0.8]))
    assert scene.train.focal == pytest.approx(2) and (scene.near, scene.far) == (2, 6)
    assert scene.checksum() == load_views(folder).checksum() != load_views(folder, near=1.0).checksum()


def test_rays_leave_the_camera_through_the_centres_of_pixels(folder):
    rays = load_views(folder).train.rays().view(4, 4, 6)
    assert torch.equal(rays[..., :3], torch.tensor([0.0, -4, 0]).expand(4, 4, 3))
    expected = torch.tensor([-1.5 / 2, 1, 1.5 / 2])  # the upper left pixel: left and up of the axis
    torch.testing.assert_close(rays[0, 0, 3:], expected / expected.norm())
    torch.testing.assert_close(rays[..., 3:].norm(dim=2), torch.ones(4, 4))


def test_a_size_averages_what_lies_on_white(folder):
    images = load_views(folder, size=1).train.images
    torch.testing.assert_close(images.flatten(), torch.tensor([1, 0.4, 0.4]))
    assert load_views(folder, size=1).train.focal == pytest.approx(0.5)
    with pytest.raises(DataError, match="4x4 pixels, which cannot be averaged to 3x3"):
        load_views(folder, size=3)


@pytest.mark.parametrize("frame, words", [
    ({"file_path": "../outside"}, "leads out of the folder"),
    ({"file_path": "/etc/passwd"}, "leads out of the folder"),
    ({"file_path": 3}, "file_path is no path"),
    ({"file_path": "a\0b"}, "file_path is no path"),
    ({"file_path": "./train/r_9"}, "r_9.png: cannot be read"),
    ({"transform_matrix": POSE[:3]}, "no 4x4 matrix"),
    ({"transform_matrix": [[True] * 4] * 4}, "no 4x4 matrix"),
    ({"transform_matrix": [[math.nan] * 4] * 4}, "no 4x4 matrix"),
    ({"transform_matrix": [[2.0, 0, 0, 0], *POSE[1:]]}, "no rotation and shift"),
    ({"transform_matrix": [[-1.0, 0, 0, 0], *POSE[1:]]}, "no rotation and shift"),
    ({"transform_matrix": [*POSE[:3], [0, 0, 0, 2.0]]}, "no rotation and shift"),
    ({"transform_matrix": [[1.0, 0, 0, 10 ** 400], *POSE[1:]]}, "transforms_train.json"),
])
def test_a_bad_frame_is_one_line_that_names_the_file(folder, frame, words):
    write(folder, **frame)
    with pytest.raises(DataError, match=words) as caught:
        load_views(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("text, words", [
    ("", "is empty"), ("{", "is damaged"), ("[]", "holds list"), ("{}", "camera_angle_x"), ('{"camera_angle_x": 4}', "camera_angle_x"),
    ('{"camera_angle_x": NaN, "frames": []}', "camera_angle_x"), ('{"camera_angle_x": 1, "frames": []}', "frames is no list"),
    ('{"camera_angle_x": 1, "frames": [7]}', "frame 0: transform_matrix"), ("[" * 100_000, "is damaged"), ("\xff", "is damaged")])
def test_bad_json_is_one_line(folder, text, words):
    (folder / "transforms_val.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=words) as caught:
        load_views(folder)
    assert "\n" not in str(caught.value) and "transforms_val.json" in str(caught.value)


def test_bad_pictures_are_one_line(folder):
    picture = folder / "train" / "r_0.png"
    content = picture.read_bytes()
    for damaged in (b"", content[:40], content[:-30], b"GIF89a" + content):
        picture.write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            load_views(folder)
        assert "\n" not in str(caught.value) and "r_0.png" in str(caught.value)
    picture.unlink()
    os.mkfifo(picture)
    with pytest.raises(DataError, match="not a regular file"):
        load_views(folder)


def test_missing_splits_sizes_that_differ_and_distances_are_refused(folder):
    with pytest.raises(DataError, match="expected 0 < near < far"):
        load_views(folder, near=6.0, far=2.0)
    write(folder, "test", size=8)
    with pytest.raises(DataError, match="pictures of 4x4 and 8x8 pixels"):
        load_views(folder)
    (folder / "transforms_test.json").unlink()
    with pytest.raises(DataError, match="transforms_test.json: cannot be read"):
        load_views(folder)


def test_the_analytic_scene_is_what_its_shapes_say():
    scene = analytic_scene(33, train=6, validation=2, test=2)
    assert len(scene.train) == 6 and scene.train.images.shape[1:] == (33, 33, 3)
    assert (scene.train.images[:, 0, 0] == 1).all()  # a corner sees white
    assert (scene.train.images[:, 16, 16] < 1).any(1).all()  # the middle never does
    assert scene.checksum() == analytic_scene(33, train=6, validation=2, test=2).checksum()
    straight_down = torch.tensor([[1.0, 0, 0, -0.9], [0, 1, 0, 0.9], [0, 0, 1, 4]])
    seen = Views(torch.zeros(1, 1, 1, 3), straight_down[None], 1.0).rays()
    from odn_fast.data.views import _traced
    lit = 0.55 + 0.45 * 0.8  # the plate's upper face under the light
    torch.testing.assert_close(_traced(seen)[0], torch.tensor([0.35, 0.6, 0.35]) * lit)
    with pytest.raises(DataError, match="cannot be made"):
        analytic_scene(0)


def test_cameras_look_at_the_middle():
    views = analytic_scene(4, train=5).train
    for pose in views.poses:
        torch.testing.assert_close(pose[:, :3] @ pose[:, :3].T, torch.eye(3), atol=1e-6, rtol=0)
        torch.testing.assert_close(pose[:, 3] - 4 * pose[:, 2], torch.zeros(3), atol=1e-6, rtol=0)
        assert torch.linalg.det(pose[:, :3]) > 0 and pose[2, 1] > 0  # up is up


def test_ray_batches_are_the_same_from_any_step_on():
    views = analytic_scene(8).train
    batches = RayBatches(views, 5, 4, samples=3, seed=1)
    whole, rest = list(batches.epoch("teacher", 2)), list(batches.epoch("teacher", 2, start=2))
    assert len(whole) == 4 and len(rest) == 2 and (batches.steps_per_epoch, batches.images_per_epoch) == (4, 20)
    for (x, y), (again, colours) in zip(whole[2:], rest):
        assert x.shape == (5, 9) and torch.equal(x, again) and torch.equal(y, colours)
        assert (x[:, 6:] >= 0).all() and (x[:, 6:] < 1).all()
    assert not torch.equal(whole[0][0], whole[1][0]) and not torch.equal(whole[0][0], next(batches.epoch("student", 2))[0])
    rays = views.rays()
    assert torch.equal(rays[torch.tensor([70, 3])], views.rays(torch.tensor([70, 3])))
    place = (rays == whole[0][0][0, :6]).all(1).nonzero()[0, 0]
    assert torch.equal(views.colours()[place], whole[0][1][0])


LEGO = Path(os.environ.get("ODN_FAST_DATA", ""), "nerf_synthetic", "lego_100x100")


@pytest.mark.skipif(not LEGO.is_dir(), reason="ODN_FAST_DATA names no folder with nerf_synthetic/lego_100x100")
def test_lego_as_published():
    scene = load_views(LEGO, size=25)
    assert [len(scene.train), len(scene.validation), len(scene.test)] == [100, 10, 25]
    assert scene.train.focal == pytest.approx(138.88 / 4, abs=0.01)
    assert (scene.train.poses[:, :, 3].norm(dim=1) - 4.0311).abs().max() < 1e-3
    assert 0.7 < scene.train.images.mean() < 0.95
