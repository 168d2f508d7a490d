"""The style and the script of the page. Colours are Okabe and Ito's, told apart by colour-blind readers."""

STYLE = """
:root { --back: #ffffff; --text: #1b1f24; --soft: #57606a; --box: #f3f5f7; --rule: #d5dae0; --grid: #e3e7eb;
  --warn-back: #fff3e0; --warn-edge: #b45309;
  --c1: #0072b2; --c2: #57606a; --c3: #b34700; --c4: #8a2f7c; --c5: #00795c;
  --faint: rgba(0,114,178,.15); --strong: rgba(0,114,178,.32); }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --text: #e9edf1; --soft: #a9b3bd; --box: #1f2429;
  --rule: #3a424a; --grid: #30373e; --warn-back: #3a2a10; --warn-edge: #f0b45a;
  --c1: #56b4e9; --c2: #b6bfc8; --c3: #f0a45d; --c4: #e79ad0; --c5: #4fd0a8;
  --faint: rgba(86,180,233,.18); --strong: rgba(86,180,233,.38); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 16px; }
header p { margin: 0; color: var(--soft); }
h1 { margin: 0 0 8px; font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 1.1rem; overflow-wrap: anywhere; }
section { margin: 0 0 24px; }
.short { padding-left: 1.2em; margin: 0; }
.short li { overflow-wrap: anywhere; }
.warning { background: var(--warn-back); border-left: 5px solid var(--warn-edge); padding: 10px 14px; margin: 12px 0; }
.plots { display: grid; grid-template-columns: minmax(0, 1fr); gap: 24px; }
@media (min-width: 900px) { .plots { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
figure { margin: 0; min-width: 0; border-top: 1px solid var(--rule); padding-top: 12px; }
figcaption { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.plot { width: 100%; }
summary { cursor: pointer; padding: 6px 0; }
summary:focus-visible { outline: 3px solid var(--c1); }
.scroll, pre { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: 3px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
dl { display: grid; grid-template-columns: minmax(0, auto) minmax(0, 1fr); gap: 2px 16px; margin: 0; }
@media (max-width: 600px) { dl { grid-template-columns: minmax(0, 1fr); } dd { padding-left: 1em; } }
dt { color: var(--soft); overflow-wrap: anywhere; } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--box); padding: 12px; border-radius: 6px; font-size: .9rem; }
"""

SCRIPT = """
const plots = JSON.parse(document.getElementById("data").textContent);
const names = new Set(["c1", "c2", "c3", "c4", "c5", "faint", "strong"]);
function colored(x, css) {
  if (Array.isArray(x)) return x.map(y => colored(y, css));
  if (x && typeof x === "object") return Object.fromEntries(Object.entries(x).map(([k, y]) =>
    [k, /color$/.test(k) ? colored(y, css) : (typeof y === "string" || typeof y === "number" ? y : colored(y, css))]));
  return names.has(x) ? css.getPropertyValue("--" + x).trim() : x;
}
function draw() {
  const css = getComputedStyle(document.documentElement), get = name => css.getPropertyValue(name).trim();
  for (const place of document.querySelectorAll("[data-plot]")) {
    const { traces, layout } = plots[place.dataset.plot];
    const axis = { gridcolor: get("--grid"), linecolor: get("--rule"), zerolinecolor: get("--rule"), automargin: true };
    const whole = { height: 320, showlegend: true, margin: { l: 48, r: 12, t: 12, b: 40 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: get("--text"), family: "system-ui, sans-serif", size: 13 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" }, hovermode: "closest", ...colored(layout, css) };
    for (const key of ["xaxis", "yaxis", "yaxis2"]) if (key !== "yaxis2" || whole[key])
      whole[key] = { ...axis, ...whole[key] };
    Plotly.react(place, colored(traces, css), whole, { responsive: true, displaylogo: false, displayModeBar: false });
  }
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
"""
