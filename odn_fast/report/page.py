"""The page of a report: template, tables and number formats. Whatever comes from a file is escaped here."""

import html
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from string import Template

_WARNINGS = 6  # shown without unfolding
_UNFOLDED = 30  # rows of a table
_TEMPLATE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d2433; --soft: #5a6475; --line: #dde2ea; --page: #f5f6f9; --card: #fff;
        --blue: #1f5fbf; --found: #e6eefb; --good: #2d7d46; --bad: #b3541e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ef; --soft: #a0a9b8; --line: #343b48; --page: #14171d; --card: #1d222b; --blue: #8ab4f8;
          --found: #22324d; --good: #6fc48a; --bad: #eda16a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 67rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
.run { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: .25rem 0 1.25rem; padding-left: .9rem; border-left: 5px solid var(--good);
     text-wrap: balance; }
.missed h1, .unfinished h1 { border-color: var(--bad); }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; }
.figure, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.figure { padding: .85rem 1rem; }
.figure h2 { font-size: .85rem; font-weight: 500; color: var(--soft); margin: 0; }
.figure p { margin: 0; font-size: .82rem; line-height: 1.4; color: var(--soft); }
.figure .value { font-size: 1.55rem; font-weight: 650; color: var(--ink); letter-spacing: -.01em; white-space: nowrap; }
.notes { margin: 1.25rem 0 0; padding-left: 1.2rem; font-size: .95rem; }
.notes li { margin: .25rem 0; overflow-wrap: anywhere; }
.warning { color: var(--bad); }
section { margin-top: 1.5rem; padding: 1.25rem; }
figure { margin: 0; }
.plot { background: #fff; border-radius: 6px; overflow-x: auto; }
.plot svg { display: block; width: 100%; min-width: 30rem; height: auto; margin: 0 auto; }
.plot svg * { stroke-linejoin: round; stroke-linecap: butt; }
.plot text { font-family: system-ui, sans-serif !important; }
.plot image { image-rendering: pixelated; }
figcaption, .caption { font-size: .85rem; color: var(--soft); margin: .4rem 0; }
.table { margin-top: 1.25rem; }
.scroll { overflow-x: auto; }
.pair { display: flex; flex-wrap: wrap; gap: 0 1.5rem; align-items: flex-start; }
.pair > figure { flex: 4 1 25rem; min-width: 0; } .pair > .table { flex: 3 1 21rem; min-width: 0; margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .38rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
         white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; white-space: normal; }
td.number, th.number { text-align: right; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 5.5rem; }
tr.found td { background: var(--found); font-weight: 600; }
tr.untrained td { color: var(--soft); }
pre { margin: .5rem 0 0; padding: .8rem 1rem; background: var(--page); border-radius: 6px; overflow-x: auto; font-size: .85rem; }
summary { cursor: pointer; }
section > details { margin-top: 1.25rem; } details .table { margin-top: .6rem; }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --line: #ccc; --page: #fff; --card: #fff; --found: #eee; }
  main { max-width: none; padding: 0; } body { font-size: 12px; } .plot svg { min-width: 0; }
  figure, tr, .figure { break-inside: avoid; }
}
</style>
</head>
<body class="$state">
<main>
<p class="run">$title</p>
<h1>$headline</h1>
$lead
<ul class="notes">$notes</ul>
$sections
</main>
</body>
</html>
""")


def page(title: str, state: str, headline: str, lead: str, notes: Iterable[str], warned: Iterable[str],
         sections: Iterable[tuple[str, str]]) -> str:
    """The whole document. `lead` and the bodies of `sections` are HTML; everything else is text and is escaped."""
    items = [f"<li>{_glued(note)}</li>" for note in notes]
    warnings = [f"<li class='warning'>Warning: {escaped(text)}</li>" for text in warned]
    items += warnings[:_WARNINGS]
    if len(warnings) > _WARNINGS:
        more = "".join(warnings[_WARNINGS:])
        items.append(f"<li class='warning'><details><summary>{len(warnings) - _WARNINGS} more warnings</summary>"
                     f"<ul class='notes'>{more}</ul></details></li>")
    return _TEMPLATE.substitute(
        title=escaped(title), state=state, headline=_glued(headline), lead=lead, notes="".join(items),
        sections="\n".join(f"<section><h2>{escaped(heading)}</h2>{body}</section>" for heading, body in sections))


def figures(cards: Iterable[tuple[str, str, str]]) -> str:
    """Large figures: title, value, explanation."""
    shown = [f"<div class='figure'><h2>{escaped(title)}</h2><p class='value'>{_glued(value)}</p><p>{_glued(words)}</p></div>"
             for title, value, words in cards]
    return f"<div class='figures'>{''.join(shown)}</div>"


def resume_lead(folder: str) -> str:
    """What stands in place of the large figures while a run is unfinished."""
    return f"<p>Go on with <code>python -m odn_fast.search --resume {escaped(folder)}</code>.</p>"


def plot(svg: str, caption: str) -> str:
    return f"<figure><div class='plot'>{svg}</div><figcaption>{_glued(caption)}</figcaption></figure>"


def pair(figure: str, beside: str) -> str:
    """A plot and a table beside each other where the screen is wide enough."""
    return f"<div class='pair'>{figure}{beside}</div>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str, kinds: str, marks: Sequence[str] = ()) -> str:
    """A table of texts.

    Args:
        kinds: one letter a column: w for words, l for long words that may be broken, n for numbers (set right).
        marks: one CSS class a row: found, untrained or nothing.
    """
    kinds = [{"w": "", "l": " class='long'", "n": " class='number'"}[kind] for kind in kinds]
    head = "".join(f"<th{kind}>{escaped(text)}</th>" for kind, text in zip(kinds, heads))
    lines = []
    for row, mark in zip(rows, marks or [""] * len(rows)):
        cells = "".join(f"<td{kind}>{escaped(text)}</td>" for kind, text in zip(kinds, row))
        lines.append(f"<tr class='{mark}'>{cells}</tr>" if mark else f"<tr>{cells}</tr>")
    return (f"<div class='table'><p class='caption'>{_glued(caption)}</p><div class='scroll'><table>"
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></div>")


def foldable(body: str, summary: str, rows: int) -> str:
    """A table that is folded away where it is long."""
    return f"<details{' open' if rows <= _UNFOLDED else ''}><summary>{escaped(summary)}</summary>{body}</details>"


def escaped(text: str) -> str:
    return html.escape(printable(text, keep="\n\t"))


def _glued(text: str) -> str:
    """Escaped text in which no line ends between a number and its unit, nor within a range of numbers."""
    return re.sub(r"(?<=\d)–(?=\d)", "–\u2060", re.sub(r"(?<=\d) (?=%|ms\b|MB\b)", "\u00a0", escaped(text)))


def printable(text: str, keep: str = "") -> str:
    """The text with control characters and lone surrogates, which no page can show, replaced."""
    return "".join("\ufffd" if unicodedata.category(letter) in ("Cc", "Cs") and letter not in keep else letter for letter in text)


def percent(value: float) -> str:
    """97.5 %, 98.67 %: one decimal, two where needed."""
    text = f"{value:.2f}"
    return f"{text[:-1] if text.endswith('0') else text} %"


def milliseconds(value: float) -> str:
    """Three figures or so: 120, 12.5, 1.25, 0.0125."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 4
    return f"{value:.{decimals}f}"


def millions(value: int) -> str:
    """126.6 M, 2.54 M, 0.99 M: FLOPs."""
    return f"{value / 1e6:,.{1 if value >= 1e7 else 2 if value >= 1e5 else 4}f} M"


def points(value: float) -> str:
    """A difference of accuracies: +0.33, −1.20, 0.00."""
    return f"{value:+.2f}".replace("-", "−") if round(value, 2) else "0.00"


def share(value: float, whole: float) -> str:
    return f"{100 * value / whole:.1f} %"


def counted(number: int, singular: str, plural: str = "") -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def listed(numbers: Sequence[int], what: str = "depth") -> str:
    """depth 2; depths 1 and 3; depths 1–32; depths 1, 2 and 5–9: of rising numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [text for run in runs for text in ([f"{run[0]}–{run[-1]}"] if len(run) > 2 else map(str, run))]
    return f"{what}{'' if len(numbers) == 1 else 's'} {', '.join(texts[:-1])}{' and ' if len(texts) > 1 else ''}{texts[-1]}"


def reduction(value: float, full: float) -> str:
    """How much less than full depth, '98.7 %', never rounded up to 100 %; negative where it is more."""
    less = 100 * (1 - value / full)
    return f"{less:.1f} %".replace("-", "−") if less < 99.95 else f"{math.floor(less * 1000) / 1000:.3f} %"


def compared(value: float, full: float, shown: str) -> str:
    """'98.7 % (74.8×) less than 11,172,810 at full depth', where `shown` is the full depth's value in words."""
    if value > full:
        return f"{-100 * (1 - value / full):.1f} % more than {shown} at full depth"
    factor = full / value
    decimals = 0 if factor >= 100 else 1 if factor >= 10 else 2
    return f"{reduction(value, full)} ({factor:,.{decimals}f}×) less than {shown} at full depth"
