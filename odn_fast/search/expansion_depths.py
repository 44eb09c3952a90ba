"""The search for the smallest depth that passes (section III-C): depths one after another, or several at once."""

import copy
import dataclasses
from functools import partial
from typing import Any

from torch import Tensor

from ..engine import Convergence, Interrupted
from ..record import RunError
from .expansion_phases import Search, depth_lr, prepared_training, record_end, save_network, train_depth
from .expansion_state import RunState
from .expansion_strategies import chosen, found, in_order, none_of
from .expansion_workers import Cancelled, Crew

_WORDS = {"passed": "passes", "converged": "has converged", "cap": "stopped at the cap", "epochs": "has had its epochs",
          "diverged": "diverged (the loss is not finite any more)", "cancelled": "is given up (a shallower one has passed)"}


def search_depths(search: Search):
    """Train depths from the warmed-up weights, as the strategy chooses them, until the smallest that passes is known."""
    state = search.state
    if search.config.search.strategy == "parallel":
        _at_once(search)
    else:
        _one_after_another(search)
    state.found = found(state.ended)
    state.target_met = state.found is not None
    if not state.target_met:
        state.found = best_depth(state.trained)
    search.folder.event("chosen", depth=state.found, target_met=state.target_met)
    search.display.message(f"depth {state.found} reaches the target" if state.target_met else
                           f"{none_of(state.ended)} reached {_need(search):g} %; the best, depth {state.found}, is taken")
    state.begin("fine_tune", state.found)


def best_depth(trained: list[dict]) -> int:
    """The depth with the highest validation accuracy, the shallower of equals. Raises RunError where all diverged."""
    usable = [entry for entry in trained if entry["best_accuracy"] is not None]
    if not usable:
        raise RunError("every depth diverged: start again with a smaller --lr")
    return max(usable, key=lambda entry: (round(entry["best_accuracy"], 1), -entry["depth"]))["depth"]


def _one_after_another(search: Search):
    state, settings = search.state, search.config.search
    moves = chosen(settings.strategy)
    while wanted := moves(settings.initial_depth, search.last_depth, state.ended).wanted:
        if wanted[0] != state.depth:
            state.begin("search", wanted[0])
        rule = _rule(search, state.depth)
        outcome = train_depth(search, rule, depth_lr(search, state.depth))
        state.trained.append(_finished(search, rule, outcome))


def _at_once(search: Search):
    """Train depths in threads. This one starts and ends them, and does what they cannot do beside each other."""
    state, settings, run = search.state, search.config.search, search.config.run
    crew, interrupts, views = Crew(run.threads, run.device), search.recorder.interrupts, {}
    moves = partial(in_order, settings.initial_depth, search.last_depth)
    with interrupts.deferred():
        try:
            while True:
                wanted = moves(state.ended, crew.depths).wanted[:settings.workers - len(crew.depths)]
                if wanted and interrupts.pending is None:
                    with crew.pause.alone():
                        for depth in wanted:
                            views[depth] = _view(search, crew, depth)
                            crew.start(depth, prepared_training(views[depth], _rule(search, depth), depth_lr(search, depth)))
                if not crew.depths:
                    break
                depth, outcome = crew.next_ended()
                _conclude(search, crew, views.pop(depth), outcome)
        finally:
            crew.stop()
    if interrupts.pending is not None:
        search.recorder.checkpoint()
        raise Interrupted(interrupts.pending)
    for depth in sorted(state.under_way):  # of another process, which had no time to give them up
        view = dataclasses.replace(search, state=RunState("search", depth=depth))
        view.state.go_on_from(state.under_way[depth])
        _give_up(search, view)


def _conclude(search: Search, crew: Crew, view: Search, outcome: str | BaseException):
    """What a training that has ended means for the others and for the run. Raises what it raised."""
    state, depth = search.state, view.state.depth
    if isinstance(outcome, Cancelled):
        _give_up(search, view)
    elif isinstance(outcome, Interrupted):
        pass  # its state is saved; the others are about to follow
    elif isinstance(outcome, BaseException):
        raise outcome
    else:
        rule = _rule(search, depth)
        ended = state.ended | {depth: rule.passed(view.state.training)}
        for deeper in in_order(search.config.search.initial_depth, search.last_depth, ended, crew.depths).cancelled:
            crew.cancel(deeper)
        with crew.pause.alone():  # networks are traced
            state.trained.append(_finished(view, rule, outcome))
            state.under_way.pop(depth, None)


def _give_up(search: Search, view: Search):
    depth = view.state.depth
    with search.recorder.lock:
        search.state.cancelled.append(record_end(view, "cancelled"))
        search.state.under_way.pop(depth, None)
    _say_end(view, "cancelled")


def _view(search: Search, crew: Crew, depth: int) -> Search:
    """The search as the training of one depth sees it: network, state and recorder are its own."""
    state = RunState()
    state.begin("search", depth)
    if depth in search.state.under_way:
        state.go_on_from(_copied(search.state.under_way[depth]))

    def store():
        search.state.under_way[depth] = _copied(state.stored)
        search.recorder.checkpoint()

    recorder = search.recorder.beside(state, store, partial(crew.look_up, depth))
    return dataclasses.replace(search, model=copy.deepcopy(search.model), state=state, recorder=recorder)


def _copied(value: Any) -> Any:
    """A copy in the processor's memory: trainings change weights and momenta in place."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


def _finished(search: Search, rule: Convergence, outcome: str) -> dict:
    """Keep what a depth has come to: its training to go on from, its network as a by-product, its figures."""
    state, training = search.state, search.state.training
    search.folder.save_state(f"depth-{state.depth:02}", state.stored)
    if training.best_weights is not None:
        save_network(search, f"depths/depth-{state.depth:02}", training.best_weights,
                     {"validation_accuracy": training.best_accuracy, "test_accuracy": None})
    entry = record_end(search, outcome) | {"passed": rule.passed(training)}
    _say_end(search, outcome)
    return entry


def _say_end(search: Search, outcome: str):
    training, title = search.state.training, f"depth {search.state.depth}"
    best = "none" if training.best_accuracy is None else f"{training.best_accuracy:.2f} %"
    search.display.epoch(title, f"{title} {_WORDS[outcome]} after {training.epoch} epochs: best validation accuracy {best}")


def _rule(search: Search, depth: int) -> Convergence:
    settings = search.config.search
    exactly = settings.epochs_per_depth[depth - settings.initial_depth] if settings.epochs_per_depth else None
    return Convergence(digits=1, need=_need(search), cap=settings.epochs_cap, exactly=exactly)


def _need(search: Search) -> float:
    return search.config.search.target_accuracy - search.config.search.tolerance
