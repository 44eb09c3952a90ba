"""report.html says what the events say, and nothing else. Runs are synthetic: a small generator writes their files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_run import Page, Synthetic, digits, missed, sizes

from odn_fast.record import RunError
from odn_fast.report import read_run, write_report
from odn_fast.report.__main__ import main
from odn_fast.report.expand import headline, notes
from odn_fast.report.expand_plots import learning_curves, size_plot
from odn_fast.report.page import compared, listed, milliseconds, percent, reduction
from odn_fast.report.plots import confusion_plot, wilson

ROOT = Path(__file__).parents[1]
NAN = float("nan")


def page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def digits_page(tmp_path_factory) -> Page:
    return page(digits().write(tmp_path_factory.mktemp("runs") / "digits"))


def texts_of(svg: str) -> list[str]:
    return [re.sub(r"<[^>]*>", "", text) for text in re.findall(r"<text[^>]*>(.*?)</text>", svg, re.S)]


def test_headline_names_depth_accuracy_cap_and_pass_line(digits_page):
    assert "Depth 2 of 8 reaches the target: 98.3 % on validation within 8 epochs (needed 97.5 %)." in digits_page.text
    assert ("body", {"class": "met"}) in digits_page.tags and "\ufffd" not in digits_page.raw


@pytest.mark.parametrize("run, sentence", [
    (digits(cap=None), "Depth 2 of 8 reaches the target: 98.67 % on validation (needed 97.5 %)."),
    (digits(cap=1), "Depth 2 of 8 reaches the target: 98.3 % on validation within 1 epoch (needed 97.5 %)."),
    (digits(tolerance=0.0), "Depth 2 of 8 reaches the target: 98.3 % on validation within 8 epochs (needed 98.0 %)."),
    # Passed by its fine-tuned network only: "within" would be false.
    (digits(target=99.0), "Depth 2 of 8 reaches the target: 98.67 % on validation (needed 98.5 %)."),
    (missed(), "No depth reached the target within 8 epochs (needed 97.5 %); the best, depth 2 of 3 with 96.0 %, was "
               "fine-tuned and extracted."),
    (missed(cap=None), "No depth reached the target (needed 97.5 %); the best, depth 2 of 3 with 96.0 %, was fine-tuned and "
                       "extracted."),
    (missed(cap=None, tuned=()), "No depth reached the target (needed 97.5 %); the best, depth 2 of 3 with 96.0 %, was "
                                 "extracted."),
    # Passed while searching, but not as it is loaded: the accuracy that failed is named.
    (digits(met=False, final=97.33), "No depth reached the target within 8 epochs (needed 97.5 %); the best, depth 2 of 8 "
                                     "with 97.33 %, was fine-tuned and extracted."),
])
def test_headline(tmp_path, run, sentence):
    assert headline(read_run(run.write(tmp_path))) == sentence


def said(run: Synthetic, folder: Path) -> str:
    return "\n".join(notes(read_run(run.write(folder))))


def test_cap_binds_the_search_and_not_the_fine_tuning(tmp_path):
    text = said(digits(), tmp_path / "cap")
    assert "A depth had at most 8 epochs: the cap bound the search, not the fine-tuning. It stopped depth 1;" in text
    assert "After fine-tuning, depth 2 stands at 98.67 % on validation." in text
    assert "No depth ran into it." in said(digits(searched={2: ("passed", [99.0])}), tmp_path / "free")
    assert "cap" not in said(digits(cap=None), tmp_path / "none")
    assert "It stopped depths 1–3;" in said(missed(), tmp_path / "all")


def test_notes_on_a_decision_that_fine_tuning_or_folding_would_change(tmp_path):
    above = "Only fine-tuning took the network to the pass line"
    below = "While searching the depth passed with 98.3 %; the network as it is loaded has 97.33 %."
    assert above in said(missed(final=97.67), tmp_path / "a")
    assert above not in said(missed(), tmp_path / "b") + said(digits(), tmp_path / "c")
    assert below in said(digits(met=False, final=97.33), tmp_path / "d")
    assert "While searching" not in said(digits(), tmp_path / "e")


def test_small_validation_split_is_said_in_points(tmp_path):
    text = said(digits(), tmp_path / "small")
    assert "The validation split has 300 images: one is worth 0.33 points" in text
    low, high = wilson(292, 300)  # 97.5 % of 300 images, rounded to even
    assert f"is known to ±{(high - low) / 2:.2g} points" in text
    spans = "spans the pass line"
    assert spans in text  # 296 of 300: 96.6 to 99.5 %
    assert spans not in said(digits(validation=10_000), tmp_path / "large")
    assert "10,000 images: one is worth 0.01 points" in said(digits(validation=10_000), tmp_path / "large")


def test_precision_untried_depths_and_resumes_are_said(tmp_path):
    plain = said(digits(), tmp_path / "plain")
    assert "Trained in" not in plain and "Not tried" not in plain and "resumed" not in plain
    assert "Trained in bf16 (asked for: auto)" in said(digits(precision="bf16"), tmp_path / "bf16")
    late = Synthetic({3: ("passed", [98.0])}, 3, 98.0)
    assert "Not tried: depths 1 and 2. A smaller network might do." in said(late, tmp_path / "late")
    for limit, setting in [({"epochs_per_depth": [2, 2]}, "epochs_per_depth"), ({"max_depth": 3}, "max_depth")]:
        limited = said(missed(depths=5, search=limit, cap=None), tmp_path / setting)
        assert f"limited to depth 3 ({setting})" in limited
        assert ("fixed beforehand (epochs_per_depth)" in limited) is (setting == "epochs_per_depth")
    assert "limited to" not in said(missed(), tmp_path / "all")
    assert "epochs_per_depth" not in plain and "max_depth" not in plain
    resumed = digits(extra=tuple({"event": "resume", "phase": "search", "depth": 1, "epoch": 2, "step": 5} for _ in range(2)))
    assert "The run was resumed 2 times." in said(resumed, tmp_path / "resumed")


def test_without_a_baseline_it_says_size_only(digits_page):
    assert "Compared with full depth: size only." in digits_page.text
    assert "Reduction against full depth (size only)." in digits_page.text
    assert "points on validation" not in digits_page.text


def test_baseline_compares_accuracy_too(tmp_path):
    shown = page(digits(baseline={"validation_accuracy": 99.0, "test_accuracy": 98.5}).write(tmp_path))
    assert ("Accuracy against full depth, trained as the baseline: −0.33 points on validation and −0.50 points on test."
            in shown.text)
    assert "size only" not in shown.text
    assert "Test accuracy 98.00 % read once; 294 of 300 images" in shown.text  # the found network's reading, not the baseline's
    assert shown.row("depth", "2 found")[2:4] == ["98.67 %", "0.33"]
    assert shown.row("depth", "1")[2:4] == ["96.30 %", "2.70"]
    assert [row[:3] for row in shown.table("depth") if row[0] == "8"] == [["8", "baseline", "99.00 %"]]
    no_test = said(digits(test=None, baseline={"validation_accuracy": 98.0, "test_accuracy": None}), tmp_path / "no_test")
    assert "baseline: +0.67 points on validation." in no_test


def test_large_figures(digits_page):
    for words in ("Depth 2 of 8 target met", "Validation accuracy 98.67 % 296 of 300 images; 95 % interval 96.6–99.5 %",
                  "Test accuracy 98.00 % read once; 294 of 300 images; 95 % interval 95.7–99.1 %",
                  "Parameters 40,000 0.16 MB; 98.4 % (64.0×) less than 2,560,000 at full depth",
                  "Latency 1.00 ms one image, folded fp32; 75.0 % (4.00×) less than 4.00 ms at full depth"):
        assert words in digits_page.text


def test_test_split_missing_or_read_twice_is_said(tmp_path):
    none = page(digits(test=None).write(tmp_path / "none"))
    assert "Test accuracy – not read: there is no test split" in none.text and "no test images" in none.text
    assert "Classes, on the validation split" in none.text
    again = {"event": "test_reading", "network": "found", "depth": 2, "correct": 294, "total": 300, "accuracy": 98.0}
    assert "read 2 times; 294 of 300" in page(digits(extra=(again,)).write(tmp_path / "twice")).text


def test_table_of_depths(digits_page):
    table = digits_page.table("depth")
    assert table[0] == ["depth", "training", "validation", "parameters", "reduction", "MB", "multiply-adds",
                        "latency ms (quartiles)", "reduction", "first step ms"]
    assert [row[0] for row in table[1:]] == ["1", "2 found", "3", "4", "5", "6", "7", "8"]
    assert digits_page.row("depth", "1") == ["1", "cap reached, 8 epochs", "96.30 %", "20,000", "99.2 %", "0.08", "10.0 M",
                                             "0.50 (0.45–0.60)", "87.5 %", "50.0"]
    found = digits_page.row("depth", "2 found")
    assert found[1:3] == ["passed, 4 epochs", "98.67 %"] and found[-1] == "100"
    assert digits_page.row("depth", "8") == ["8", "not trained", "–", "2,560,000", "–", "10.24", "80.0 M", "4.00 (3.60–4.80)",
                                             "–", "–"]
    assert "First step: from the decision for this network until its first training step had ended" in digits_page.text


def test_time_and_machine(digits_page):
    assert digits_page.row("phase", "search") == ["search", "12", "24.0", "600"]
    assert digits_page.row("phase", "warm-up")[1:3] == ["3", "6.0"]
    assert digits_page.row("phase", "measuring, checking, saving")[2] == "964.0"
    assert digits_page.row("phase", "all")[1:3] == ["18", "1,000.0"]
    assert digits_page.row("setting", "device")[1] == "cpu: Some CPU, 2 threads"
    assert digits_page.row("setting", "precision")[1] == "fp32 (asked for: auto)"
    assert digits_page.row("setting", "data set")[1] == \
        "digits: 1,197 training, 300 validation and 300 test images of 1 × 8 × 8, 10 classes"
    assert "target_accuracy: 98.0" in digits_page.text  # the configuration
    assert 'odn_fast.load("model")' in digits_page.text and "python -m odn_fast.predict model IMAGE" in digits_page.text
    assert "python -m odn_fast.evaluate model" in digits_page.text


def test_unsteady_latency_is_said(tmp_path):
    run = digits()
    assert "unsteady" not in said(run, tmp_path / "steady")
    run.after[-1]["depths"][7] |= {"latency_low_ms": 3.0, "latency_high_ms": 9.0}
    run.after[-1]["depths"][6] |= {"latency_high_ms": 99.0}  # no part of any comparison
    text = said(run, tmp_path / "unsteady")
    assert "latency of depth 8 was unsteady when it was measured (quartiles 3.00–9.00 ms)" in text and "depth 7" not in text


def test_network_without_a_name_and_epochs_too_short_to_time(tmp_path):
    run = digits()
    run.start["model"] = None
    for event in run.before:
        event.update({"images_per_second": None} if event["event"] == "epoch" else {})
    shown = page(run.write(tmp_path))
    assert shown.row("setting", "network")[1] == "a network given in Python" and "None" not in shown.text
    assert shown.row("phase", "warm-up")[3] == "–"


def test_per_class_accuracy_and_confusion(tmp_path):
    confusion = [[8, 2, 0], [0, 10, 0], [0, 0, 0]]
    shown = page(digits(classes=["cat", "dog", "eel"], confusion=confusion).write(tmp_path))
    assert shown.table("class")[1:] == [["cat", "80.0 %", "8 of 10", "dog (2)"], ["dog", "100.0 %", "10 of 10", "–"],
                                        ["eel", "no images", "0 of 0", "–"]]
    texts = texts_of(confusion_plot(confusion, ["cat", "dog", "eel"]))
    assert sorted(text for text in texts if text.isdigit()) == ["10", "2", "8"]
    assert texts.count("cat") == 2 and "true class" in texts and "predicted class" in texts


def test_many_classes_show_the_worst_ten_and_no_numbers(tmp_path):
    names = [f"kind {index}" for index in range(100)]
    confusion = [[200 - row if row == column else row * (column == (row + 1) % 100) for column in range(100)]
                 for row in range(100)]
    shown = page(digits(classes=names, confusion=confusion).write(tmp_path))
    assert [row[0] for row in shown.table("class")[1:]] == [f"kind {index}" for index in range(99, 89, -1)]
    assert shown.row("class", "kind 99") == ["kind 99", "50.5 %", "101 of 200", "kind 0 (99)"]
    assert "The 10 classes with the lowest accuracy, of 100." in shown.text
    texts = texts_of(confusion_plot(confusion, names))
    assert not any("kind" in text for text in texts) and len(texts) < 20


def test_learning_curves_mark_phases_depths_and_the_best_epoch(digits_page):
    svg = re.search(r'<svg[^>]*Learning curves.*?</svg>', digits_page.raw, re.S).group()
    texts = texts_of(svg)
    assert {"warm-up", "depth 1", "depth 2", "fine-tuning", "best 98.67 %", "epochs, end to end", "training loss"} <= set(texts)
    assert "baseline" not in texts
    run = digits()
    epochs = [event for event in run.before + run.search + run.after if event["event"] == "epoch"]
    flat = [event | {"lr": 0.01} for event in epochs]
    drops = learning_curves(epochs, 2, 98.0, 97.5, 300).count("<use"), learning_curves(flat, 2, 98.0, 97.5, 300).count("<use")
    # Ticks for the drops inside depth 1 and inside fine-tuning, one each, twice (marker definition apart); none when lr is flat.
    assert drops[0] - drops[1] == 2


def test_size_plot_labels_every_depth_and_the_target():
    rows = [sizes(depth) | {"trained": depth < 3, "validation_accuracy": 90.0 + depth if depth < 3 else None, "outcome": None}
            for depth in range(1, 9)]
    texts = texts_of(size_plot(rows, 2, None, 98.0, 97.5, 300))
    assert {"1", "depth 2", "3", "4", "5", "6", "7", "8", "target", "98 %", "pass line", "97.5 %"} <= set(texts)
    assert "baseline" in texts_of(size_plot(rows, 2, {"depth": 8, "validation_accuracy": 95.0}, 98.0, 97.5, 300))


def test_diverged_depth_with_nan_losses(tmp_path):
    run = digits(searched={1: ("diverged", [None, None]), 2: ("passed", [98.3])})
    for event in run.search:
        if event["event"] == "epoch" and event["depth"] == 1:
            event["losses"] = [NAN]
    shown = page(run.write(tmp_path / "one"))
    assert "Depth 1 diverged (search): its loss was not finite after 2 epochs, and its training ended there." in shown.text
    assert shown.row("depth", "1")[1:3] == ["diverged, 2 epochs", "–"]
    assert shown.raw.count("stroke: #c0262d") > page(digits().write(tmp_path / "two")).raw.count("stroke: #c0262d")
    alone = [event for event in run.search if event["event"] == "epoch" and event["depth"] == 1]
    assert "stroke: #c0262d" in learning_curves(alone, None, 98.0, 97.5, 300)  # nothing finite to scale by


def test_one_depth_without_warm_up(tmp_path):
    shown = page(Synthetic({1: ("passed", [98.0])}, 1, 98.0, depths=1, warm_up=0, cap=None).write(tmp_path))
    assert "Depth 1 of 1 reaches the target" in shown.text
    assert "the found network is full depth, nothing is reduced" in shown.text and "size only." not in shown.text
    assert "0.08 MB; this is full depth" in shown.text and "folded fp32; this is full depth" in shown.text
    assert [row[0] for row in shown.table("phase")[1:]] == ["search", "fine-tuning", "measuring, checking, saving", "all"]
    assert "warm-up" not in texts_of(re.search(r'<svg[^>]*Learning curves.*?</svg>', shown.raw, re.S).group())


def test_many_depths(tmp_path):
    searched = {depth: ("converged", [70.0 + depth / 2, 75 + depth / 2]) for depth in range(1, 33)} | {33: ("passed", [98.0])}
    shown = page(Synthetic(searched, 33, 98.0, depths=33, cap=None).write(tmp_path))
    assert [row[0].split()[0] for row in shown.table("depth")[1:]] == [str(depth) for depth in range(1, 34)]
    assert len(shown.raw) < 1_000_000


HOSTILE = ["<script>alert(1)</script>", "$x^2$ & 'y\"", "\ud800\x00\n", "猫", "]]>--><b>"]


def test_everything_from_files_is_escaped(tmp_path):
    confusion = [[3 * (row == column) + 1 for column in range(5)] for row in range(5)]
    run = digits(classes=HOSTILE, confusion=confusion, extra=({"event": "warning", "text": "<img src=x onerror=y>"},))
    run.config["model"] = run.start["model"] = "<script>model</script>"
    run.start["processor"] = "<iframe src=z>"
    run.start["dataset"]["name"] = "<b>set</b>"
    shown = page(run.write(tmp_path / "<i>run"))
    assert {tag for tag, _ in shown.tags}.isdisjoint({"script", "img", "iframe", "b", "i", "link", "object"})
    for text in ("<script>alert(1)</script>", "$x^2$ & 'y\"", "\ufffd\ufffd\ufffd", "猫", "]]>--><b>", "<img src=x onerror=y>",
                 "<script>model</script>", "<iframe src=z>", "<b>set</b>", "<i>run"):
        assert text in shown.text
    assert "\x00" not in shown.raw
    assert "$x^2$" in texts_of(confusion_plot([[1, 0], [0, 1]], ["$x^2$", "b"]))  # no formula


def test_page_needs_nothing_but_itself_and_its_ids_are_unique(digits_page):
    assert "http" not in digits_page.raw.replace("http-equiv", "")
    ids = [attributes["id"] for _, attributes in digits_page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 50
    used = re.findall(r"url\(([^)]*)\)", digits_page.raw)
    for tag, attributes in digits_page.tags:
        assert tag not in ("script", "link", "iframe", "object") and "src" not in attributes
        used += [attributes["href"]] if "href" in attributes else []
    assert {reference[1:] for reference in used if not reference.startswith("data:")} <= set(ids)
    assert any(reference.startswith("data:image/png;base64,") for reference in used) and len(used) > 20
    policy = next(attributes for tag, attributes in digits_page.tags if attributes.get("http-equiv"))
    assert policy["content"].startswith("default-src 'none'")


def test_same_run_gives_the_same_bytes_in_another_process(tmp_path):
    here = write_report(digits().write(tmp_path / "a" / "run")).read_bytes()
    there = digits().write(tmp_path / "b" / "run")
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nlines.linewidth: 9\n")
    environment = os.environ | {"PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "odn_fast.report", str(there)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{there / 'report.html'}\n", "")
    assert (there / "report.html").read_bytes() == here
    assert sorted(path.name for path in there.iterdir()) == ["config.yaml", "events.jsonl", "report.html"]


def test_unfinished_run_gives_what_there_is_at_every_stage(tmp_path):
    run = digits(depths=3, baseline={"validation_accuracy": 98.0, "test_accuracy": 98.0})
    everything = run.before + run.search + run.after
    for length in (0, 1, 2, 3, 6, 14, 19, 20, len(everything) - 1):
        shown = page(run.write(tmp_path / str(length), everything[:length]))
        assert "This run is unfinished" in shown.text and f"--resume {length}" in shown.text
        assert ("body", {"class": "unfinished"}) in shown.tags
        assert "epochs_cap: 8" in shown.text
    assert "This run is unfinished" not in page(run.write(tmp_path / "whole", everything)).text


def test_unfinished_headline_says_where_it_stands(tmp_path):
    run = digits()
    cut = run.before + run.search[:11]  # depth 1 ended, two epochs of depth 2
    assert headline(read_run(run.write(tmp_path, cut))) == (
        "This run is unfinished: it stands at depth 2 of 8, search, epoch 2; best so far: depth 1 with 96.3 % on validation "
        "(needed 97.5 %).")
    shown = page(tmp_path)
    assert shown.row("depth", "2")[1:3] == ["unfinished, 2 epochs", "93.00 %"]
    assert shown.row("depth", "1")[1:3] == ["cap reached, 8 epochs", "96.30 %"]
    assert shown.row("depth", "3")[1] == "not trained"
    assert headline(read_run(run.write(tmp_path, run.before[:3]))) == \
        "This run is unfinished: it stands at warm-up, epoch 1 (needed 97.5 %)."
    assert headline(read_run(run.write(tmp_path, []))) == "This run is unfinished: no epoch has been recorded yet."


@pytest.mark.parametrize("tail", ['{"event": "epoch", "ph', '{"event": "warning", "text": "half"}', "\0\0\0\n", "\xff\n"])
def test_torn_last_line_and_unknown_events_are_passed_over(tmp_path, tail):
    run = digits(extra=({"event": "from_the_future", "value": 1},))
    torn = read_run(run.write(tmp_path, tail=tail))
    assert torn.events == read_run(digits().write(tmp_path)).events
    assert torn.result["depth"] == 2


def test_warnings_are_shown_once(tmp_path):
    shown = page(digits(extra=({"event": "warning", "text": "mind the gap"},) * 3).write(tmp_path))
    assert shown.text.count("Warning: mind the gap") == 1


def command(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_command_line(tmp_path, capsys):
    run = digits().write(tmp_path / "run")
    assert command(capsys, run) == (0, f"{run / 'report.html'}\n", "")
    status, out, error = command(capsys, tmp_path / "nowhere")
    assert (status, out) == (2, "") and error.count("\n") == 1 and "is not a run folder (no config.yaml in it)" in error
    status, out, error = command(capsys, digits().write(tmp_path / "part", digits().before))
    assert (status, out) == (0, f"{tmp_path / 'part' / 'report.html'}\n")
    assert error.count("\n") == 1 and "is unfinished" in error and (tmp_path / "part" / "report.html").exists()
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "learning curves" in capsys.readouterr().out


def test_damaged_files_give_one_clear_line(tmp_path):
    run = digits().write(tmp_path)
    events = (run / "events.jsonl").read_text()
    lines = events.splitlines(keepends=True)
    for replaced, message in [("{not json\n", "line 3 is damaged"), ("[1]\n", "line 3 is damaged"), ("{}\n", "line 3 is dam"),
                              ('{"event": "warning"}\n', r"line 3 \(warning\) lacks 'text'")]:
        (run / "events.jsonl").write_text("".join([*lines[:2], replaced, *lines[3:]]))
        with pytest.raises(RunError, match=message):
            write_report(run)
    (run / "events.jsonl").write_text(events)
    for text, message in [("a: [", "is not YAML"), ("just text", "has no search.target_acc"), ("search: 3", "has no search"),
                          ("kind: [x]", "is of kind")]:
        (run / "config.yaml").write_text(text)
        with pytest.raises(RunError, match=message):
            write_report(run)
    assert not (run / "report.html").exists()


def test_report_that_cannot_be_written(tmp_path):
    run = digits().write(tmp_path)
    (run / "report.html").mkdir()
    with pytest.raises(RunError, match="cannot be written"):
        write_report(run)
    assert not list(run.glob(".*.tmp"))


def test_wilson_interval_against_published_values():
    published = [(0, 10, 0.0, 27.75), (50, 100, 40.38, 59.62), (10, 10, 72.25, 100.0), (81, 263, 25.53, 36.62)]
    for correct, total, low, high in published:
        assert wilson(correct, total) == pytest.approx((low, high), abs=0.01)


def test_number_formats():
    assert [percent(value) for value in (97.5, 98.0, 98.67, 100.0)] == ["97.5 %", "98.0 %", "98.67 %", "100.0 %"]
    assert [milliseconds(value) for value in (123.4, 12.34, 1.234, 0.01234)] == ["123", "12.3", "1.23", "0.0123"]
    assert [listed(depths) for depths in ([2], [1, 3], [1, 2, 3], [1, 2, 5])] == [
        "depth 2", "depths 1 and 3", "depths 1–3", "depths 1, 2 and 5"]
    assert [reduction(value, 10_000) for value in (2500, 10_000, 12_000, 1)] == ["75.0 %", "0.0 %", "−20.0 %", "99.990 %"]
    assert compared(12, 10, "10 ms") == "20.0 % more than 10 ms at full depth"
    assert compared(2.5, 10, "10 ms") == "75.0 % (4.00×) less than 10 ms at full depth"


def test_a_parallel_search_says_what_it_cancelled(tmp_path):
    searched = {1: ("cap", [80.0, 88.0]), 3: ("cancelled", [70.0, 97.0]), 4: ("cancelled", []), 2: ("passed", [85.0, 98.3])}
    run = digits(searched=searched, search={"strategy": "parallel", "workers": 3})
    run.search.sort(key=lambda event: event.get("epoch", 9))  # epochs of the depths take turns
    folder = run.write(tmp_path)
    shown = page(folder)
    assert ("Up to 3 depths were trained at once (--strategy parallel): the answer is that of training them one after another."
            in shown.text)
    assert ("Cancelled, since a shallower depth had passed: depth 3 after 2 epochs, with 97.0 % as its best so far; depth 4 after "
            "0 epochs." in shown.text)
    assert shown.row("depth", "3")[1:3] == ["cancelled, 2 epochs", "–"] and shown.row("depth", "5")[1] == "not trained"
    assert shown.row("setting", "strategy")[1] == "parallel" and "Depths stand in their order" in shown.text
    assert "Not tried" not in shown.text
    curves = shown.raw.split("Learning curves</h2>")[1]
    assert [text for text in texts_of(curves) if text in ("1", "2", "3")][:3] == ["1", "2", "3"]  # one part each, from left to right


def test_time_spent_at_once_is_taken_off(tmp_path):
    run = digits(search={"strategy": "parallel", "workers": 2})
    run.after[-1]["seconds"] = 30.0
    shown = page(run.write(tmp_path))
    assert shown.row("phase", "done at the same time as others")[2] == "−6.0" and shown.row("phase", "all")[2] == "30.0"


def test_a_bisection_says_what_it_assumes(tmp_path):
    searched = {4: ("passed", [85.0, 98.3]), 2: ("cap", [80.0, 88.0]), 3: ("cap", [80.0, 90.0])}
    shown = page(digits(searched=searched, found=4, search={"strategy": "bisect"}).write(tmp_path))
    assert "finds the smallest depth that passes if accuracy grows with depth" in shown.text
    assert "Not tried: depth 1. A smaller network might do if accuracy does not grow with depth." in shown.text
    assert shown.row("setting", "strategy")[1] == "bisect"


def test_linear_is_not_spoken_of(digits_page):
    assert "strategy" not in digits_page.text.lower().replace("config.yaml", "")
