"""The report of a radiance field's growth: the student beside its teacher and the controls, seen and measured."""

import math
import re
from collections.abc import Iterable, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter

from .growth_plots import number_stages
from .page import counted, escaped, foldable, listed, plot, share, table
from .plots import BLUE, GREEN, GREY, INK, ORANGE, rendered
from .run import Run
from .sections import FIRST_STEP, configuration, first_step, setting_table, time_table

_PHASES = {"teacher": "teacher", "stage": "stages", "retrain": "retraining", "control": "controls"}
_CONTROLS = {"random": "neurons of the teacher drawn at random, the same share of every layer, as many as the student's size holds",
             "half": "half of the neurons of every layer of the teacher, drawn at random",
             "narrow": "one width for all layers, from drawn weights, as wide as the student's size holds"}
_COLOURS = {"random": ORANGE, "half": "#8a6d10", "narrow": "#7a4fb5"}
_SILENT = 0.05  # of the teacher's mean square
_MOST_PICTURE = 1 << 20  # characters of base64
_USAGE = """from odn_fast.search import load_field      # in Python
field = load_field("model")"""
_SIZE_CAPTION = ("Above: PSNR on the validation views: grey: after a stage, with its number; blue: the student after retraining. Below: R "
                 "of every hidden layer after a stage, on the same rays; circles: the layer that grew.")


def subject(start: dict) -> str:
    """What the title says of a run, by its event `start`."""
    return f"a radiance field grown under {start['teacher']} on {start['dataset']['name']}"


def missed(result: dict) -> bool:
    """Whether the headline is bad news."""
    return bool(_as_good(result))


def warnings(run: Run) -> list[str]:
    """What went wrong, as the run said it."""
    return run.warnings


def headline(run: Run) -> str:
    """What was found, in one sentence."""
    result = run.result
    if result is None:
        if not run.events["epoch"]:
            return "This run is unfinished: no epoch has been recorded yet."
        last = run.events["epoch"][-1]
        where = {"stage": f"stage {last['stage']}"}.get(last["phase"], _PHASES.get(last["phase"], last["phase"]))
        return f"This run is unfinished: it stands at {where}, epoch {last['epoch']}."
    teacher = result["teacher"]
    text = (f"A student of {result['params']:,} parameters, {share(result['params'], teacher['params'])} of its teacher's, shows the "
            f"test views with {_decibels(result['test_psnr'])}, the teacher with {_decibels(teacher['test_psnr'])}")
    better = _as_good(result)
    if not _rivals(result):
        return f"{text}; no control of its size was trained."
    if better:
        return f"{text}; but growing it was worth nothing here: controls no larger did as well or better ({', '.join(better)})."
    return f"{text}; no control of its size did as well."


def _as_good(result: dict) -> list[str]:
    """Controls no larger than the student that do as well, on the test views."""
    return [each["name"] for each in _rivals(result) if each["test_psnr"] >= result["test_psnr"]]


def _rivals(result: dict) -> list[dict]:
    """Controls no larger than the student; half of a teacher's neurons may be more than its budget."""
    return [each for each in result["controls"] if each["params"] <= result["params"]]


def notes(run: Run) -> Iterable[str]:
    result, start = run.result, run.last("start")
    if result:
        grown = [event["layer"] for event in run.events["widen"]]
        yield (f"Hidden layers have {', '.join(map(str, result['widths']))} neurons after {counted(result['stages'], 'stage')}; the "
               f"teacher's {', '.join(map(str, result['teacher']['widths']))}. The student uses "
               f"{share(result['params'], result['budget'])} of its budget of {result['budget']:,} parameters.")
        for each in result["controls"]:
            yield (f"Control {each['name']}: {_CONTROLS.get(each['name'], 'another field')}; {counted(each['epochs'], 'epoch')} on "
                   f"colours alone, as many as the student had in all. The student is {_apart(result['test_psnr'], each['test_psnr'])}.")
        yield from _silent_note(run)
        if grown and max(map(grown.count, grown)) > len(grown) / 2 and len(result["widths"]) > 1:
            most = max(grown, key=grown.count)
            yield f"Layer {most + 1} took {grown.count(most)} of the {len(grown)} stages."
    if start:
        growth, training = run.config["growth"], run.config.get("training") or {}
        yield (f"An epoch is {training.get('steps_per_epoch')} steps of {training.get('rays')} rays; a ray is seen at "
               f"{training.get('samples')} samples. Validation decides nothing but the layer that grows; while training it is followed on "
               f"{counted(start['dataset']['followed_rays'], 'ray')}, and the figures in the first table are means over whole views.")
        yield (f"R is the mean squared difference between what a layer's neurons say and the teacher's, projected by channel attention "
               f"(score: {growth.get('score')}). One run, one seed: differences of some tenths of a dB say little.")
    if run.events["resume"]:
        yield f"The run was resumed {counted(len(run.events['resume']), 'time')}."


def _silent_note(run: Run) -> Iterable[str]:
    """A layer may be close to its attention's target and yet say next to nothing, where that is made of silent neurons."""
    last = run.last("stage")
    layers = last["layers"] if last else []
    silent = [each["layer"] + 1 for each in layers if each["mean_square"] < _SILENT * each["teacher_mean_square"]]
    if silent:
        yield (f"After the last stage {listed(silent, 'layer')} said less than {100 * _SILENT:g} % of what the teacher's did (mean "
               "square): channel attention let R fall by choosing neurons of the teacher that say little, so R steers growth poorly there.")


def cards(run: Run) -> Iterable[tuple[str, str, str]]:
    """The large figures of the first screen: title, value, explanation."""
    result, teacher = run.result, run.result["teacher"]
    readings = [reading for reading in run.events["test_reading"] if reading["network"] == "student"]
    times = "read once" if len(readings) == 1 else f"read {len(readings)} times"
    yield "Test PSNR", _decibels(result["test_psnr"]), f"{times}; the teacher has {_decibels(teacher['test_psnr'])}"
    yield "Validation PSNR", _decibels(result["validation_psnr"]), f"the teacher has {_decibels(teacher['validation_psnr'])}"
    yield "Parameters", f"{result['params']:,}", f"{share(result['params'], teacher['params'])} of the teacher's {teacher['params']:,}"
    best = max(result["controls"], key=lambda each: each["test_psnr"], default=None)
    yield ("Best control", _decibels(best["test_psnr"]) if best else "–",
           f"{best['name']}: {best['params']:,} parameters, on test" if best else "none was trained")


def sections(run: Run) -> Iterable[tuple[str, str]]:
    """Heading and HTML of every section that the run has events for."""
    start = run.last("start")
    if run.events["test_reading"]:
        yield "A test view", _pictures(run)
    if run.last("teacher"):
        yield "Size and PSNR", _field_table(run)
    if run.events["stage"]:
        yield "Growth", plot(_growth_plot(run), _SIZE_CAPTION) + _stage_table(run)
    if run.result:
        yield "Using the model", f"<p>In the run folder:</p><pre>{escaped(_USAGE)}</pre>"
    if start:
        data = start["dataset"]
        size = " × ".join(map(str, data["input_shape"][1:]))
        views = (f"{data['name']}: {data['train']:,} training, {data['validation']:,} validation and {data['test']:,} test views of "
                 f"{size} pixels")
        yield "What it took", time_table(run, _PHASES, "rays") + setting_table(start, [("teacher", start["teacher"])], views)
    yield configuration(run)


def _pictures(run: Run) -> str:
    """The first test view as it is, and as every field shows it."""
    readings = {event["network"]: event for event in run.events["test_reading"]}
    shown = [("as it is", "", next(iter(readings.values()))["truth"])]
    order = ["teacher", "student", *(name for name in readings if name not in ("teacher", "student"))]
    shown += [(name, _decibels(readings[name]["first_view_psnr"]), readings[name]["picture"]) for name in order if name in readings]
    cells = []
    for name, words, picture in shown:
        image = "<p>(its picture is damaged)</p>"
        if isinstance(picture, str) and len(picture) <= _MOST_PICTURE and re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", picture):
            image = (f"<img alt='{escaped(name)}' src='data:image/png;base64,{picture}' "
                     "style='width: 100%; image-rendering: pixelated; border-radius: 6px'>")
        cells.append(f"<figure style='flex: 1 1 9rem; max-width: 16rem'>{image}<figcaption>{escaped(name)}<br>{escaped(words)}"
                     "</figcaption></figure>")
    return (f"<div style='display: flex; flex-wrap: wrap; gap: .75rem'>{''.join(cells)}</div><p class='caption'>The first of "
            f"{counted(shown and run.events['test_reading'][-1]['views'], 'test view')}, with the PSNR of this view.</p>")


def _field_table(run: Run) -> str:
    teacher, result = run.last("teacher"), run.result
    fields = [("teacher", teacher, teacher["epochs"])]
    if result:
        stages = sum(event["epochs"] for event in run.events["stage"])
        retrained = sum(event["epochs"] for event in run.events["retrain"])
        fields.append(("student", result, stages + retrained))
    fields += [(f"control {each['name']}", each, each["epochs"]) for each in run.events["control"]]
    lines = [[name, ", ".join(map(str, each["widths"])), f"{each['params']:,}", share(each["params"], teacher["params"]), str(epochs),
              f"{each['validation_psnr']:.2f}", f"{each['test_psnr']:.2f}"] for name, each, epochs in fields]
    return table(["field", "hidden layers", "parameters", "share", "epochs", "validation dB", "test dB"], lines,
                 "PSNR: mean over views. A student's epochs: stages and retraining.", "wlnnnnn",
                 ["found" if name == "student" else "" for name, _, _ in fields])


def _stage_table(run: Run) -> str:
    """R of every layer after every stage."""
    stages, grown = run.events["stage"], {event["stage"]: event for event in run.events["widen"]}
    layers = range(len(stages[0]["layers"]))
    lines = []
    for stage in stages:
        widened = grown.get(stage["stage"])
        what = f"layer {widened['layer'] + 1} by {widened['by']}" if widened else "–"
        cells = [f"{each['R']:.3g} ({each['width']})" for each in stage["layers"]]
        lines.append([str(stage["stage"]), f"{stage['params']:,}", f"{100 * stage['share']:.1f} %", f"{stage['validation_psnr']:.2f}",
                      *cells, what, first_step(stage["first_step_seconds"])])
    body = table(["stage", "parameters", "share", "validation dB", *(f"R layer {layer + 1} (width)" for layer in layers), "then grows",
                  "first step ms"],
                 lines, f"After every stage. {FIRST_STEP}", "n" * (4 + len(layers)) + "wn")
    dead = sorted({each["layer"] + 1 for stage in stages[-1:] for each in stage["layers"] if each["dead"]})
    said = f"<p class='caption'>Neurons that are zero everywhere after the last stage: in {listed(dead, 'layer')}.</p>" if dead else ""
    return foldable(body, "R of every layer, stage by stage", len(lines)) + said


def _growth_plot(run: Run) -> str:
    stages, grown, result = run.events["stage"], {event["stage"]: event["layer"] for event in run.events["widen"]}, run.result

    def draw(figure: Figure):
        top, bottom = figure.subplots(2, 1)
        top.plot([stage["params"] for stage in stages], [stage["validation_psnr"] for stage in stages], "o-", color=GREY, ms=4, lw=1)
        number_stages(top, [(stage["stage"], stage["params"], stage["validation_psnr"]) for stage in stages],
                      [result["params"]] if result else [])
        teacher = run.last("teacher")
        top.axhline(teacher["validation_psnr"], color=GREEN, lw=1, ls="--", label="teacher")
        for each in run.events["control"]:
            top.plot(each["params"], each["validation_psnr"], "s", color=_COLOURS.get(each["name"], INK), ms=6,
                     label=f"control {each['name']}")
        if result:
            top.plot(result["params"], result["validation_psnr"], "D", color=BLUE, ms=7, label="student, retrained")
        top.set(xlabel="parameters", ylabel="validation PSNR (dB)")
        top.set_xlim(0, 1.1 * max(each["params"] for each in (*stages, *run.events["control"], *([result] if result else ()))))
        top.xaxis.set_major_formatter(EngFormatter(sep=" "))
        top.legend(loc="lower right", fontsize=9, framealpha=0.85, edgecolor="none")
        _draw_losses(bottom, stages, grown)
    return rendered("growth", (8.4, 6.4), "PSNR against parameters, and R of every layer by stage", draw)


def _draw_losses(axes, stages: Sequence[dict], grown: dict[int, int]):
    count, ends = len(stages[0]["layers"]), []
    for layer in range(count):
        values = [(stage["stage"], stage["layers"][layer]["R"]) for stage in stages if 0 < stage["layers"][layer]["R"] < math.inf]
        if not values:
            continue
        colour = matplotlib.colormaps["viridis"](0.8 * layer / max(1, count - 1))
        axes.plot(*zip(*values), "-", color=colour, lw=1.3)
        chosen = [(stage, value) for stage, value in values if grown.get(stage) == layer]
        axes.plot(*zip(*chosen), "o", color=colour, ms=5) if chosen else None
        ends.append((values[-1][1], f"layer {layer + 1}", colour))
    axes.set_yscale("log")
    low, high = map(math.log, axes.get_ylim())
    ends.sort(key=lambda end: end[0])
    heights = spread([(math.log(value) - low) / (high - low) for value, _, _ in ends], 0.08)
    for height, (_, text, colour) in zip(heights, ends):
        axes.text(1.01, height, text, transform=axes.transAxes, va="center", fontsize=8.5, color=colour)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="stage", ylabel="R")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def spread(heights: Sequence[float], least: float) -> list[float]:
    """Rising heights, raised where two would be nearer to each other than `least`, and none of them beyond 1 where there is room."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + least) if placed else height)
    top = 1.0
    for index in reversed(range(len(placed))):
        placed[index], top = min(placed[index], top), min(placed[index], top) - least
    return placed


def _decibels(value: float) -> str:
    return f"{value:.2f} dB"


def _apart(student: float, control: float) -> str:
    difference = student - control
    if round(abs(difference), 2) == 0:
        return "as good on the test views"
    return f"{abs(difference):.2f} dB {'better' if difference > 0 else 'worse'} on the test views"
