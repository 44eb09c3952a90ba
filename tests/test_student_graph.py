"""The student graph: what it holds, what it costs, and that no sequence of splits breaks it."""

import json
import random

import pytest

from odn_fast.models import StudentGraph, count, deepen, initial_graph, widen

DIGITS = ((1, 8, 8), [(16, 8, 8)] * 3 + [(32, 4, 4)] * 3 + [(64, 2, 2)] * 3, 10)
CIFAR = ((3, 32, 32), [(16, 32, 32)] * 9 + [(32, 16, 16)] * 9 + [(64, 8, 8)] * 9, 10)
IMAGENET = ((3, 224, 224), [(256, 56, 56)] * 3 + [(512, 28, 28)] * 4 + [(1024, 14, 14)] * 6 + [(2048, 7, 7)] * 3, 1000)
ODD = ((2, 13, 9), [(3, 13, 9), (3, 7, 5), (4, 7, 5), (4, 5, 3), (5, 5, 3), (5, 2, 2), (6, 2, 1), (6, 1, 1)], 3)
CASES = pytest.mark.parametrize("start", [DIGITS, CIFAR, ODD], ids=["digits", "cifar", "odd"])


def grown_graph(start, draw: random.Random, splits: int, skip: str = "auto", width: float = 1.0) -> StudentGraph:
    """A graph after some splits of edges drawn at random."""
    graph, maps = initial_graph(*start, width=width, skip=skip), start[1]
    for _ in range(splits):
        edge = draw.choice(graph.edges)
        room = range(graph.node(edge.source).q + 1, graph.node(edge.target).q)
        if room and (edge.units == 7 or draw.random() < 0.4):
            q = draw.choice(room)
            graph = widen(graph, edge.id, q, maps[q - 1], width)
        elif edge.units < 7:
            graph = deepen(graph, edge.id, draw.randint(1, min(3, 7 - edge.units)))
    return graph


def test_the_first_graph_is_two_nodes_and_a_unit():
    graph = initial_graph(*CIFAR)
    assert [(node.q, node.channels, node.height) for node in graph.nodes] == [(0, 3, 32), (27, 64, 8)]
    assert [(edge.source, edge.target, edge.units) for edge in graph.edges] == [(0, 1, 1)]
    assert [node.id for node in graph.supervised] == [1] and graph.in_degree(1) == graph.out_degree(1) == 1


def test_a_new_branch_lies_beside_its_edge():
    graph = widen(initial_graph(*CIFAR), 0, 13, CIFAR[1][12])
    assert [(edge.source, edge.target, edge.units) for edge in graph.edges] == [(0, 1, 1), (0, 2, 1), (2, 1, 1)]
    assert graph.node(2).channels == 32 and graph.node(2).height == 16
    assert [edge.id for edge in graph.incoming(1)] == [0, 2] and [edge.id for edge in graph.outgoing(0)] == [0, 1]
    assert (graph.in_degree(1), graph.out_degree(1), graph.in_degree(2), graph.out_degree(2)) == (2, 1, 1, 1)


def test_counts_of_a_search_on_digits_are_those_known():
    graph = initial_graph(*DIGITS)
    counts = [count(graph)]
    for edge, split in [(0, 3), (0, 3), (0, 4), (1, 3), (1, 3), (1, 2), (3, 3), (3, 3)]:
        graph = deepen(graph, edge, 3) if split == 3 else widen(graph, edge, split, DIGITS[1][split - 1])
        counts.append(count(graph))
    assert [each.params for each in counts] == [5_843, 34_643, 63_443, 74_460, 82_716, 90_972, 94_181, 96_773, 99_365]
    assert counts[-1].flops == 990_304


@pytest.mark.parametrize("width, params", [(1, 6_286_339), (0.25, 785_923)])
def test_counts_of_the_first_graph_on_imagenet_are_those_known(width, params):
    assert count(initial_graph(*IMAGENET, width=width)).params == params


@CASES
def test_no_sequence_of_splits_breaks_a_graph(start):
    draw = random.Random(0)
    for _ in range(100):
        before = grown_graph(start, draw, draw.randint(0, 20), draw.choice(["auto", "always"]), draw.choice([0.25, 1, 1.5]))
        assert StudentGraph.from_dict(json.loads(json.dumps(before.to_dict()))) == before
        for edge in before.edges:
            source, target = before.node(edge.source), before.node(edge.target)
            assert source.q < target.q and (source.height, source.width) >= (target.height, target.width)
        for node in before.supervised:
            assert (node.height, node.width) == start[1][node.q - 1][1:] and before.in_degree(node.id) >= 1 <= before.out_degree(node.id)
        after = deepen(before, draw.choice(before.edges).id, 1)
        assert count(after).params > count(before).params and count(after).flops > count(before).flops


def test_what_growth_cannot_make_is_refused():
    graph = initial_graph(*CIFAR)
    with pytest.raises(ValueError, match="edge: expected 0 to 0, got 1"):
        deepen(graph, 1, 3)
    with pytest.raises(ValueError, match="units: expected a whole number from 1, got 0"):
        deepen(graph, 0, 0)
    for q in (0, 27, 28):
        with pytest.raises(ValueError, match="q must rise along an edge"):
            widen(graph, 0, q, (64, 8, 8))
    with pytest.raises(ValueError, match="from size 16x16 to the larger size 32x32"):
        widen(widen(graph, 0, 13, (32, 16, 16)), 2, 14, (16, 32, 32))
    with pytest.raises(ValueError, match="map 2 has size 8x8, larger than 4x4 of map 1"):
        initial_graph((3, 8, 8), [(16, 4, 4), (16, 8, 8)], 10)
    with pytest.raises(ValueError, match="map 1 has size 9x8, larger than 8x8 of the input"):
        initial_graph((3, 8, 8), [(16, 9, 8)], 10)
    with pytest.raises(ValueError, match="of at least one map"):
        initial_graph((3, 8, 8), [], 10)
    with pytest.raises(ValueError, match="width: expected a number above 0"):
        initial_graph(*CIFAR, width=float("nan"))
    with pytest.raises(ValueError, match="skip: expected one of auto, always, got 'none'"):
        initial_graph(*CIFAR, skip="none")


def broken(change) -> dict:
    values = widen(initial_graph(*CIFAR), 0, 13, (32, 16, 16)).to_dict()
    change(values)
    return values


@pytest.mark.parametrize("change, message", [
    (lambda values: values.pop("skip"), "student graph: expected the entries classes, edges, nodes, skip"),
    (lambda values: values["nodes"][2].pop("q"), "node 2: expected the entries"),
    (lambda values: values["edges"].append(7), "edge 3: expected the entries"),
    (lambda values: values.update(nodes=3), "nodes: expected a list, got 3"),
    (lambda values: values.update(classes=True), "classes: expected a whole number"),
    (lambda values: values["edges"][1].update(units=1e9), "edge 1: units: expected a whole number"),
    (lambda values: values["nodes"][2].update(id=1), "node 2: expected the number 2, got 1"),
    (lambda values: values["edges"][2].update(target=9), "node: expected 0 to 2, got 9"),
    (lambda values: values["edges"].append({"id": 3, "source": 0, "target": 1, "units": 1}), "one edge at most"),
    (lambda values: values["edges"].pop(), "node 2: does not lie on a path"),
    (lambda values: values["nodes"][0].update(q=2), "nodes: expected the input as node 0"),
], ids=range(11))
def test_a_broken_description_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        StudentGraph.from_dict(broken(change))
