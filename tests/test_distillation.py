"""What a student learns from a teacher: maps kept or computed, the losses made of them, and the measures of nodes."""

import math

import pytest
import torch
from torch import nn

from odn_fast.data import evaluation_batches
from odn_fast.data.dataset import Split, scale_only
from odn_fast.engine import NodeMeasure, TeacherMaps, growth_loss, label_loss, logit_loss, measure, numbered, teacher_logits
from odn_fast.models import StudentNetwork, deepen, initial_graph, widen
from odn_fast.models.teachers import teacher_of
from odn_fast.reference import channel_attention as reference

NORMALISATION = scale_only(255, 2)


class Blocks(nn.Module):
    """Three maps: (4, 6, 6), (6, 3, 3), (6, 3, 3)."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(given, channels, 3, stride, 1), nn.BatchNorm2d(channels), nn.ReLU())
            for given, channels, stride in [(2, 4, 1), (4, 6, 2), (6, 6, 1)])
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def teacher():
    return teacher_of(Blocks(), ["parts.0", "parts.1", "parts.2"], (2, 6, 6), "blocks")


@pytest.fixture
def split():
    return Split(torch.randint(0, 256, (300, 2, 6, 6), dtype=torch.uint8), torch.randint(0, 5, (300,)))


def kept(teacher, split, limit, precision="fp32"):
    return TeacherMaps(teacher, split, NORMALISATION, limit, precision, "cpu")


def student_of(teacher):
    graph = widen(deepen(initial_graph((2, 6, 6), teacher.map_shapes, 5), 0, 6), 0, 1, teacher.map_shapes[0])
    return StudentNetwork(graph, seed=1)


def test_kept_maps_are_those_that_are_computed(teacher, split):
    positions = torch.tensor([299, 0, 7, 7, 258])
    x = NORMALISATION(split.images[positions])
    maps, none = kept(teacher, split, 10**9), kept(teacher, split, 0)
    maps.want([3, 1])
    assert maps.kept == [1, 3] and none.kept == []
    for (found, statistics), (expected, nothing) in zip(maps.at(x, positions, [1, 2, 3]), none.at(x, positions, [1, 2, 3])):
        torch.testing.assert_close(found, expected)
        assert nothing is None
        if statistics is not None:
            for one, other in zip(statistics, reference.channel_attention_statistics(expected)):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_the_limit_and_the_order_decide_what_is_kept(teacher, split):
    first, third = 300 * 4 * 4 * 36, 300 * 4 * 6 * 9  # bytes; the second map is as large as the third
    maps = kept(teacher, split, first + third - 1)
    assert maps.want([3, 1, 2]) == [1] and maps.kept == [2, 3]
    maps = kept(teacher, split, first + third)
    assert [maps.want([1]), maps.want([1, 3]), maps.want([1, 3, 2]), maps.want([1, 3, 2])] == [[], [], [2], []]
    assert maps.kept == [1, 3]


def test_statistics_are_kept_where_there_is_room_for_those_of_every_map(teacher, split):
    everything = 300 * 4 * (4 * 36 + 4 * 6 + 2 * (6 * 9 + 6 * 8))  # with mean, std and Gram matrix
    for limit, expected in ((everything, True), (everything - 1, False)):
        maps = kept(teacher, split, limit)
        assert maps.bytes(1) == 300 * 4 * (4 * 36 + (4 * 6 if expected else 0))
        maps.want([1])
        assert (maps.at(NORMALISATION(split.images[:2]), torch.arange(2), [1])[0][1] is not None) == expected


def test_maps_of_bf16_training_take_half_the_memory(teacher, split):
    maps = kept(teacher, split, 10**9, "bf16")
    maps.want([1])
    positions = torch.arange(4)
    assert maps.at(NORMALISATION(split.images[:4]), positions, [1])[0][0].dtype == torch.bfloat16


def test_the_loss_of_a_stage(teacher, split):
    student, positions = student_of(teacher).eval(), torch.arange(20, 40)
    x = NORMALISATION(split.images[positions])
    maps = kept(teacher, split, 10**9)
    maps.want([3, 1])
    losses, correct = growth_loss(student.graph, maps, split.labels, torch.tensor(0.25), True)(student, x, positions)
    logits, own = student(x)
    inner = [reference.channel_attention_loss(own[node], teacher.maps(x, [q])[0], None, None, None, True, False)[0]
             for node, q in ((1, 3), (2, 1))]
    torch.testing.assert_close(losses[0], 0.25 * (inner[0] + inner[1]) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses[1], nn.functional.cross_entropy(logits, split.labels[positions]))
    assert correct.tolist() == [int((logits.argmax(1) == split.labels[positions]).sum())]
    torch.testing.assert_close(label_loss(split.labels)(student, x, positions)[0], losses[1:])


def test_the_loss_reaches_every_weight_of_the_student(teacher, split):
    student, positions = student_of(teacher).train(), torch.arange(32)
    maps = kept(teacher, split, 0)
    loss = growth_loss(student.graph, maps, split.labels, torch.tensor(1.0), True)
    loss(student, NORMALISATION(split.images[:32]), positions)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_distillation_of_logits(teacher, split):
    student, positions = student_of(teacher).eval(), torch.arange(30, 50)
    x = NORMALISATION(split.images[positions])
    given = teacher_logits(teacher, split, NORMALISATION, "fp32", "cpu")
    torch.testing.assert_close(given[positions], teacher(x))
    losses, _ = logit_loss(split.labels, lambda x, positions: given[positions])(student, x, positions)
    logits = student(x)[0]
    own, taught = (torch.softmax(values / 4, 1) for values in (logits, teacher(x)))
    torch.testing.assert_close(losses[0], 0.9 * 16 * (taught * (taught / own).log()).sum(1).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses[1], 0.1 * nn.functional.cross_entropy(logits, split.labels[positions]))


def test_positions_stand_where_labels_were(split):
    assert torch.equal(numbered(split).labels, torch.arange(300)) and numbered(split).images is split.images


@pytest.mark.parametrize("standardize", [True, False])
def test_measures_are_means_over_the_whole_split(teacher, split, standardize):
    student = student_of(teacher)
    student.train()
    x, y = next(evaluation_batches(split, NORMALISATION, 300))
    batches = evaluation_batches(split, NORMALISATION, 128)
    reached, (final, inner) = measure(student, teacher, batches, standardize)
    with torch.no_grad():
        logits, own = student.eval()(x)
    assert reached == pytest.approx(100 * float((logits.argmax(1) == y).float().mean()))
    assert (final.node, final.q, inner.node, inner.q) == (1, 3, 2, 1)
    for found, q, map_ in ((final, 3, own[1]), (inner, 1, own[2])):
        given = teacher.maps(x, [q])[0]
        exact = reference.channel_attention_loss(map_, given, None, None, None, standardize, False)[0]
        zero = reference.channel_attention_loss(torch.zeros_like(map_), given, None, None, None, standardize, False)[0]
        assert found.R == pytest.approx(float(exact), rel=1e-4) and found.R_zero == pytest.approx(float(zero), rel=1e-4)
        assert found.relative == pytest.approx(found.R / float(given.square().mean()), rel=1e-4)
        assert found.mean_square == pytest.approx(float(map_.square().mean()), rel=1e-4)
        weights = reference.attention_weights(map_, given, standardize)
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum(2).mean() / math.log(weights.shape[2])
        assert found.entropy == pytest.approx(float(entropy), rel=1e-4)
        assert found.peak == pytest.approx(float(weights.amax(2).mean()), rel=1e-4)
        distinct = sum(len(set(row.tolist())) for row in weights.argmax(2)) / 300
        assert found.distinct == pytest.approx(distinct, rel=1e-5)
        assert found.dead == int((map_.amax((0, 2, 3)) <= 0).sum())


def test_a_student_of_zeros_is_seen_as_collapsed(teacher, split):
    student = student_of(teacher)
    for parameter in student.edges.parameters():
        nn.init.zeros_(parameter)
    _, measures = measure(student, teacher, evaluation_batches(split, NORMALISATION, 128), True)
    assert all(each.collapsed and each.dead and each.R == pytest.approx(each.R_zero) for each in measures)


@pytest.mark.parametrize("change", [{"R": 0.98}, {"entropy": 0.99}, {"mean_square": 0.002}])
def test_one_sign_of_collapse_alone_is_none(change):
    values = {"node": 1, "q": 3, "R": 1.0, "R_zero": 1.0, "relative": 0.5, "mean_square": 1e-6, "teacher_mean_square": 2.0,
              "entropy": 0.999, "peak": 0.1, "distinct": 1.0, "dead": 6}
    assert NodeMeasure(**values).collapsed and not NodeMeasure(**values | change).collapsed
