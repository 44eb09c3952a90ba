"""The student: what its graph holds and costs, that no sequence of splits breaks it, and that growth keeps what was learnt."""

import copy
import json
import random

import pytest
import torch
from torch import nn

from odn_fast import export
from odn_fast.models import (
    FoldedNetwork,
    StudentGraph,
    StudentNetwork,
    count,
    deepen,
    extract,
    grown,
    initial_graph,
    plain,
    profile,
    widen,
)

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


def images(start, number: int = 4) -> torch.Tensor:
    return torch.randn(number, *start[0], generator=torch.Generator().manual_seed(0))


def trained(network: StudentNetwork, x: torch.Tensor) -> StudentNetwork:
    """The network after a step, so that no parameter and no statistic has the value it began with."""
    optimizer = torch.optim.SGD(network.train().parameters(), lr=0.05)
    logits, maps = network(x)
    (logits.square().mean() + sum(map_.mean() for map_ in maps.values())).backward()
    optimizer.step()
    return network


SMALL = ((2, 8, 8), [(4, 8, 8), (4, 8, 8), (6, 4, 4), (6, 4, 4), (6, 4, 4), (8, 2, 2), (8, 2, 2)], 3)
BUILT = pytest.mark.parametrize("start, splits", [(SMALL, 30), (ODD, 30)], ids=["small", "odd"])


@BUILT
def test_the_network_is_what_was_counted(start, splits):
    draw = random.Random(1)
    for skip in ("auto", "always", "auto", "always"):
        graph = grown_graph(start, draw, draw.randint(0, splits), skip)
        network = StudentNetwork(graph)
        cost, built = count(graph), profile(plain(network), start[0])
        assert cost.params == sum(parameter.numel() for parameter in network.parameters()) == built.params
        assert cost.flops == built.growth_flops


@BUILT
@pytest.mark.parametrize("skip", ["auto", "always"])
def test_every_node_has_the_size_of_its_teachers_map(start, splits, skip):
    graph, x = grown_graph(start, random.Random(2), splits, skip), images(start)
    logits, maps = StudentNetwork(graph)(x)
    assert logits.shape == (4, start[2]) and list(maps) == [node.id for node in graph.supervised]
    for node in graph.supervised:
        assert maps[node.id].shape == (4, node.channels, node.height, node.width)
        assert (node.height, node.width) == start[1][node.q - 1][1:]


@BUILT
@pytest.mark.parametrize("skip", ["auto", "always"])
def test_what_is_extracted_is_plain_pytorch_and_computes_the_same(start, splits, skip):
    x = images(start).double()  # few values per channel: in float32, batch norms enlarge roundings beyond any bound
    network = trained(StudentNetwork(grown_graph(start, random.Random(3), 12, skip)).double(), x)
    copied = extract(network)
    assert list(copied.state_dict()) == list(plain(network).state_dict()) and set(copied.state_dict()) == set(network.state_dict())
    assert all(type(module).__module__.startswith("torch.nn") for name, module in copied.named_modules() if name)
    theirs = {tensor.data_ptr() for tensor in network.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in copied.state_dict().values()}
    torch.testing.assert_close(copied(x), network(x)[0], rtol=1e-9, atol=1e-12)
    for (name, ours), other in zip(network.state_dict().items(), [copied.state_dict()[name] for name in network.state_dict()]):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-12, msg=name)
    torch.testing.assert_close(copied.eval()(x), network.eval()(x)[0].detach(), rtol=1e-9, atol=1e-12)
    again = export.graph_from_data(json.loads(json.dumps(export.graph_to_data(copied))), "network.json").double()
    again.load_state_dict(copied.state_dict())
    torch.testing.assert_close(again.eval()(x), copied(x), rtol=0, atol=0)


def test_the_folded_network_follows_the_one_under_training():
    network, x = StudentNetwork(grown_graph(SMALL, random.Random(4), 8)), images(SMALL)
    folded = FoldedNetwork(plain(network))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    trained(network, x).eval()
    torch.testing.assert_close(folded.refresh()(x), network(x)[0].detach(), rtol=1e-4, atol=1e-5)


@BUILT
@pytest.mark.parametrize("training", [True, False])
def test_deepening_changes_nothing_at_first_and_reaches_the_new_units(start, splits, training):
    draw, x = random.Random(5), images(start)
    before = grown_graph(start, draw, 10)
    network = trained(StudentNetwork(before), x)
    edge = draw.choice(before.edges)
    deeper = grown(network, deepen(before, edge.id, 3), seed=7)
    assert deeper.training
    (logits, maps), (new_logits, new_maps) = network.train(training)(x), deeper.train(training)(x)
    torch.testing.assert_close(new_logits, logits, rtol=1e-5, atol=1e-6)
    for node, values in maps.items():
        torch.testing.assert_close(new_maps[node], values, rtol=1e-5, atol=1e-6)
    deeper.train()(x)[0].square().sum().backward()
    added = deeper.edges[str(edge.id)][edge.units:]
    assert len(added) == 3 and all(unit.identity and not unit.second.bn.weight.any() for unit in added)
    if before.node(edge.target).height > 1:  # elsewhere four images leave ReLUs few places to be alive
        assert all(unit.second.bn.weight.grad.any() for unit in added)


def test_growth_inherits_everything_by_name_and_shares_nothing():
    graph, x = initial_graph(*SMALL), images(SMALL)
    network = trained(StudentNetwork(graph), x)
    larger = grown(network, deepen(widen(graph, 0, 3, SMALL[1][2]), 0, 2), seed=3)
    old, new = network.state_dict(), larger.state_dict()
    assert old.keys() < new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert not {tensor.data_ptr() for tensor in old.values()} & {tensor.data_ptr() for tensor in new.values()}
    added = {".".join(name.split(".")[:3]) for name in new.keys() - old.keys()}
    assert added == {"edges.0.1", "edges.0.2", "edges.1.0", "edges.2.0"}
    assert all(larger.edges[edge][0].second.bn.weight.all() for edge in ("1", "2"))  # a new branch begins as any unit
    assert any(parameter.grad is not None for parameter in network.parameters())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in larger.parameters())


def test_no_unit_begins_closed_without_an_identity():
    network = StudentNetwork(initial_graph(*SMALL, skip="always"))
    larger = grown(network, deepen(network.graph, 0, 3), seed=0)
    assert all(unit.second.bn.weight.all() and not unit.identity for unit in larger.edges["0"])


def test_new_weights_depend_on_seed_edge_and_position_alone():
    graph = widen(initial_graph(*SMALL), 0, 3, SMALL[1][2])
    state = torch.random.get_rng_state()
    whole = StudentNetwork(deepen(graph, 1, 2), seed=5)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(99)
    later = grown(StudentNetwork(graph, seed=1), deepen(graph, 1, 2), seed=5)
    for position in (1, 2):
        ours, theirs = whole.edges["1"][position].state_dict(), later.edges["1"][position].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != "second.bn.weight")
    first, second = (whole.edges["1"][position].first.pointwise.weight for position in (1, 2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, StudentNetwork(deepen(graph, 1, 2), seed=6).edges["1"][1].first.pointwise.weight)


def test_growth_keeps_type_and_mode():
    network = StudentNetwork(initial_graph(*SMALL)).double().eval()
    larger = grown(network, deepen(network.graph, 0, 1), seed=0)
    assert not larger.training and all(parameter.dtype == torch.float64 for parameter in larger.parameters())


def test_only_what_splits_made_is_grown_into():
    graph = deepen(initial_graph(*SMALL), 0, 2)
    network = StudentNetwork(graph)
    for other in (initial_graph(*SMALL), initial_graph(*SMALL, skip="always"), initial_graph(*SMALL, width=2), initial_graph(*DIGITS)):
        with pytest.raises(ValueError, match="does not continue that of the network"):
            grown(network, other, seed=0)


def test_another_input_is_refused():
    network = StudentNetwork(initial_graph(*SMALL))
    for shape in ((4, 3, 8, 8), (4, 2, 9, 8), (2, 8, 8)):
        with pytest.raises(ValueError, match=r"x: expected shape \(N, 2, 8, 8\), got"):
            network(torch.zeros(shape))


def test_a_copy_trains_on_its_own():
    network, x = StudentNetwork(grown_graph(SMALL, random.Random(6), 5)), images(SMALL)
    kept = copy.deepcopy(network.state_dict())
    trained(copy.deepcopy(network), x)
    assert all(torch.equal(kept[name], value) for name, value in network.state_dict().items())
