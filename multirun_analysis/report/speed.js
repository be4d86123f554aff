// Figures of speed: by sequence length, and against memory. Each takes the cells that the filters leave and gives what to draw, or a
// sentence that says why there is nothing.

const MOST_PANELS = 6;

// A cross at the bottom for each length at which cells failed: one at a place, since they would hide each other.
function crosses(failed, yaxis) {
  const groups = groupsOf(failed, (cell) => cell.tokens);
  const says = (group) => [
    ...group.slice(0, 8).map((cell) => plain(cut(`${configuration(cell)}: ${outcomeText(cell)}`, narrow() ? 44 : 90))),
    group.length > 8 ? `and ${group.length - 8} more` : "The cells are in the grid and in the table.",
  ];
  const title = (group) => `<b>${plain(group[0].model)}, ${length(group[0].tokens)}: ${group.length} failed</b><br>`;
  return marks(
    groups.map((group) => group[0]),
    (cell) => cell.tokens,
    () => 0,
    {
      yaxis,
      mode: "markers+text",
      marker: { color: variable("--bad"), symbol: "x", size: 9 },
      text: groups.map((group) => `${group.length} failed`),
      textposition: "top center",
      textfont: { color: variable("--bad") },
      cliponaxis: false,
      hovertext: groups.map((group) => (group.length > 1 ? title(group) + says(group).join("<br>") : hover(group[0]))),
    },
  );
}

function throughput(cells) {
  const models = [...new Set(cells.map((cell) => cell.model))];
  const drawn = models.slice(0, MOST_PANELS);
  const lengths = [...new Set(cells.map((cell) => cell.tokens))].filter((tokens) => tokens > 0).sort((a, b) => a - b);
  const step = Math.ceil(lengths.length / (narrow() ? 5 : 10));
  const ticks = lengths.filter((_, index) => index % step === 0);
  const kept = cells.filter((cell) => drawn.includes(cell.model) && cell.tokens > 0);
  if (!kept.length) return "No cell with a sequence length.";
  const ok = kept.filter((cell) => cell.tokens_per_s != null);
  const share = 1 / drawn.length;
  const layout = {
    height: 100 + 260 * drawn.length,
    annotations: [],
    xaxis: {
      type: "log",
      title: { text: "sequence length, tokens" },
      tickvals: ticks,
      ticktext: ticks.map(length),
      anchor: drawn.length > 1 ? `y${drawn.length}` : "y",
    },
  };
  drawn.forEach((model, index) => {
    const top = 1 - index * share;
    layout[`yaxis${index ? index + 1 : ""}`] = {
      domain: [top - share + 0.02, top - 34 / (260 * drawn.length)],
      rangemode: "tozero",
      title: { text: "tokens/s" },
    };
    layout.annotations.push({
      text: `<b>${plain(cut(model, narrow() ? 30 : 70))}</b>`,
      xref: "paper",
      yref: "paper",
      x: 0,
      y: top,
      xanchor: "left",
      yanchor: "top",
      showarrow: false,
    });
  });
  const axisOf = (cell) => `y${drawn.indexOf(cell.model) ? drawn.indexOf(cell.model) + 1 : ""}`;
  const traces = groupsOf(ok, (cell) => JSON.stringify([cell.model, configuration(cell), cell.machine])).map((group) => {
    const line = [...group].sort((a, b) => a.tokens - b.tokens);
    const { colour, dash } = lookOf(line[0]);
    const reach = (of) => line.map((cell) => (of(cell) == null ? 0 : Math.abs(of(cell) - cell.tokens_per_s)));
    return marks(
      line,
      (cell) => cell.tokens,
      (cell) => cell.tokens_per_s,
      {
        yaxis: axisOf(line[0]),
        mode: "lines+markers",
        line: { color: colour, dash, width: 2 },
        marker: { color: colour, symbol: symbolOf(line[0]), size: 8 },
        error_y: {
          type: "data",
          array: reach((cell) => cell.tokens_per_s_p90),
          arrayminus: reach((cell) => cell.tokens_per_s_p10),
          thickness: 1,
          width: 3,
          color: colour,
        },
        hovertext: line.map((cell) => hover(cell, ...speeds(cell))),
      },
    );
  });
  const failed = kept.filter((cell) => cell.status !== "ok");
  for (const group of groupsOf(failed, (cell) => cell.model)) traces.push(crosses(group, axisOf(group[0])));
  const others = models.length > MOST_PANELS ? `The first ${MOST_PANELS} of ${models.length} models; filter for others.` : "";
  const note = ["Bars: 10% to 90% of iterations.", lacking(kept, ok, "a speed"), others];
  return { traces, layout, note, legend: kept };
}

function memoryAgainstSpeed(memory, title) {
  return (cells) => {
    const kept = cells.filter((cell) => cell.tokens_per_s != null && cell[memory] != null);
    if (!kept.length) return `No cell has both its speed and its ${title}.`;
    const traces = groupsOf(kept, configuration).map((group) =>
      marks(
        group,
        (cell) => cell[memory],
        (cell) => cell.tokens_per_s,
        {
          mode: "markers",
          marker: { color: group.map((cell) => lookOf(cell).colour), symbol: group.map(symbolOf), size: 10, line: { width: 1 } },
          hovertext: group.map((cell) => hover(cell, ...speeds(cell))),
        },
      ),
    );
    const layout = {
      xaxis: { title: { text: `${title}, GiB` }, ...scale(kept.map((cell) => cell[memory])) },
      yaxis: { title: { text: "tokens/s" }, ...scale(kept.map((cell) => cell.tokens_per_s)) },
    };
    const shapes = new Set(kept.map((cell) => cell.model)).size > 1 ? "Shapes: models." : "";
    return { traces, layout, note: ["Up and to the left is better. Colours: as above.", shapes, lacking(cells, kept, title)] };
  };
}
