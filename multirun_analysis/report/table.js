// The table of all cells, which sorts by each column; on a narrow screen each line is a card.

const text = (of) => ({ of, compare: byText });
const amount = (of) => ({ of, compare: (a, b) => a - b, numeric: true });

const COLUMNS = [
  { key: "model", title: "Model", ...text((cell) => cell.model) },
  { key: "tokens", title: "Length", ...amount((cell) => cell.tokens), show: (cell) => length(cell.tokens) },
  { key: "configuration", title: "Configuration", ...text(configuration), show: (cell) => opener(cell, configuration(cell)) },
  { key: "outcome", title: "Outcome", ...text(outcomeText), show: outcomeContent },
  { key: "tokens_per_s", title: "tokens/s", ...amount((cell) => cell.tokens_per_s) },
  { key: "iteration_s", title: "s/iteration", ...amount((cell) => cell.iteration_s) },
  { key: "peak_host_gib", title: "Host GiB", ...amount((cell) => cell.peak_host_gib) },
  { key: "peak_vram_gib", title: "GPU GiB", ...amount((cell) => cell.peak_vram_gib), optional: true },
  { key: "mfu", title: "MFU", ...amount((cell) => cell.mfu), show: (cell) => percent(cell.mfu), optional: true },
  {
    key: "gpu_hours",
    title: "GPU h/1e9",
    ...amount((cell) => cell.gpu_hours_per_billion_tokens),
    optional: true,
  },
  { key: "cost", title: "Cost/1e9", ...amount(cost), wanted: HAS_GPUS },
  { key: "runs", title: "Runs", ...amount((cell) => cell.runs.length) },
  { key: "machine", title: "Machine", ...text((cell) => cell.machine), wanted: SEVERAL_MACHINES },
].filter((column) => column.wanted !== false && (!column.optional || CELLS.some((cell) => column.of(cell) != null)));

function outcomeContent(cell) {
  const badge = el("span", { class: `badge ${cell.status === "ok" ? "ok" : "failed"}` }, outcomeText(cell));
  return el("div", {}, badge, message(cell) && el("span", { class: "message" }, cut(message(cell), 160)));
}

const LINES = new Map();

function lineOf(cell) {
  if (!LINES.has(cell)) {
    const open = (event) => {
      if (!event.target.closest("button") && !String(getSelection())) openDetails(cell);
    };
    const cells = COLUMNS.map((column) =>
      td(column.title, column.show ? column.show(cell) : column.numeric ? number(column.of(cell)) : column.of(cell), {
        class: column.numeric ? `number ${column.key}` : column.key,
      }),
    );
    LINES.set(cell, el("tr", { "data-id": cell.id, class: cell.status === "ok" ? null : "failed", click: open }, ...cells));
  }
  return LINES.get(cell);
}

// The cells in the order of view.sort, `-tokens_per_s` for the largest first. What was not measured comes last either way.
function sorted(cells) {
  const down = view.sort.startsWith("-");
  const column = COLUMNS.find((one) => one.key === view.sort.replace(/^-/, ""));
  if (!column) return cells;
  const known = cells.filter((cell) => column.of(cell) != null);
  const unknown = cells.filter((cell) => column.of(cell) == null);
  known.sort((a, b) => (down ? -1 : 1) * column.compare(column.of(a), column.of(b)));
  return [...known, ...unknown];
}

function buildTable(changed) {
  const section = document.getElementById("cells");
  const body = el("tbody");
  const sortBy = (value) => {
    view.sort = value;
    changed();
  };
  // The first click on numbers shows the largest first, which is what one looks for.
  const next = ({ key, numeric }) =>
    view.sort === (numeric ? `-${key}` : key) ? (numeric ? key : `-${key}`) : numeric ? `-${key}` : key;
  const heads = COLUMNS.map((column) => {
    const button = el("button", { type: "button", click: () => sortBy(next(column)) }, column.title);
    const name = column.numeric ? `number ${column.key}` : null;
    return el("th", { scope: "col", class: name, "data-sort": column.key }, button);
  });
  const select = section.querySelector("select");
  select.append(el("option", { value: "" }, "model and length"));
  for (const { key, title, numeric } of COLUMNS) {
    select.append(el("option", { value: key }, numeric ? `${title}, smallest first` : title));
    select.append(el("option", { value: `-${key}` }, numeric ? `${title}, largest first` : `${title}, from the end`));
  }
  select.addEventListener("change", () => sortBy(select.value));
  const price = section.querySelector(".price input");
  price.parentElement.hidden = !HAS_GPUS;
  price.addEventListener("input", () => {
    view.price = priceOf(price.value);
    changed();
  });
  const table = section.querySelector("table");
  let shownPrice = null;
  table.append(el("thead", {}, el("tr", {}, ...heads)), body);

  return (visible) => {
    if (view.price !== shownPrice) LINES.clear(); // each line holds its cost
    shownPrice = view.price;
    table.classList.toggle("priced", view.price != null);
    if (priceOf(price.value) !== view.price) price.value = view.price ?? "";
    body.replaceChildren(...sorted(visible).map(lineOf));
    select.value = view.sort;
    for (const head of heads) {
      const direction = { [head.dataset.sort]: "ascending", [`-${head.dataset.sort}`]: "descending" }[view.sort];
      if (direction) head.setAttribute("aria-sort", direction);
      else head.removeAttribute("aria-sort");
    }
  };
}
