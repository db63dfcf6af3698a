"""How the report's page looks, and the sorting of its tables."""

STYLE = """
:root { --ink: #24292f; --soft: #5f6873; --line: #e2e5e9; --blue: #2f6db5; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 0 0 6px; }
p { margin: 4px 0 10px; max-width: 78ch; }
.soft, figcaption { color: var(--soft); font-size: 13.5px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 22px; margin-top: 18px; }
img { max-width: 100%; height: auto; display: block; }
.tiles { display: grid; grid-template-columns: repeat(6, 1fr); gap: 10px;
  margin: 6px 0 12px; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px; }
.tile b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
.tile.first { background: var(--blue); border-color: var(--blue); color: #fff; }
.tile span { font-size: 12.5px; opacity: .8; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: 14px; margin: 8px 0; }
th, td { padding: 4px 12px 4px 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; }
table.sort th { cursor: pointer; }
table.sort th:hover { color: var(--ink); text-decoration: underline; }
.scroll { max-height: 460px; overflow: auto; }
.bar { display: inline-block; height: 9px; border-radius: 2px; background: var(--blue);
  margin-right: 8px; vertical-align: middle; }
.note { background: #fff7e6; border: 1px solid #f0d9a8; border-radius: 8px;
  padding: 8px 14px; margin: 10px 0; }
.gallery { display: grid; gap: 18px;
  grid-template-columns: repeat(auto-fill, minmax(440px, 1fr)); }
.wide { grid-column: 1 / -1; }
figure { margin: 0; }
@media (max-width: 720px) { .tiles { grid-template-columns: repeat(3, 1fr); } }
"""

# Sorts a table by the clicked column, numbers by value; the second click reverses.
SCRIPT = """
document.querySelectorAll("table.sort th").forEach(th => th.onclick = () => {
  const body = th.closest("table").tBodies[0], n = th.cellIndex;
  const down = th.dataset.down = th.dataset.down === "1" ? "0" : "1";
  const value = row => row.cells[n].dataset.value ?? row.cells[n].textContent;
  const rows = [...body.rows].sort((a, b) => {
    const x = value(a), y = value(b), both = !isNaN(x) && !isNaN(y);
    const order = both ? x - y : String(x).localeCompare(String(y));
    return down === "1" ? -order : order;
  });
  body.append(...rows);
});
"""
