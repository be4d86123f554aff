// What all figures share: colours of the theme, hover texts, legends, and drawing a figure when it comes into view.

const DARK = matchMedia("(prefers-color-scheme: dark)");
const narrow = () => innerWidth < 640;
// Okabe and Ito's colours, distinct with common colour blindness; in the dark the blue and the green are lighter.
const PALETTE = {
  light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a4c93", "#555555"],
  dark: ["#4da3ff", "#ff8a4c", "#34d399", "#f0a6ca", "#fbbf24", "#8bd3ff", "#b79cff", "#bbbbbb"],
};
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "star", "pentagon", "hexagon"];
const MOST_IN_LEGEND = 16;

const palette = () => PALETTE[DARK.matches ? "dark" : "light"];
const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// A configuration's look, the same in every figure and with any filter: colour, then hollow, then dashed.
function lookOf(cell) {
  const place = CONFIGURATIONS.indexOf(configuration(cell));
  const turn = Math.floor(place / palette().length);
  return {
    colour: palette()[place % palette().length],
    hollow: turn % 2 === 1,
    dash: ["solid", "dash", "dot", "dashdot"][Math.floor(turn / 2) % 4],
  };
}

function symbolOf(cell) {
  return SYMBOLS[MODELS.indexOf(cell.model) % SYMBOLS.length] + (lookOf(cell).hollow ? "-open" : "");
}

// What a mark says: the cell, its numbers, and the settings in which it differs.
function hover(cell, ...more) {
  const width = narrow() ? 34 : 64;
  const lines = [
    ...wrapped(configuration(cell), width),
    SEVERAL_MACHINES && cell.machine,
    outcomeText(cell),
    ...(message(cell) ? wrapped(message(cell), width) : []),
    ...more,
    ...Object.entries(cell.config)
      .slice(0, 12)
      .map(([key, value]) => cut(`${key}=${value}`, width)),
  ];
  return `<b>${plain(`${cell.model}, ${length(cell.tokens)}`)}</b><br>${lines.filter(Boolean).map(plain).join("<br>")}`;
}

const speeds = (cell) => [
  `${measured(cell.tokens_per_s, "tokens/s")}`,
  `host ${measured(cell.peak_host_gib, "GiB")}, GPU ${measured(cell.peak_vram_gib, "GiB")}`,
];

function layoutOf(more) {
  const line = { gridcolor: variable("--line"), zerolinecolor: variable("--line"), linecolor: variable("--line") };
  const axes = Object.fromEntries(
    Object.entries(more)
      .filter(([key]) => /^[xy]axis/.test(key))
      .map(([key, axis]) => [key, { automargin: true, ...line, ...axis }]),
  );
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: narrow() ? 11 : 12.5, color: variable("--text") },
    margin: { l: 48, r: 12, t: 12, b: 44 },
    height: 360,
    showlegend: false,
    hovermode: "closest",
    hoverlabel: {
      align: "left",
      bgcolor: variable("--raised"),
      bordercolor: variable("--muted"),
      font: { color: variable("--text"), size: 12 },
    },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: variable("--muted"), activecolor: variable("--accent") },
    // On a touch screen a drag scrolls the page; the buttons zoom.
    dragmode: narrow() ? false : "zoom",
    ...more,
    ...axes,
  };
}

function plot(target, traces, layout) {
  return Plotly.react(target, traces, layoutOf(layout), {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: { format: "svg", filename: "ldft" },
  });
}

// Values over more than a factor of 20 need a logarithmic axis, or the small ones lie on top of each other.
function scale(values) {
  const positive = values.filter((value) => value > 0);
  return Math.max(...positive) > 20 * Math.min(...positive)
    ? { type: "log", dtick: "D2" }
    : { type: "linear", rangemode: "tozero" };
}

// What colours and shapes mean; left to the hover where there are too many.
function legendOf(cells) {
  const of = (name, key) => [...new Map(cells.map((cell) => [name(cell), cell])).entries()].map(key);
  const configurations = of(configuration, ([name, cell]) => {
    const { colour, hollow } = lookOf(cell);
    return el(
      "li",
      {},
      el("i", { class: "swatch", style: `border-color:${colour};background:${hollow ? "transparent" : colour}` }),
      name,
    );
  });
  if (configurations.length < 2) return null;
  if (configurations.length > MOST_IN_LEGEND)
    return el("p", { class: "note" }, `${configurations.length} configurations: filter for a legend, or point at a mark.`);
  return el("ul", { class: "legend" }, ...configurations);
}

const LEGEND = { orientation: "h", x: 0, y: 1, yanchor: "bottom", traceorder: "normal" };

const marks = (cells, x, y, more) => ({
  x: cells.map(x),
  y: cells.map(y),
  customdata: cells.map((cell) => cell.id),
  hoverinfo: "text",
  ...more,
});

// How many of the cells that ran lack a number; such cells are nowhere in the figure.
function lacking(cells, kept, what) {
  const ran = cells.filter((cell) => cell.status === "ok").length;
  return ran > kept.length
    ? `${plural(ran - kept.length, "cell")} without ${what} ${ran - kept.length === 1 ? "is" : "are"} not drawn.`
    : "";
}

const DRAWN = new Map();

// Calls `draw(figure)` when the figure comes near the screen, and again after each change while it is there.
const nearScreen = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const known = DRAWN.get(target);
      known.near = isIntersecting;
      if (isIntersecting && known.stale) drawFigure(target);
    }
  },
  { rootMargin: "300px" },
);

function drawFigure(target) {
  const known = DRAWN.get(target);
  known.stale = false;
  known.draw();
}

function watch(target, draw) {
  DRAWN.set(target, { draw, stale: true, near: false });
  nearScreen.observe(target);
}

function redraw() {
  for (const [target, known] of DRAWN) {
    known.stale = true;
    if (known.near) drawFigure(target);
  }
}
