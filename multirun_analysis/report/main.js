// Puts the page together, and brings every part in line with the view after each change.

let visible = CELLS;

function about() {
  const failed = CELLS.filter((cell) => cell.status !== "ok").length;
  const machines = [...new Set(CELLS.map((cell) => cell.machine))];
  const when = DATA.from === DATA.to ? `on ${DATA.from}` : `from ${DATA.from} to ${DATA.to}`;
  const parts = [
    `${plural(DATA.rows, "row")} make ${plural(CELLS.length, "cell")}: ${CELLS.length - failed} ok, ${failed} failed.`,
    `Run ${when} on ${machines.length > 3 ? plural(machines.length, "machine") : machines.join(", ")}`,
    `with ldft at commit ${DATA.commits.join(", ")}.`,
  ];
  document.getElementById("about").textContent = parts.join(" ");
}

const setFilters = buildFilters(changed);
const setTable = buildTable(changed);
buildFigures(() => visible);

function show() {
  visible = CELLS.filter((cell) => matches(cell));
  setFilters(visible);
  document.getElementById("none").hidden = visible.length > 0;
  for (const section of document.querySelectorAll("main > section")) section.hidden = visible.length === 0;
  drawBest(visible);
  drawGrid(visible);
  setTable(visible);
  redraw();
}

function changed() {
  writeFragment();
  show();
}

// Also when another link to this page is opened in its tab.
function fromAddress() {
  readFragment();
  show();
  const cell = view.cell && cellOfRun(view.cell);
  if (cell) openDetails(cell);
  else if (dialog.open) dialog.close();
}

about();
addEventListener("hashchange", fromAddress);
DARK.addEventListener("change", redraw);
document.getElementById("skip").addEventListener("click", (event) => {
  // The fragment holds the view, so the link itself must not change it.
  event.preventDefault();
  document.getElementById("cells").scrollIntoView();
  document.getElementById("cells").focus();
});
let width = innerWidth;
addEventListener("resize", () => {
  if (width < 640 !== narrow()) redraw();
  width = innerWidth;
});
fromAddress();
