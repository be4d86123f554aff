// Figures of memory by NUMA node, and of predictions beside measurements; as in speed.js.

const MOST_BARS = 30;

function memoryByNode(cells) {
  const all = cells.filter((cell) => cell.nodes.length);
  if (!all.length) return "No cell has its memory by NUMA node.";
  const kept = all.slice(0, MOST_BARS);
  const names = [...new Set(kept.flatMap((cell) => cell.nodes.map(([name]) => name)))].sort(byText);
  // Without the names of keys, so that the values are readable beside the bar.
  const values = (cell) => configuration(cell).replace(/(^| )[\w.]+=/g, "$1");
  const label = (cell) => [MODELS.length > 1 && cell.model, length(cell.tokens), values(cell)].filter(Boolean).join(" ");
  const traces = names.map((name, index) => {
    const gib = (cell) => (cell.nodes.find(([node]) => node === name) || [name, 0])[1];
    return {
      ...marks(kept, gib, (_) => 0, { hovertext: kept.map((cell) => hover(cell, `${name}: ${number(gib(cell))} GiB`)) }),
      y: kept.map((_, place) => place),
      type: "bar",
      orientation: "h",
      name: plain(name),
      textposition: "none",
      marker: { color: DATA.node_colours[index % DATA.node_colours.length] },
    };
  });
  const layout = {
    barmode: "stack",
    height: 110 + 22 * kept.length,
    bargap: 0.25,
    showlegend: true,
    legend: LEGEND,
    margin: { l: 48, r: 12, t: 40, b: 44 },
    xaxis: { title: { text: "resident memory after the last iteration, GiB" } },
    yaxis: {
      autorange: "reversed",
      tickvals: kept.map((_, place) => place),
      ticktext: kept.map((cell) => plain(cut(label(cell), narrow() ? 20 : 60))),
    },
  };
  const others = all.length > kept.length ? `The first ${kept.length} of ${all.length} cells; filter for others.` : "";
  return { traces, layout, note: [others, lacking(cells, all, "this")] };
}

function predictions(entries, unit, names) {
  return (cells) => {
    const points = cells.flatMap((cell) =>
      cell[entries].map(([quantity, predicted, got]) => ({ cell, quantity, predicted, got })),
    );
    const drawn = points.filter(({ predicted, got }) => predicted > 0 && got > 0);
    if (!drawn.length) return "No cell has both a prediction and a measurement.";
    const values = drawn.flatMap(({ predicted, got }) => [predicted, got]);
    const ends = [Math.min(...values) / 1.2, Math.max(...values) * 1.2];
    const traces = Object.entries(names).flatMap(([quantity, name], index) => {
      const of = drawn.filter((point) => point.quantity === quantity);
      if (!of.length) return [];
      const says = ({ cell, predicted, got }) =>
        hover(
          cell,
          `${name}: predicted ${number(predicted)}, measured ${number(got)} ${unit}`,
          `ratio ${(predicted / got).toFixed(2)}`,
        );
      return {
        x: of.map((point) => point.got),
        y: of.map((point) => point.predicted),
        customdata: of.map((point) => point.cell.id),
        hoverinfo: "text",
        hovertext: of.map(says),
        mode: "markers",
        name,
        marker: { color: palette()[index], symbol: SYMBOLS[index], size: 9 },
      };
    });
    const line = {
      type: "line",
      x0: ends[0],
      y0: ends[0],
      x1: ends[1],
      y1: ends[1],
      layer: "below",
      line: { color: variable("--muted"), dash: "dot" },
    };
    const axis = (title) => ({
      title: { text: `${title}, ${unit}` },
      type: "log",
      dtick: ends[1] > 50 * ends[0] ? 1 : "D2",
      range: ends.map(Math.log10),
    });
    const layout = {
      shapes: [line],
      showlegend: true,
      legend: LEGEND,
      margin: { l: 48, r: 12, t: 40, b: 44 },
      xaxis: axis("measured"),
      yaxis: axis("predicted"),
    };
    return { traces, layout, note: ["On the dotted line: as predicted. Above it: less was needed."] };
  };
}
