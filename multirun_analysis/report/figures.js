// The figures of the page, in their order, and a run's memory over time.

const FIGURES = [
  { id: "throughput", title: "Speed by sequence length", build: throughput, wide: true },
  { id: "vram", title: "Speed against GPU memory", build: memoryAgainstSpeed("peak_vram_gib", "GPU memory") },
  { id: "host", title: "Speed against host memory", build: memoryAgainstSpeed("peak_host_gib", "host memory") },
  {
    id: "memory",
    title: "Memory, predicted and measured",
    build: predictions("memory", "GiB", { host: "host memory", vram: "GPU memory" }),
  },
  {
    id: "times",
    title: "Time, predicted and measured",
    build: predictions("times", "s", { iteration: "iteration", forward: "forward", backward: "backward", step: "step" }),
  },
  { id: "nodes", title: "Memory by NUMA node", build: memoryByNode, wide: true },
];

function buildFigures(visible) {
  for (const { id, title, build, wide } of FIGURES) {
    const target = el("div", { class: "plot", role: "img", "aria-label": title });
    const below = el("figcaption");
    const figure = el("figure", { id: `figure-${id}`, class: wide ? "wide" : null }, el("h3", {}, title), target, below);
    document.querySelector(".figures").append(figure);
    watch(figure, () => {
      const found = build(visible());
      figure.classList.toggle("nothing", typeof found === "string");
      if (typeof found === "string") {
        Plotly.purge(target);
        target.replaceChildren();
        below.replaceChildren(found);
        return;
      }
      const drawn = plot(target, found.traces, found.layout);
      below.replaceChildren(...[found.legend && legendOf(found.legend), found.note.filter(Boolean).join(" ")].filter(Boolean));
      if (!target.dataset.opens) {
        target.dataset.opens = "yes";
        drawn.then(() => target.on("plotly_click", ({ points }) => openDetails(cellOfRun(points[0].customdata))));
      }
    });
  }
}

// A run's memory over time, in its details.
function drawTrace(cell, target) {
  if (!target) return;
  const { seconds, nodes, vram } = cell.trace;
  const traces = nodes.map(([name, gib], index) => {
    const colour = DATA.node_colours[index % DATA.node_colours.length];
    return {
      x: seconds,
      y: gib,
      name: plain(name),
      stackgroup: "nodes",
      mode: "lines",
      line: { color: colour, width: 1 },
      hovertemplate: "%{y:.3g} GiB at %{x:.0f} s",
    };
  });
  if (vram)
    traces.push({
      x: vram[0],
      y: vram[1],
      name: "GPU",
      mode: "lines",
      line: { color: palette()[1], width: 2, dash: "dot" },
      hovertemplate: "%{y:.3g} GiB at %{x:.0f} s",
    });
  plot(target, traces, {
    height: 260,
    showlegend: true,
    legend: LEGEND,
    margin: { l: 48, r: 12, t: 36, b: 44 },
    xaxis: { title: { text: "seconds since the start" } },
    yaxis: { title: { text: "GiB" }, rangemode: "tozero" },
  });
}
