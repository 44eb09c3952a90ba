"""The tables of a growth's report: nodes, stages, and the measures that chose the splits."""

from collections import Counter
from collections.abc import Sequence

from ..engine.node_measures import NodeMeasure
from ..models.student_graph import StudentGraph
from .page import counted, listed, millions, share, table
from .run import Run
from .sections import FIRST_STEP, first_step


def collapses(stages: Sequence[dict]) -> dict[int, list[int]]:
    """By node, the stages after which it had collapsed."""
    found: dict[int, list[int]] = {}
    for stage in stages:
        for values in stage["nodes"]:
            if _measure(values).collapsed:
                found.setdefault(values["node"], []).append(stage["stage"])
    return found


def _measure(values: dict) -> NodeMeasure:
    return NodeMeasure(**{name: values[name] for name in NodeMeasure.__dataclass_fields__})


def split_words(split: dict, graph: StudentGraph) -> str:
    """What a split changed in `graph`, the one before it."""
    edge = graph.edge(split["edge"])
    where = f"edge {edge.source} → {edge.target}"
    if split["kind"] == "deepen":
        return f"deepen {where}: ×{edge.units} to ×{edge.units + split['units']}"
    return f"widen beside {where}: new node {split['new_node']} (q = {split['q']})"


def node_table(run: Run, graph: StudentGraph) -> str:
    """Every node of the graph, from the image on: its map, when it came, its edges, and its share of the splits."""
    born = {event["new_node"]: event["stage"] for event in run.events["split"] if event["kind"] == "widen"}
    splits = Counter(event["node"] for event in run.events["split"])
    lines = []
    for node in sorted(graph.nodes, key=lambda node: node.q):
        came = "start" if node.id not in born else f"stage {born[node.id]}"
        incoming = ", ".join(f"{edge.source} ×{edge.units}" for edge in graph.incoming(node.id))
        taken = splits[node.id]
        lines.append([{0: "0 (image)", 1: "1 (final)"}.get(node.id, str(node.id)), str(node.q),
                      f"{node.channels} × {node.height}×{node.width}", came, incoming or "–",
                      "–" if node.q == 0 else f"{taken} ({share(taken, splits.total())})" if splits else "0"])
    return table(["node", "q", "map", "since", "precursors × units", "splits (share)"], lines,
                 f"{counted(len(graph.nodes), 'node')}, {counted(len(graph.edges), 'edge')}, "
                 f"{counted(sum(edge.units for edge in graph.edges), 'unit')}: nodes along the teacher's depth q, and which of the "
                 f"{counted(splits.total(), 'split')} went to each.", "wnwwln")


def stage_table(run: Run, graphs: Sequence[StudentGraph]) -> str:
    """Size and accuracy after every stage, and the split that followed."""
    splits = {event["stage"]: event for event in run.events["split"]}
    lines = []
    for stage, graph in zip(run.events["stage"], graphs):
        split = splits.get(stage["stage"])
        lines.append([str(stage["stage"]), f"{stage['params']:,}", millions(stage["flops"]), f"{stage['validation_accuracy']:.2f} %",
                      f"{stage['seconds']:,.1f}", f"{stage['step_ms']:.1f}", first_step(stage["first_step_seconds"]),
                      str(split["node"]) if split else "–", split_words(split, graph) if split else "–"])
    retrained = run.last("retrain")
    said = f" Retraining: {first_step(retrained['first_step_seconds'])} ms." if retrained else ""
    return table(["stage", "parameters", "FLOPs", "validation", "seconds", "ms a step", "first step ms", "node split", "split"], lines,
                 f"After every stage; the split makes the graph of the next. {FIRST_STEP}{said}", "nnnnnnnnl")


def score_table(run: Run, graphs: Sequence[StudentGraph]) -> str:
    """Every supervised node's measures after every stage, the chosen node marked."""
    splits = {event["stage"]: event for event in run.events["split"]}
    other = run.config["growth"].get("score", "s") != "s"
    heads = ["stage", "node", "q", "S", *(["score"] if other else []), "R", "R relative", "R/R₀", "entropy", "peak", "distinct", "dead",
             "deg⁺/deg⁻", "split"]
    lines, marks = [], []
    for stage, graph in zip(run.events["stage"], graphs):
        split = splits.get(stage["stage"])
        for node in sorted(stage["nodes"], key=lambda node: node["q"]):
            chosen = bool(split) and split["node"] == node["node"]
            score = [f"{split['scores'][str(node['node'])]:#.3g}" if split else "–"] if other else []
            lines.append([
                str(stage["stage"]), str(node["node"]), str(node["q"]), f"{node['S']:#.3g}", *score, f"{node['R']:#.3g}",
                f"{node['relative']:.3f}", f"{node['R'] / node['R_zero']:.3f}" if node["R_zero"] else "–", f"{node['entropy']:.2f}",
                f"{node['peak']:.2f}", f"{node['distinct']:.1f}", str(node["dead"]), f"{node['out_degree']}/{node['in_degree']}",
                split_words(split, graph) if chosen else ""])
            marks.append("found" if chosen else "")
    return table(heads, lines, "S = deg⁺/deg⁻ · R, on the validation split. R: inner loss; relative: over the teacher's mean square; "
                 "R₀: of an all-zero map (from 1 on, R says nothing). Entropy, largest weight (peak) and distinct teacher channels of "
                 "attention; dead: channels that are zero everywhere. Marked: the node that was split.",
                 "n" * (len(heads) - 1) + "l", marks)


def skipped_table(splits: Sequence[dict]) -> str:
    """Why better-ranked choices were passed over; nothing where none was."""
    stages: dict[str, list[int]] = {}
    for split in splits:
        for reason in split["skipped"]:
            stages.setdefault(reason, []).append(split["stage"])
    lines = [[listed(where, "stage"), reason] for reason, where in stages.items()]
    return table(["in", "passed over"], lines, "Choices that ranked above the split that was made.", "ll") if lines else ""
