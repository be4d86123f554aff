// The cells, and the view that the reader chose: filters, search, order and the open cell, all in the address's fragment.

const DATA = JSON.parse(document.getElementById("data").textContent);
const byText = (a, b) => a.localeCompare(b, "en", { numeric: true });
const byOrderOf = (names) => (a, b) => names.indexOf(a) - names.indexOf(b);

// In the order of the page where the reader chose no other: 2 before 10, also within names.
const ORDER = [
  (cell) => cell.model,
  (cell) => String(cell.tokens),
  (cell) => cell.policy,
  (cell) => cell.variant,
  (cell) => cell.machine,
];
const CELLS = DATA.cells.sort((a, b) => ORDER.reduce((found, of) => found || byText(of(a), of(b)), 0));

const several = (of) => new Set(CELLS.map(of)).size > 1;
const SEVERAL_MACHINES = several((cell) => cell.machine);
const SEVERAL_POLICIES = several((cell) => cell.policy);

// The configuration as it reads in tables and figures, written as on a command line: what differs among the cells, beside model
// and length.
function configuration(cell) {
  const policy = `numa=${cell.policy}`;
  return [SEVERAL_POLICIES && policy, cell.variant].filter(Boolean).join(" ") || policy;
}

const CONFIGURATIONS = [...new Set(CELLS.map(configuration))];
const MODELS = [...new Set(CELLS.map((cell) => cell.model))];

// What can be filtered, in the order on the page. `of` gives a cell's value, null where the cell has none.
const FILTERS = [
  { key: "model", title: "Model", of: (cell) => cell.model },
  { key: "length", title: "Length", of: (cell) => String(cell.tokens), name: (value) => length(Number(value)) },
  {
    key: "status",
    title: "Outcome",
    of: outcomeOf,
    name: (value) => outcome(value).name,
    order: byOrderOf(Object.keys(OUTCOMES)),
  },
  { key: "numa", title: "NUMA policy", of: (cell) => cell.policy },
  ...[...new Set(CELLS.flatMap((cell) => Object.keys(cell.options)))].map((key) => ({
    key,
    title: key,
    of: (cell) => cell.options[key] ?? null,
    name: (value) => value.replace(/^[\w.]+=(?=[^=]*$)/, ""),
  })),
  { key: "on", title: "Machine", of: (cell) => cell.machine },
]
  .map((filter) => ({ name: (value) => value, ...filter }))
  .map((filter) => ({
    ...filter,
    values: [...new Set(CELLS.map(filter.of))].filter((value) => value != null).sort(filter.order || byText),
  }))
  .filter((filter) => filter.values.length > 1);

// price: of one GPU for one hour, in the reader's currency; null where none is known.
const view = { chosen: new Map(), search: "", sort: "", cell: "", price: null };

const HAS_GPUS = CELLS.some((cell) => cell.gpu_hours_per_billion_tokens != null);
const cost = (cell) =>
  view.price == null || cell.gpu_hours_per_billion_tokens == null ? null : view.price * cell.gpu_hours_per_billion_tokens;

// A price as it is typed or as it stands in an address; null for none.
function priceOf(text) {
  const value = Number(text);
  return text && Number.isFinite(value) && value > 0 ? value : null;
}

const SEARCHED = new Map(
  CELLS.map((cell) => {
    const runs = cell.runs.flatMap((run) => [run.run_id, run.message]);
    const words = [
      cell.machine,
      cell.model,
      length(cell.tokens),
      cell.tokens,
      cell.policy,
      cell.variant,
      outcomeText(cell),
      ...runs,
    ];
    return [cell, words.join(" ").toLowerCase()];
  }),
);

// Whether a cell passes every filter but `except`.
function matches(cell, except) {
  for (const filter of FILTERS) {
    const chosen = view.chosen.get(filter.key);
    if (filter.key !== except && chosen && !chosen.has(filter.of(cell))) return false;
  }
  return view.search
    .toLowerCase()
    .split(/\s+/)
    .every((word) => SEARCHED.get(cell).includes(word));
}

const cellOfRun = (id) => CELLS.find((cell) => cell.runs.some((run) => run.run_id === id));

// The view of an address. What this report does not have, as in a link to an older one, is left out.
function readFragment() {
  const given = new URLSearchParams(location.hash.slice(1));
  view.chosen = new Map();
  for (const filter of FILTERS) {
    const values = given.getAll(filter.key).filter((value) => filter.values.includes(value));
    if (values.length) view.chosen.set(filter.key, new Set(values));
  }
  view.search = given.get("q") || "";
  view.sort = given.get("sort") || "";
  view.cell = given.get("cell") || "";
  view.price = given.has("price") ? priceOf(given.get("price")) : DATA.price;
}

function writeFragment() {
  const parts = new URLSearchParams();
  for (const [key, values] of view.chosen) for (const value of values) parts.append(key, value);
  if (view.search) parts.set("q", view.search);
  if (view.sort) parts.set("sort", view.sort);
  if (view.cell) parts.set("cell", view.cell);
  if (view.price !== DATA.price) parts.set("price", view.price ?? "");
  history.replaceState(null, "", `#${parts}`);
}

function choose(key, value, on) {
  const chosen = view.chosen.get(key) || new Set();
  if (on) chosen.add(value);
  else chosen.delete(value);
  if (chosen.size) view.chosen.set(key, chosen);
  else view.chosen.delete(key);
}
