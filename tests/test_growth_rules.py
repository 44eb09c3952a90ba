"""The rules of growth against graphs made by hand, and the capacity that they leave."""

import math
import random

import pytest

from odn_fast.models.student_graph import Count, Edge, Node, StudentGraph, count, deepen, initial_graph, widen
from odn_fast.search.growth_rules import (
    FULL, Limits, alpha, by_closeness, can_grow, choose_split, in_order, modification_value, one_sided, place_between,
    shares)

RICH = Limits("params", 10**9)


def maps(blocks):
    """Shapes of the maps of a CIFAR ResNet with `blocks` blocks a stage."""
    return [(16, 32, 32)] * blocks + [(32, 16, 16)] * blocks + [(64, 8, 8)] * blocks


MAPS = maps(9)


def graph_of(qs, edges, m=27):
    """Nodes 0, 1 and 2, 3, ... with `qs`; edges (source, target, units)."""
    nodes = [Node(0, 0, 3, 32, 32), *(Node(number, q, *MAPS[q - 1]) for number, q in enumerate([m, *qs], 1))]
    return StudentGraph(tuple(nodes), tuple(Edge(number, *edge) for number, edge in enumerate(edges)), 10)


def start():
    return initial_graph((3, 32, 32), MAPS, 10)


def test_alpha_is_half_a_cosine_from_one():
    assert [alpha(epoch, 10) for epoch in (0, 5)] == [1, 0.5]
    assert alpha(9, 10) == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi))) and alpha(0, 1) == 1


def test_modification_value_is_the_degrees_ratio_times_the_inner_loss():
    graph = graph_of([13, 20], [(0, 1, 7), (0, 2, 7), (2, 1, 1), (2, 3, 1), (3, 1, 1)])
    assert modification_value(graph, 1, 0.6) == pytest.approx(0.2)  # three precursors, the classifier behind it
    assert modification_value(graph, 2, 0.6) == pytest.approx(1.2)
    assert modification_value(start(), 1, 0.6) == 0.6


def test_units_inside_an_edge_are_no_nodes():
    deep = deepen(start(), 0, 6)
    assert modification_value(deep, 1, 1.0) == 1 and deep.in_degree(1) == 1


def test_order_of_nodes_and_its_ties():
    graph = graph_of([13, 20, 5], [(0, 1, 7), (0, 2, 7), (2, 1, 7), (2, 3, 1), (3, 1, 1), (0, 4, 1), (4, 2, 1)])
    assert [node.id for node in in_order(graph, {1: 1, 2: 3, 3: 2, 4: 0})] == [2, 3, 1, 4]
    assert [node.id for node in in_order(graph, {1: 1, 2: 1, 3: 1, 4: 1})] == [4, 2, 3, 1]  # smaller q


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="node 1: its score is (nan|inf)"):
        in_order(start(), {1: value})


def test_closest_precursor_first_the_newer_of_equals():
    graph = graph_of([13, 20, 13], [(0, 1, 7), (0, 2, 7), (2, 1, 7), (2, 3, 1), (3, 1, 1), (0, 4, 1), (4, 1, 1)])
    assert [edge.source for edge in by_closeness(graph, 1)] == [3, 4, 2, 0]


@pytest.mark.parametrize("before, after, c, q", [
    (0, 27, 0.5, 13), (0, 27, 0.25, 20), (0, 27, 0.75, 6),  # larger c: nearer the precursor
    (0, 2, 0.5, 1), (0, 27, 0, 26), (0, 27, 1, 1), (13, 15, 1, 14), (10, 20, 0.7, 13), (4, 7, 0.5, 5)])
def test_place_of_a_new_node(before, after, c, q):
    assert place_between(before, after, c) == q


def test_deepening_appends_three_then_three_then_a_node_is_put_beside_the_full_edge():
    graph, kinds = start(), []
    for _ in range(3):
        split = choose_split(graph, {1: 1.0}, MAPS, RICH)
        kinds.append((split.kind, split.units, split.q))
        graph = split.graph
    assert kinds == [("deepen", 3, None), ("deepen", 3, None), ("widen", None, 13)]
    assert [(edge.source, edge.target, edge.units) for edge in graph.edges] == [(0, 1, 7), (0, 2, 1), (2, 1, 1)]
    assert graph.nodes[2] == Node(2, 13, 32, 16, 16)
    assert split.to_dict() == {"kind": "widen", "node": 1, "edge": 0, "new_node": 2, "q": 13, "skipped": []}


def test_a_nearly_full_edge_gets_what_room_it_has():
    split = choose_split(deepen(start(), 0, 4), {1: 1.0}, MAPS, RICH)
    assert (split.kind, split.units) == ("deepen", 2)


def test_the_edge_from_the_closest_precursor_is_split():
    graph = graph_of([13], [(0, 1, 7), (0, 2, 1), (2, 1, 1)])
    assert choose_split(graph, {1: 2.0, 2: 1.0}, MAPS, RICH).edge == 2
    assert choose_split(graph, {1: 1.0, 2: 2.0}, MAPS, RICH).edge == 1


def test_a_full_edge_without_room_passes_the_split_on_to_the_next_closest_precursor():
    graph = graph_of([26, 13], [(0, 1, 7), (0, 2, 7), (2, 1, 7), (0, 3, 1), (3, 2, 1), (3, 1, 2)])
    split = choose_split(graph, {1: 3.0, 2: 2.0, 3: 1.0}, MAPS, RICH)
    assert (split.node, split.edge, split.kind) == (1, 5, "deepen")
    assert split.skipped == ("node 1: edge 2 is full, and there is no room beside it",)


def test_a_node_without_room_passes_the_split_on_to_the_next_node():
    graph = graph_of([1, 2], [(0, 2, 7), (2, 1, 1), (0, 3, 7), (3, 1, 1)])
    split = choose_split(graph, {1: 1.0, 2: 3.0, 3: 2.0}, MAPS, RICH)
    assert split.node == 1 and len(split.skipped) == 2


def test_a_teachers_map_supervises_one_node_only():
    graph = graph_of([13], [(0, 1, 7), (0, 2, 7), (2, 1, 7)])
    assert choose_split(graph, {1: 1.0, 2: 0.0}, MAPS, RICH).q == 20
    full = graph_of([26, 13], [(0, 1, 7), (0, 2, 7), (2, 1, 7), (0, 3, 1), (3, 2, 1)])
    split = choose_split(full, {1: 2.0, 2: 0.0, 3: 1.0}, MAPS, RICH)  # beside (0, 1) map 13 would come again
    assert split.node == 3 and len(split.skipped) == 2


def test_a_split_is_trimmed_to_the_budget_and_then_goes_to_the_next_node():
    graph = graph_of([13], [(0, 1, 7), (0, 2, 1), (2, 1, 1)])
    for units in (3, 2, 1):
        limits = Limits("params", count(deepen(graph, 2, units)).params)
        assert choose_split(graph, {1: 2.0, 2: 1.0}, MAPS, limits).units == units
    limits = Limits("params", count(deepen(graph, 2, 1)).params - 1)
    split = choose_split(graph, {1: 2.0, 2: 1.0}, MAPS, limits)
    assert split.node == 2 and split.units == 3 and split.skipped == ("node 1: a split of edge 2 does not fit the budget",)
    assert choose_split(graph, {1: 2.0, 2: 1.0}, MAPS, Limits("params", count(graph).params)) is None


def test_the_second_bound_trims_too():
    graph = start()
    flops = count(deepen(graph, 0, 2)).flops
    assert choose_split(graph, {1: 1.0}, MAPS, Limits("params", 10**9, flops)).units == 2
    assert choose_split(graph, {1: 1.0}, MAPS, Limits("flops", flops)).units == 2


def test_growth_ends_at_98_percent_or_when_nothing_fits():
    graph = start()
    size = count(graph).params
    assert not can_grow(graph, MAPS, Limits("params", size))  # nothing fits
    next_size = count(deepen(graph, 0, 1)).params
    assert can_grow(graph, MAPS, Limits("params", next_size))
    assert Limits("params", 1000).reached(Count(980, 0)) and not Limits("params", 1000).reached(Count(979, 10**9))
    deep = deepen(graph, 0, 6)
    assert not can_grow(deep, MAPS, Limits("params", math.floor(count(deep).params / 0.98)))


def test_shares_of_splits():
    assert shares([1, 1, 2, 1]) == {1: 0.75, 2: 0.25} and shares([]) == {}
    assert one_sided([1] * 7) is None and one_sided([1, 1, 1, 2, 2, 2, 2, 1]) is None
    assert one_sided([1, 1, 1, 2, 2, 2, 2, 2, 2]) == 2


def test_width_of_new_nodes():
    graph = deepen(initial_graph((3, 32, 32), MAPS, 10, width=0.5), 0, 6)
    assert choose_split(graph, {1: 1.0}, MAPS, RICH, width=0.5).graph.nodes[2].channels == 16


@pytest.mark.parametrize("blocks, params, flops", [(9, 1_761_889, 267_596_928), (18, 3_439_836, 543_713_408)])
def test_capacity_does_not_depend_on_the_order_of_splits(blocks, params, flops):
    """Every map has a node in the end, every edge is full: twice the teacher, ResNet-56 and ResNet-110."""
    shapes = maps(blocks)
    graph = initial_graph((3, 32, 32), shapes, 10)
    while split := choose_split(graph, {node.id: -node.q for node in graph.supervised}, shapes, RICH):
        graph = split.graph
    assert sorted(node.q for node in graph.nodes) == list(range(3 * blocks + 1))
    assert all(edge.units == FULL for edge in graph.edges) and count(graph) == Count(params, flops)


@pytest.mark.parametrize("seed", range(60))
def test_no_policy_exceeds_its_limits_or_ends_far_from_the_budget(seed):
    draw = random.Random(seed)
    shapes, c = maps(3), draw.choice((0.25, 0.5, 0.75))
    graph = initial_graph((3, 32, 32), shapes, 10, skip=draw.choice(("auto", "always")))
    first = count(graph)
    cap = draw.choice((None, draw.randrange(first.flops, 20_000_000)))
    limits = draw.choice((Limits("params", draw.randrange(first.params, 250_000), cap),
                          Limits("flops", draw.randrange(first.flops, 40_000_000))))
    while can_grow(graph, shapes, limits, c):
        graph = choose_split(graph, {node.id: draw.random() for node in graph.supervised}, shapes, limits, c).graph
        cost = count(graph)
        assert (cost.params if limits.unit == "params" else cost.flops) <= limits.budget and cost.flops <= (limits.max_flops or cost.flops)
        assert all(edge.units <= FULL for edge in graph.edges)
        qs = [node.q for node in graph.nodes]
        assert len(set(qs)) == len(qs)
    even = {node.id: 0.0 for node in graph.supervised}
    assert limits.reached(count(graph)) or choose_split(graph, even, shapes, limits, c) is None


def test_widening_by_hand_is_the_one_that_is_chosen():
    full = deepen(start(), 0, 6)
    assert choose_split(full, {1: 1.0}, MAPS, RICH).graph == widen(full, 0, 13, MAPS[12])
