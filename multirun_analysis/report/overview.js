// The answers at the top: the fastest configuration of each model and length, and the outcome of every cell.

function groupsOf(cells, key) {
  const groups = new Map();
  for (const cell of cells) {
    const name = key(cell);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(cell);
  }
  return [...groups.values()];
}

const opener = (cell, text, attributes = {}) =>
  el("button", { type: "button", class: "link", "data-cell": cell.id, click: () => openDetails(cell), ...attributes }, text);

function td(label, content, attributes = {}) {
  return el("td", { "data-label": label, ...attributes }, content);
}

function drawBest(cells) {
  const withGpu = CELLS.some((cell) => cell.peak_vram_gib != null);
  const groups = groupsOf(cells, (cell) => JSON.stringify([cell.model, cell.tokens, cell.machine]));
  groups.sort((a, b) => byText(a[0].model, b[0].model) || a[0].tokens - b[0].tokens || byText(a[0].machine, b[0].machine));
  const heads = [
    "Model",
    "Length",
    "Fastest configuration",
    "tokens/s",
    "Host GiB",
    withGpu && "GPU GiB",
    "Ran",
    SEVERAL_MACHINES && "Machine",
  ];
  const lines = groups.map((group) => {
    const ok = group.filter((cell) => cell.status === "ok");
    const best = ok.filter((cell) => cell.tokens_per_s != null).sort((a, b) => b.tokens_per_s - a.tokens_per_s)[0];
    const reasons = [...new Set(group.map(outcomeText))].join(", ");
    return el(
      "tr",
      { class: best ? null : "failed" },
      td("Model", group[0].model),
      td("Length", length(group[0].tokens), { class: "number" }),
      td(
        "Fastest",
        best ? opener(best, configuration(best)) : opener(group[0], ok.length ? "speed not measured" : `none: ${reasons}`),
      ),
      td("tokens/s", number(best && best.tokens_per_s), { class: "number" }),
      td("Host GiB", number(best && best.peak_host_gib), { class: "number" }),
      withGpu && td("GPU GiB", number(best && best.peak_vram_gib), { class: "number" }),
      td("Ran", `${ok.length} of ${group.length}`, { class: "number" }),
      SEVERAL_MACHINES && td("Machine", group[0].machine),
    );
  });
  const numeric = ["Length", "tokens/s", "Host GiB", "GPU GiB", "Ran"];
  const head = heads
    .filter(Boolean)
    .map((name) => el("th", { scope: "col", class: numeric.includes(name) ? "number" : null }, name));
  document.querySelector("#best table").replaceChildren(el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...lines));
}

function drawGrid(cells) {
  const lengths = [...new Set(cells.map((cell) => cell.tokens))].sort((a, b) => a - b);
  const groups = groupsOf(cells, (cell) => JSON.stringify([cell.model, configuration(cell), cell.machine]));
  const head = [
    el("th", { scope: "col" }, "Model, configuration"),
    ...lengths.map((tokens) => el("th", { scope: "col" }, length(tokens))),
  ];
  const lines = groups.map((group) => {
    const first = group[0];
    const name = [configuration(first), SEVERAL_MACHINES && first.machine].filter(Boolean).join(" · ");
    const title = el("th", { scope: "row" }, el("b", {}, first.model), " ", name);
    return el(
      "tr",
      {},
      title,
      ...lengths.map((tokens) => el("td", {}, ...group.filter((cell) => cell.tokens === tokens).map(mark))),
    );
  });
  const table = el("table", { class: "grid" }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...lines));
  document.querySelector("#grid .scroll").replaceChildren(table);
}

// One cell of the grid: its speed or its outcome, in colour and in words.
function mark(cell) {
  const key = outcomeOf(cell);
  const short = cell.status === "ok" && cell.tokens_per_s != null ? number(cell.tokens_per_s) : outcome(key).short;
  const said = [cell.model, length(cell.tokens), configuration(cell), outcomeText(cell), message(cell)]
    .filter(Boolean)
    .join(", ");
  return opener(cell, short + (cell.status === "ok" && cell.failure ? " *" : ""), {
    class: `mark ${cell.status === "ok" ? "ok" : "failed"} ${key}`,
    title: said,
    "aria-label": said,
  });
}
