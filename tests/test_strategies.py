"""Which depths strategies train, and that the trainings come to linear's bits, however they are stopped on the way."""

import dataclasses
import io
import itertools
import math
import signal
import threading
import time

import pytest
import torch
from rich.console import Console
from test_models import tiny
from test_resume import ARGUMENTS, OFTEN, epochs, events, finish, start, wait_for_events, wait_for_step, weights
from test_search import events as events_of
from test_search import images, search

from odn_fast.config import ConfigError, ExpandConfig, from_values, resolve
from odn_fast.record import RunError, RunFolder
from odn_fast.search import expansion_depths, resume
from odn_fast.search.__main__ import _reached
from odn_fast.search.display import Display
from odn_fast.search.recorder import Recorder
from odn_fast.search.expansion_strategies import (
    bisect, chosen, found, in_order, in_words, longest, none_of, share_out, trained_by_bisection)
from odn_fast.search.expansion_workers import Crew, Pause

RANGES = [(first, first + length - 1) for first in (1, 3) for length in range(1, 9)]


def one_by_one(moves, first, last, passes):
    """Depths in the order in which they are trained, and what is found."""
    ended, order = {}, []
    while wanted := moves(first, last, ended).wanted:
        depth = wanted[0]
        assert depth not in ended and first <= depth <= last
        ended[depth] = passes[depth]
        order.append(depth)
    return order, found(ended)


def patterns(first, last):
    """Every way in which depths could pass or fail."""
    for outcomes in itertools.product((False, True), repeat=last - first + 1):
        yield dict(zip(range(first, last + 1), outcomes))


@pytest.mark.parametrize("first, last", RANGES)
def test_linear_trains_up_to_the_first_that_passes(first, last):
    for passes in patterns(first, last):
        order, answer = one_by_one(in_order, first, last, passes)
        assert answer == min((depth for depth in passes if passes[depth]), default=None)
        assert order == list(range(first, (answer or last) + 1))


@pytest.mark.parametrize("first, last", RANGES)
def test_bisect_finds_linears_answer_if_accuracy_grows_with_depth(first, last):
    for answer in range(first, last + 2):
        passes = {depth: depth >= answer for depth in range(first, last + 1)}
        order, bisected = one_by_one(bisect, first, last, passes)
        assert bisected == one_by_one(in_order, first, last, passes)[1]
        assert order == trained_by_bisection(first, last, answer)
        assert len(order) <= math.ceil(math.log2(last - first + 1)) + 1


@pytest.mark.parametrize("first, last", RANGES)
def test_bisect_ends_with_a_depth_that_passed_whatever_the_accuracies(first, last):
    for passes in patterns(first, last):
        order, answer = one_by_one(bisect, first, last, passes)
        assert answer is None or passes[answer]
        assert answer is not None or last in order and not any(passes[depth] for depth in order)


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("first, last", [(1, 1), (1, 2), (2, 4), (1, 4)])
def test_parallel_finds_linears_answer_whichever_training_ends_first(first, last, workers):
    for passes in patterns(first, last):
        answer = one_by_one(in_order, first, last, passes)[1]
        for ended in every_course(first, last, workers, passes, {}, frozenset()):
            assert found(ended) == answer
            assert set(range(first, (answer or last) + 1)) <= set(ended)


def every_course(first, last, workers, passes, ended, under_way):
    """What has ended at the end of every course that the search can take: any training may end next, and one that is
    cancelled may have ended before it hears of it."""
    moves = in_order(first, last, ended, under_way)
    for heard in itertools.product((True, False), repeat=len(moves.cancelled)):
        late = {depth: passes[depth] for depth, cancelled in zip(moves.cancelled, heard) if not cancelled}
        now, running = ended | late, under_way - set(moves.cancelled)
        wanted = in_order(first, last, now, running).wanted[:workers - len(running)]
        running |= set(wanted)
        assert len(running) == min(workers, len([depth for depth in range(first, (found(now) or last + 1)) if depth not in now]))
        if not running:
            yield now
        for depth in running:
            yield from every_course(first, last, workers, passes, now | {depth: passes[depth]}, running - {depth})


def test_what_shares_cores_out():
    assert share_out(2, 8, False, None, None) == (2, 1)
    assert share_out(16, 3, False, None, None) == (3, 5)
    assert share_out(16, 8, False, None, 4) == (4, 4)
    assert share_out(16, 8, False, 2, None) == (2, 8)
    assert share_out(4, 8, False, 2, 3) == (2, 3)
    assert share_out(1, 8, False, None, 2) == (1, 2)
    assert share_out(16, 3, False, 8, None) == (8, 5)  # workers without a depth take no cores from the others
    assert share_out(16, 8, True, None, None) == (4, 4)


def test_longest_time():
    seconds = {2: 1.0, 3: 2.0, 4: 4.0, 5: 8.0}
    assert longest("linear", seconds) == 15
    assert longest("bisect", seconds) == max(2 + 1, 2 + 4, 2 + 4 + 8)
    assert longest("parallel", seconds, workers=2) == 15 / 2 + 8 / 2
    assert longest("parallel", {1: 5.0}, workers=3) == pytest.approx(5)


def test_words():
    assert none_of([3]) == "no depth from 3 to 3" and none_of([2, 1, 3]) == "no depth from 1 to 3"
    assert none_of([4, 6, 8]) == "none of the depths 4, 6 and 8"
    assert "2 depths at once, each on 1 thread;" in in_words("parallel", 2, 1) and "3 threads;" in in_words("parallel", 2, 3)
    assert "if accuracy grows with depth" in in_words("bisect", None, 1)
    assert chosen("bisect") is bisect and chosen("linear") is in_order


@pytest.mark.parametrize("strategy", ["linear", "bisect"])
def test_workers_without_parallel_are_refused(strategy):
    with pytest.raises(ConfigError, match=f"search.workers: goes with --strategy parallel only; {strategy} trains one depth at a time"):
        resolve(from_values({"search.strategy": strategy, "search.workers": 2}))
    assert resolve(from_values({"search.strategy": "parallel", "search.workers": 2})).search.workers == 2
    assert ExpandConfig().search.strategy == "linear"


def test_a_pause_waits_until_every_training_stands_still():
    pause, log, ends = Pause(), [], threading.Event()

    def work():
        with pause.running():
            while not ends.is_set():
                log.append(threading.get_ident())
                time.sleep(0.001)
                pause.look_up()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        with pause.alone():
            before = len(log)
            time.sleep(0.02)
            assert len(log) == before
        seen = len(log)
        while len(log) < seen + 10:  # and that it goes on after it
            time.sleep(0.001)
    ends.set()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert len(set(log)) == 3


def test_a_training_that_starts_in_a_pause_waits_for_its_end():
    crew, log = Crew(1, "cpu"), []
    with crew.pause.alone():
        crew.start(4, lambda: log.append("trained") or "passed")
        time.sleep(0.05)
        log.append("paused")
    assert crew.next_ended() == (4, "passed") and log == ["paused", "trained"] and not crew.depths


def test_a_crew_stops_everything_and_gives_back_what_was_raised():
    crew = Crew(1, "cpu")

    def steps(depth):
        while True:
            crew.look_up(depth)
            time.sleep(0.001)

    def fails():
        raise MemoryError("none left")

    crew.start(1, lambda: steps(1))
    crew.start(2, fails)
    depth, outcome = crew.next_ended()
    assert depth == 2 and isinstance(outcome, MemoryError) and crew.depths == {1}
    crew.stop()
    assert not crew.depths


def test_threads_of_a_worker_are_its_own():
    crew, seen = Crew(3, "cpu"), []
    crew.start(1, lambda: seen.append(torch.get_num_threads()) or "cap")
    crew.next_ended()
    assert seen == [3] and torch.get_num_threads() == 2


def test_live_lines_of_several_trainings_stand_below_each_other():
    display, screen = Display(), io.StringIO()
    display._console = Console(file=screen, force_terminal=True, width=60, highlight=False)
    display.step("depth 1", "depth 1, epoch 1, step 3")
    display._shown = 0.0
    display.step("depth 2", "depth 2, epoch 4, step 1")
    frame = screen.getvalue().splitlines()[-2:]
    assert frame[0].endswith("depth 1, epoch 1, step 3") and "depth 2, epoch 4, step 1" in frame[1]
    display.epoch("depth 1", "depth 1, epoch 1: loss 1.0")
    display._shown = 0.0
    display.step("depth 2", "depth 2, epoch 4, step 2")
    rest = screen.getvalue().split("loss 1.0")[1]
    assert "depth 1" not in rest and "depth 2, epoch 4, step 2" in rest
    display.close()
    assert not display._steps and display._live is None


def networks(result):
    return {str(path.relative_to(result.folder)): path.read_bytes() for path in result.folder.glob("**/model.safetensors")}


def figures(result):
    """Every epoch by depth, without times."""
    kept = ("phase", "depth", "epoch", "losses", "train_accuracies", "validation_accuracy", "lr", "counter", "improved")
    return sorted(([event[key] for key in kept] for event in events_of(result, "epoch")), key=str)


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """Of a search that passes at depth 2, and one that never passes, at 1 and 2 threads."""
    folder = tmp_path_factory.mktemp("linear")
    return {(threads, learnable): search(folder, f"run-{threads}-{learnable}", threads=threads, learnable=learnable,
                                         epochs_cap=12 if learnable else 3)
            for threads, learnable in [(1, True), (2, True), (1, False)]}


@pytest.mark.parametrize("workers, threads", [(1, 1), (2, 1), (3, 1), (2, 2)])
def test_parallel_comes_to_linears_bits(tmp_path, linear, workers, threads):
    straight = linear[threads, True]
    result = search(tmp_path, strategy="parallel", workers=workers, threads=threads)
    assert result.target_met and result.depth == straight.depth == 2
    wanted, got = networks(straight), networks(result)
    assert {name: got[name] for name in wanted} == wanted  # by-products of deeper depths may have come on top
    assert result.test_accuracy == straight.test_accuracy
    assert [each for each in figures(result) if each[1] != 3 or each[0] == "warm_up"] == figures(straight)
    assert (result.config.search.workers, result.config.run.threads) == (workers, threads)
    assert len(events_of(result, "test_reading")) == 1


def test_parallel_takes_linears_best_where_no_depth_passes(tmp_path, linear):
    straight = linear[1, False]
    result = search(tmp_path, strategy="parallel", workers=3, learnable=False, epochs_cap=3)
    assert not result.target_met and result.depth == straight.depth
    assert networks(result) == networks(straight) and figures(result) == figures(straight)


def test_bisect_trains_what_it_needs_to_linears_bits(tmp_path, linear):
    result = search(tmp_path, strategy="bisect", target=70)  # depth 2 passes, then depth 1
    assert [event["depth"] for event in events_of(result, "depth") if event["phase"] == "search"] == [2, 1]
    assert result.depth == 1 and result.target_met
    assert _reached(result, [1, 2], "70 %") == "is the smallest that reaches 70 %"
    assert _reached(dataclasses.replace(result, depth=3), [3], "70 %") == (
        "reaches 70 %; it is the smallest that does if accuracy grows with depth (not tried: 1, 2)")
    missed = search(tmp_path, "missed", strategy="bisect", learnable=False, epochs_cap=3)
    assert [event["depth"] for event in events_of(missed, "depth") if event["phase"] == "search"] == [2, 3]
    straight = networks(linear[1, False])
    for depth in (2, 3):
        name = f"depths/depth-{depth:02}/model.safetensors"
        assert networks(missed)[name] == straight[name]
    assert [row["trained"] for row in missed.depths] == [False, True, True]


def slowed(monkeypatch, depth):
    """Deeper trainings than `depth` wait after every step, so that it ends before them."""
    step = Recorder.step

    def slow_step(recorder, model, optimizer, training):
        if recorder._state.phase == "search" and recorder._state.depth > depth:
            time.sleep(0.05)
        step(recorder, model, optimizer, training)

    monkeypatch.setattr(Recorder, "step", slow_step)


def test_a_depth_that_passes_cancels_deeper_ones(tmp_path, monkeypatch):
    slowed(monkeypatch, 1)
    result = search(tmp_path, strategy="parallel", workers=3, target=60)
    assert result.depth == 1 and result.target_met
    ended = {event["depth"]: event for event in events_of(result, "depth") if event["phase"] == "search"}
    assert {depth: event["outcome"] for depth, event in ended.items()} == {1: "passed", 2: "cancelled", 3: "cancelled"}
    epochs = [event for event in events_of(result, "epoch") if event["phase"] == "search"]
    reached = {depth: max((event["epoch"] for event in epochs if event["depth"] == depth), default=0) for depth in ended}
    assert {depth: event["epochs"] for depth, event in ended.items()} == reached
    rows = {row["depth"]: row for row in result.depths}
    assert not rows[2]["trained"] and rows[2]["outcome"] == "cancelled" and rows[2]["validation_accuracy"] is None
    assert rows[3]["epochs"] == reached[3]
    assert {path.name for path in (result.folder / "depths").iterdir()} == {"depth-01"}
    assert events_of(result, "result")[0]["seconds"] > 0


def test_deeper_depths_that_had_ended_before_are_kept(tmp_path, monkeypatch):
    finished = threading.Event()
    step, conclude = Recorder.step, expansion_depths._finished

    def wait(recorder, model, optimizer, training):
        if recorder._state.phase == "search" and recorder._state.depth < 3:
            deadline = time.monotonic() + 60
            while not finished.is_set():  # for depth 3, which the end of another would give up
                assert time.monotonic() < deadline, "depth 3 has not ended"
                recorder._look_up()
                time.sleep(0.01)
        step(recorder, model, optimizer, training)

    def tell(search_view, rule, outcome):
        entry = conclude(search_view, rule, outcome)
        if entry["depth"] == 3:
            finished.set()
        return entry

    monkeypatch.setattr(Recorder, "step", wait)
    monkeypatch.setattr(expansion_depths, "_finished", tell)
    result = search(tmp_path, strategy="parallel", workers=3, target=60, lr=0.1, warm_up_epochs=2)
    assert result.depth == 1 and [row["outcome"] for row in result.depths][2] == "passed"
    assert (result.folder / "depths" / "depth-03" / "model.safetensors").is_file()


def test_an_error_of_one_worker_stops_the_others_and_loses_nothing(tmp_path, monkeypatch, linear):
    event = RunFolder.event

    def full(folder, name, /, **values):
        if name == "epoch" and values["phase"] == "search" and (values["depth"], values["epoch"]) == (2, 3):
            raise RunError("events.jsonl: cannot be written (No space left on device)")
        event(folder, name, **values)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "event", full)
        with pytest.raises(RunError, match="No space left on device"):
            search(tmp_path, strategy="parallel", workers=2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("depth")]
    result = resume(tmp_path / "run", model=tiny(dtype=torch.float32), train=images(80, 0), validation=images(40, 1), test=images(35, 2))
    got, wanted = networks(result), networks(linear[1, True])
    assert {name: got[name] for name in wanted} == wanted
    assert [each for each in figures(result) if each[1] != 3 or each[0] == "warm_up"] == figures(linear[1, True])


class Killed(Exception):
    pass


def test_every_checkpoint_holds_every_depth_at_a_moment_of_its_own(tmp_path, monkeypatch, linear):
    """Whoever writes it: what it says of a step of a depth is the same as in every other one, before and after a resumption."""
    seen, save = {}, RunFolder.save_checkpoint

    def checked(folder, state):
        save(folder, state)
        under_way = state["state"]["under_way"]
        written = [event for event in folder.events() if event["event"] == "epoch" and event["phase"] == "search"]
        for depth, each in under_way.items():
            assert sum(event["depth"] == depth for event in written) == each["training"]["epoch"]
            tensors = [*each["model"].values(), *(value["momentum_buffer"] for value in each["optimizer"]["state"].values())]
            content = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
            place = depth, each["training"]["epoch"], each["training"]["step"]
            assert seen.setdefault(place, content) == content, place
        most.append(len(under_way))
        if len(most) == 60:
            raise Killed

    monkeypatch.setattr(RunFolder, "save_checkpoint", checked)
    most, data = [], {"train": images(80, 0), "validation": images(40, 1), "test": images(35, 2)}
    with pytest.raises(Killed):
        search(tmp_path, strategy="parallel", workers=2, checkpoint_minutes=1e-9)
    assert max(most) == 2 and any(step for _, _, step in seen) and len(most) >= 60
    most.clear()
    with pytest.raises(Killed):
        resume(tmp_path / "run", model=tiny(dtype=torch.float32), **data)
    monkeypatch.undo()
    got, wanted = networks(resume(tmp_path / "run", model=tiny(dtype=torch.float32), **data)), networks(linear[1, True])
    assert {name: got[name] for name in wanted} == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("capture", [True, False])
def test_parallel_on_a_gpu_comes_near_linear(tmp_path, capture):
    """Each worker on a stream of its own; kernels of a GPU need not add up in one order."""
    shared = {"device": "cuda", "capture": capture, "learnable": False, "epochs_cap": 3}
    straight, result = search(tmp_path, "linear", **shared), search(tmp_path, "run", strategy="parallel", workers=3, **shared)
    assert [row["epochs"] for row in result.depths] == [row["epochs"] for row in straight.depths] == [3, 3, 3]
    losses = [{(event["depth"], event["epoch"]): event["losses"] for event in events_of(each, "epoch") if event["phase"] == "search"}
              for each in (straight, result)]
    assert all(losses[1][place] == pytest.approx(losses[0][place], rel=1e-2) for place in losses[0])


def test_every_depth_diverges_in_parallel(tmp_path):
    with pytest.raises(RunError, match="every depth diverged: start again with a smaller --lr"):
        search(tmp_path, strategy="parallel", workers=2, lr=1e30)


PARALLEL = ["--strategy", "parallel", "--workers", "2", "--max-depth", "3", "--epochs-per-depth", "5,4,3"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The uninterrupted linear run that the interrupted ones are compared with."""
    run = tmp_path_factory.mktemp("straight") / "run"
    finish(*ARGUMENTS, *PARALLEL[4:], "--out", run)
    return run


def by_depth(run):
    return sorted(epochs(run), key=lambda event: (str(event["phase"]), event["depth"], event["epoch"]))


def test_killed_in_the_middle_of_a_parallel_search_gives_linears_bits(tmp_path, straight):
    run, resumed = tmp_path / "run", []
    child = start(*ARGUMENTS, *PARALLEL, *OFTEN, "--out", run)
    for count in (5, 8, 11):
        wait_for_events(child, run, count)
        wait_for_step(child, run)
        child.kill()
        child.communicate()
        with RunFolder.open(run) as folder:
            saved = folder.load_checkpoint()
        resumed.append({depth: each["training"]["step"] for depth, each in saved["state"]["under_way"].items()})
        child = start("--resume", run)
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 0, output + errors
    assert max(map(len, resumed)) == 2, resumed  # two depths under way at once
    assert any(step for each in resumed for step in each.values()), resumed  # one within an epoch
    assert weights(run) == weights(straight) and by_depth(run) == by_depth(straight)
    assert [event["outcome"] for event in events(run) if event["event"] == "depth" and event["phase"] == "search"] == ["epochs"] * 3


def test_a_signal_saves_every_depth_under_way(tmp_path, straight):
    run = tmp_path / "run"
    child = start(*ARGUMENTS, *PARALLEL, "--out", run)
    wait_for_events(child, run, 5)
    child.send_signal(signal.SIGTERM)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 143 and f"--resume {run}" in errors and "Traceback" not in errors, output + errors
    done = finish("--resume", run)
    assert "resumed in phase search at depth" in done.stdout
    assert weights(run) == weights(straight) and by_depth(run) == by_depth(straight)
