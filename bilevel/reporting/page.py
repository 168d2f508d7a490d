"""The page itself: one file with all that it needs in it, for phones and desks, light and dark."""

from __future__ import annotations

import html
import json
import os
from typing import Any

from bilevel.errors import BilevelError
from bilevel.files import check_folder, replace_text
from bilevel.reporting.figures import Plot, plots
from bilevel.reporting.runs import Seen, seen
from bilevel.reporting.style import SCRIPT, STYLE
from bilevel.reporting.words import in_short, warnings
from bilevel.solution import Solution

ROWS = 500  # of the table of steps; above that every so many


def report(run: Solution | str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write a run as one page of HTML that needs no network; needs plotly.

    Args:
        run: a `Solution`, or the path of what `Solution.save`, `callbacks.JSONLines` (of a run that goes on too) or
            `solve(checkpoint=)` wrote.
        path: the page, such as "report.html"; a file that is there is replaced.

    Raises:
        BilevelError: it is no run, the page cannot lie there, or plotly is not installed.
    """
    check_folder(path, "path")
    replace_text(page(seen(run)), path)


def page(run: Seen) -> str:
    """Return the text of the page."""
    drawn = plots(run)
    data = {plot.name: {"traces": plot.traces, "layout": plot.layout} for plot in drawn}
    title = str(run.context.get("script") or os.path.basename(run.name))
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f'<link rel="icon" href="data:,"><title>{html.escape(title)}: bilevel report</title>',
            f"<style>{STYLE}</style></head><body><main>",
            f"<header><p>bilevel report</p><h1>{html.escape(title)}</h1></header>",
            _words(run),
            '<section class="plots">',
            *map(_figure, drawn),
            "</section>",
            _table(run),
            _environment(run),
            _code(run),
            "</main>",
            f'<script type="application/json" id="data">{_safe(json.dumps(_finite(data)))}</script>',
            f"<script>{_plotly()}</script>",
            f"<script>{SCRIPT}</script></body></html>",
        ]
    )


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise BilevelError(
            'a report needs plotly, which is not installed; write: pip install "bilevel[report]"'
        ) from error
    return str(get_plotlyjs())


def _words(run: Seen) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in in_short(run))
    boxes = "".join(f'<p class="warning"><strong>Warning.</strong> {html.escape(line)}</p>' for line in warnings(run))
    notes = [] if run.certificate is None else [*run.certificate.notes]
    more = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    said = f"<details><summary>What the last certificate notes</summary><ul>{more}</ul></details>" if more else ""
    return f'<section><h2>In short</h2><ul class="short">{items}</ul>{boxes}{said}</section>'


def _figure(plot: Plot) -> str:
    name, caption = html.escape(plot.name, quote=True), html.escape(plot.caption, quote=True)
    return (
        f'<figure><h2>{html.escape(plot.title)}</h2><div class="plot" role="img" aria-label="{caption}" '
        f'data-plot="{name}"></div><figcaption>{caption}</figcaption></figure>'
    )


def _table(run: Seen) -> str:
    columns = (
        ("step", "step"), ("validation", "outer_loss"), ("training", "inner_loss"), ("test", "test_loss"),
        ("hypergradient", "hypergradient_norm"), ("error", "error"), ("verdict", "verdict"), ("gradients", "gradients"),
        ("products", "products"), ("seconds", "seconds"),
    )  # fmt: skip
    every = -(-len(run.records) // ROWS)
    shown = [record for i, record in enumerate(run.records) if i % every == 0 or i == len(run.records) - 1]
    head = "".join(f"<th>{label}</th>" for label, _ in columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{_cell(record[figure])}</td>' for _, figure in columns)}</tr>" for record in shown
    )
    part = f", every {every}th of them" if every > 1 else ""
    return (
        f"<section><details><summary>All numbers, step by step{part}</summary><div class='scroll'><table><thead>"
        f"<tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details></section>"
    )


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))


def _environment(run: Seen) -> str:
    context = run.context
    samples = {f"{name} examples": count for name, count in context.get("samples", {}).items() if count}
    kinds = context.get("hyperparameters", {})
    sizes = run.records[0].sizes
    shown = {f"hyperparameter {name}": f"{kind} x {sizes.get(name, 0):,}" for name, kind in list(kinds.items())[:20]}
    machine = {key: context[key] for key in ("started", "system", "device", "dtype", "threads") if key in context}
    rows = {"problem": context.get("problem"), **shown, **samples, **machine, **context.get("versions", {})}
    items = "".join(
        f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in rows.items() if v is not None
    )
    known = items or "<dt>unknown</dt><dd>a checkpoint, or a file of an earlier version, does not say</dd>"
    return f"<section><h2>Environment</h2><dl>{known}</dl></section>"


def _code(run: Seen) -> str:
    if "command" in run.context:
        return f"<section><h2>To reproduce</h2><pre><code>{html.escape(run.context['command'])}</code></pre></section>"
    if "call" not in run.context:
        return ""
    versions, script = run.context.get("versions", {}), run.context.get("script")
    install = " ".join(f'"{name}=={versions[name]}"' for name in ("torch", "numpy", "scipy") if name in versions)
    where = f"# problem: as in {script}" if script else "# problem: as you made it"
    lines = [
        f"# Python {versions.get('python', '')}, bilevel {versions.get('bilevel', '')}",
        f"# pip install {install}",
        f"# torch.set_num_threads({run.context.get('threads')})  # sums in another order round otherwise",
        "import bilevel",
        "",
        f"{where}, {run.context.get('problem')}",
        f"solution = {run.context['call']}",
    ]
    note = (
        "" if "seed=" in run.context["call"] else "<p>No <code>seed=</code> was given: random numbers may differ.</p>"
    )
    return f"<section><h2>To reproduce</h2><pre><code>{html.escape(chr(10).join(lines))}</code></pre>{note}</section>"


def _safe(text: str) -> str:
    """Return JSON that may stand inside of a script element."""
    return text.replace("<", "\\u003c")


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and (data != data or abs(data) == float("inf")) else data
