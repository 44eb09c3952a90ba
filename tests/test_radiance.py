"""The radiance field: exact counts, growth that changes no function, sampling and volume rendering."""

import math

import pytest
import torch

from odn_fast.models.radiance import (
    RadianceShape, along, composited, create_field, encoded, keep_neurons, narrow_widths, psnr, rendered, sample_distances,
    widen_layer)

SMALL = RadianceShape.uniform(4, 6, 3, 1)


def inputs(rays=5, samples=4):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rays, samples, 3, generator=generator),
            torch.nn.functional.normalize(torch.randn(rays, 3, generator=generator), dim=1))


def test_sizes_are_those_of_the_paper():
    """The student found for Lego has 48.3 % of the teacher's parameters, and widening layer 4 once more would pass 50 %."""
    teacher = RadianceShape.uniform(8, 256)
    assert teacher.params == 595_844 and teacher.skip == 5
    found = (32, 32, 32, 64, 96, 256, 256, 256)
    assert teacher.with_widths(found).params == 287_844
    assert teacher.with_widths((32, 32, 32, 64, 128, 256, 256, 256)).params > teacher.params / 2


@pytest.mark.parametrize("shape", [SMALL, RadianceShape((3,), 2, 1, 0, 0), RadianceShape((2, 5, 3), 4, 2, 2, 3, skip=2),
                                   RadianceShape.uniform(8, 256)])
def test_counts_are_exact_before_anything_is_built(shape):
    network = create_field(shape, 0)
    assert sum(parameter.numel() for parameter in network.parameters()) == shape.params
    assert RadianceShape.from_dict(shape.to_dict()) == shape
    colours, densities, maps = network(*inputs())
    assert colours.shape == (5, 4, 3) and densities.shape == (5, 4) and (densities >= 0).all()
    assert [tuple(each.shape) for each in maps] == [(20, width) for width in shape.widths]


@pytest.mark.parametrize("values", [{}, [], {**SMALL.to_dict(), "more": 1}, {**SMALL.to_dict(), "widths": [0]},
                                    {**SMALL.to_dict(), "widths": "444"}, {**SMALL.to_dict(), "skip": 4},
                                    {**SMALL.to_dict(), "feature": 1.5}, {**SMALL.to_dict(), "point_frequencies": 21}])
def test_shapes_that_make_no_sense_are_refused(values):
    with pytest.raises(ValueError, match="radiance field"):
        RadianceShape.from_dict(values)


@pytest.mark.parametrize("layer", range(4))
def test_widening_changes_no_function_and_the_new_neurons_learn(layer):
    network = create_field(SMALL, 1).double()
    points, directions = (tensor.double() for tensor in inputs())
    wide = widen_layer(network, layer, 3, seed=2).double()
    assert wide.shape.widths == tuple(9 if index == layer else 6 for index in range(4))
    before, after = network(points, directions), wide(points, directions)
    torch.testing.assert_close(after[:2], before[:2], atol=1e-12, rtol=1e-12)
    assert after[2][layer][:, 6:].abs().max() > 0  # they say something, to which nobody listens yet
    (after[0].sum() + after[1].sum()).backward()
    reader = wide.hidden[layer + 1].weight if layer < 3 else wide.feature.weight
    assert (reader[:, -3:] == 0).all() and reader.grad[:, -3:].abs().max() > 0
    again = widen_layer(network, layer, 3, seed=2)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(wide.state_dict().values(), again.state_dict().values()))


def test_widening_refuses_what_is_not_there():
    for layer, by in ((4, 1), (-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="widen_layer"):
            widen_layer(create_field(SMALL, 0), layer, by, 0)


def test_kept_neurons_are_the_network_s_own():
    network = create_field(SMALL, 1)
    points, directions = inputs()
    same = keep_neurons(network, SMALL.widths, seed=0)
    torch.testing.assert_close(same(points, directions)[:2], network(points, directions)[:2])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # neurons that say nothing may go
        for linear in network.hidden:
            silent = torch.randperm(6, generator=generator)[4:]
            linear.weight[silent], linear.bias[silent] = 0, 0
    torch.testing.assert_close(keep_neurons(network, (4,) * 4, 5)(points, directions)[:2], network(points, directions)[:2])
    with pytest.raises(ValueError, match="do not fit"):
        keep_neurons(network, (7, 6, 6, 6), 0)


def test_a_narrow_field_is_as_wide_as_fits():
    teacher = RadianceShape.uniform(8, 256)
    widths = narrow_widths(teacher, teacher.params // 2)
    assert len(set(widths)) == 1 and teacher.with_widths(widths).params <= teacher.params // 2
    assert teacher.with_widths([width + 1 for width in widths]).params > teacher.params // 2
    with pytest.raises(ValueError, match="no field of this kind"):
        narrow_widths(teacher, 10)


def test_encoding_holds_every_octave():
    x = torch.tensor([[0.1, -0.2, 0.3]])
    assert encoded(x, 0).tolist() == x.tolist()
    code = encoded(x, 2)[0]
    expected = [*x[0], *x[0].sin(), *(2 * x[0]).sin(), *x[0].cos(), *(2 * x[0]).cos()]
    torch.testing.assert_close(code, torch.stack(expected))


def test_samples_are_stratified():
    jitter = torch.rand(100, 8, generator=torch.Generator().manual_seed(0))
    distances = sample_distances(2.0, 6.0, jitter)
    parts = ((distances - 2) / 0.5).floor()
    assert torch.equal(parts, torch.arange(8.0).expand(100, 8))
    points = along(torch.tensor([[1.0, 0, 0, 0, 0, -1.0]]), torch.tensor([[2.0, 3.0]]))
    assert points.tolist() == [[[1, 0, -2], [1, 0, -3]]]


def test_volume_rendering_in_closed_form():
    distances = sample_distances(0.0, 4.0, torch.zeros(1, 4))  # every sample stands for one unit of length
    colours = torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(0))
    empty = composited(colours, torch.zeros(1, 4), distances, 4.0)
    torch.testing.assert_close(empty, torch.ones(1, 3))
    wall = composited(colours, torch.tensor([[0, 1e4, 5.0, 0]]), distances, 4.0)
    torch.testing.assert_close(wall, colours[:, 1])
    fog = composited(colours[:, :1].expand(1, 4, 3), torch.full((1, 4), 0.3), distances, 4.0)
    torch.testing.assert_close(fog, 1 - (1 - colours[:, 0]) * (1 - math.exp(-1.2)))
    last = composited(colours, torch.tensor([[0, 0, 0, 2.0]]), distances, 4.0)
    torch.testing.assert_close(last, 1 - (1 - colours[:, 3]) * (1 - math.exp(-2)))


def test_rendering_in_chunks_changes_nothing():
    network = create_field(SMALL, 3)
    rays = torch.cat([torch.zeros(7, 3), inputs(7)[1]], 1)
    whole, parts = (rendered(network, rays, 2.0, 6.0, 5, chunk) for chunk in (2048, 3))
    torch.testing.assert_close(whole, parts)
    assert whole.shape == (7, 3) and whole.min() >= 0 and whole.max() <= 1


def test_psnr():
    assert psnr(0.01) == pytest.approx(20) and psnr(0.0) == 100
