"""The style sheet of a report: one column, light and dark, wide and narrow."""

CSS = """
:root {
  color-scheme: light dark;
  --ink: #1b1b1f; --ground: #ffffff; --muted: #6a6a75; --grid: #dcdce2; --card: #f5f5f8; --accent: #00734f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e9e9ee; --ground: #17171b; --muted: #a2a2ae; --grid: #3a3a43; --card: #212127; --accent: #35c596;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 70rem; padding: 1.5rem 1.25rem 4rem;
  background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: break-word;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p, li, figcaption { max-width: 46rem; }
.sub { color: var(--muted); margin: 0 0 1.25rem; }
.finding { background: var(--card); border-left: 4px solid var(--accent);
  padding: .9rem 1.1rem; border-radius: 4px; max-width: 56rem; }
.finding p { margin: .3rem 0; max-width: none; }
.finding p:first-child { font-size: 1.15rem; font-weight: 600; }
.warn { border-left-color: #d55e00; margin-top: .75rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; vertical-align: baseline; }
th { font-weight: 500; }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--muted); border-bottom: 1px solid var(--muted); vertical-align: bottom; }
tbody tr { border-bottom: 1px solid var(--grid); }
tr.group th { text-align: left; font-weight: 650; padding-top: .9rem; }
td.best { font-weight: 700; }
.paper, .pm { color: var(--muted); font-weight: 400; }
.ci { display: block; color: var(--muted); font-size: .82em; font-weight: 400; }
.ci span { white-space: nowrap; }
.wide { overflow-x: auto; }
figure + .wide { margin-top: .75rem; }
.note { color: var(--muted); font-size: .92rem; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; margin: .75rem 0; }
figcaption { font-size: .95rem; }
.narrow { display: none; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .2rem 1.2rem;
  margin: 0; font-size: .92rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--card); padding: .7rem .9rem; border-radius: 4px; white-space: pre-wrap;
  font-size: .88rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
details { margin-top: 2.5rem; }
summary { cursor: pointer; font-size: 1.2rem; font-weight: 650; }
details table:not(.numbers) :is(td, th) {
  text-align: left; padding: .15rem .8rem .15rem 0; font-size: .85rem; }
figure + details { margin-top: .75rem; }
figure + details summary { font-size: 1rem; }
@media (max-width: 700px) {
  body { padding: 1rem 1rem 3rem; }
  h1 { font-size: 1.35rem; }
  .only-wide { display: none; }
  .narrow { display: block; }
  .pm { display: block; font-size: .9em; }
  table { font-size: .82rem; }
  th, td { padding: .3rem .22rem; }
  .spare { display: none; }
  dl { grid-template-columns: 8.5rem 1fr; gap: .2rem .8rem; }
}
@media print { .only-wide { display: block; } .narrow { display: none; } details { display: block; } }
"""
