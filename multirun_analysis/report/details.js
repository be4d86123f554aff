// Everything about one cell: its outcome, its numbers, its settings, its runs and the command that runs it again.

const dialog = document.getElementById("details");

function openDetails(cell) {
  view.cell = cell.id;
  writeFragment();
  const close = el("button", { type: "button", class: "close", "aria-label": "Close", click: () => dialog.close() }, "×");
  const title = el("h2", { id: "details-title" }, `${cell.model}, ${length(cell.tokens)} tokens`);
  dialog.replaceChildren(
    el("header", {}, el("div", {}, title, el("p", {}, configuration(cell))), close),
    el(
      "div",
      { class: "body" },
      ...[
        outcomePart(cell),
        commandPart(cell),
        numbersPart(cell),
        memoryPart(cell),
        tracePart(cell),
        configPart(cell),
        runsPart(cell),
      ].filter(Boolean),
    ),
  );
  if (!dialog.open) dialog.showModal();
  dialog.querySelector(".body").scrollTop = 0;
  drawTrace(cell, dialog.querySelector(".over-time"));
}

dialog.addEventListener("close", () => {
  view.cell = "";
  writeFragment();
});
// A click beside the panel closes it: only there is the dialog itself the target.
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});

const part = (title, ...content) => el("section", {}, el("h3", {}, title), ...content);

// A list of names and values; what is unknown says so.
function facts(pairs) {
  const lines = pairs.map(([name, value]) =>
    el("div", {}, el("dt", {}, name), el("dd", { class: value == null ? "missing" : null }, value ?? "not recorded")),
  );
  return el("dl", {}, ...lines);
}

function outcomePart(cell) {
  const failed = failedRun(cell);
  const badge = el("span", { class: `badge ${cell.status === "ok" ? "ok" : "failed"}` }, outcomeText(cell));
  if (!cell.failure || !failed) return el("section", {}, badge);
  const why = failed.message || "The run left no message.";
  return el(
    "section",
    {},
    badge,
    el("pre", { class: "error" }, why),
    failed.log && el("p", { class: "note" }, `Log: ${failed.log}`),
  );
}

function commandPart(cell) {
  return part("Run it again", ...commandOf(cell.runs[0]));
}

function commandOf(run) {
  if (!run.command) return [el("p", { class: "missing" }, run.command_note)];
  const code = el("code", {}, run.command);
  const button = el("button", { type: "button", class: "copy", click: () => copy(code, button) }, "Copy");
  return [
    el("div", { class: "command" }, el("pre", { tabindex: "0" }, code), button),
    run.command_note && el("p", { class: "note" }, run.command_note),
  ];
}

async function copy(code, button) {
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    // Some browsers refuse the clipboard to local files; the selection can still be copied.
    getSelection().selectAllChildren(code);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  document.getElementById("said").textContent = "The command is copied.";
  setTimeout(() => (button.textContent = "Copy"), 2000);
}

function numbersPart(cell) {
  if (cell.status !== "ok") return null;
  const range =
    cell.tokens_per_s == null || cell.tokens_per_s_p10 == null
      ? ""
      : ` (10% to 90% of iterations: ${number(cell.tokens_per_s_p10)} to ${number(cell.tokens_per_s_p90)})`;
  const phases = [
    ["forward", cell.forward_s],
    ["backward", cell.backward_s],
    ["step", cell.step_s],
  ];
  return part(
    "Measured",
    facts([
      ["speed", measured(cell.tokens_per_s, "tokens/s") + range],
      ["iteration", measured(cell.iteration_s, "s")],
      ...phases.map(([name, value]) => [name, measured(value, "s")]),
      ["host memory, peak", measured(cell.peak_host_gib, "GiB")],
      ["GPU memory, peak", measured(cell.peak_vram_gib, "GiB")],
      ["MFU", cell.mfu == null ? "not measured" : percent(cell.mfu)],
      ["for 1e9 tokens", measured(cell.gpu_hours_per_billion_tokens, "GPU hours")],
      ...cell.nodes.map(([name, gib]) => [`memory on ${name}`, measured(gib, "GiB")]),
    ]),
  );
}

function memoryPart(cell) {
  const lines = [
    ...cell.memory.map(([name, predicted, got]) => [name === "vram" ? "GPU memory" : "host memory", predicted, got, "GiB"]),
    ...cell.times.map(([name, predicted, got]) => [name, predicted, got, "s"]),
  ];
  if (!lines.length) return null;
  const head = ["", "predicted", "measured", "predicted / measured"].map((name) => el("th", { scope: "col" }, name));
  const body = lines.map(([name, predicted, got, unit]) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, name),
      el("td", {}, measured(predicted, unit)),
      el("td", {}, measured(got, unit)),
      el("td", {}, got ? (predicted / got).toFixed(2) : "-"),
    ),
  );
  return part(
    "Predicted before the run",
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body))),
  );
}

function tracePart(cell) {
  if (!cell.trace) return null;
  if (cell.trace.problem) return part("Memory over time", el("p", { class: "missing" }, cell.trace.problem));
  return part("Memory over time", el("div", { class: "over-time" }));
}

function configPart(cell) {
  const pairs = Object.entries(cell.config);
  return pairs.length ? part("Settings that differ among the rows", facts(pairs)) : null;
}

function runsPart(cell) {
  const runs = cell.runs.map((run, index) =>
    el(
      "details",
      { open: cell.runs.length === 1 },
      el(
        "summary",
        {},
        `${run.run_id}, attempt ${run.attempt}: ${outcome(run.status).name}`,
        run.tokens_per_s != null && `, ${number(run.tokens_per_s)} tokens/s`,
      ),
      // A single run's message stands at the top.
      cell.runs.length > 1 && run.message && el("pre", { class: "error" }, run.message),
      ...(index ? commandOf(run) : []), // the first run's stands above
      run.notes.length > 0 && el("ul", {}, ...run.notes.map((note) => el("li", {}, note))),
      facts(
        [["started", run.started], ["log", run.log], ...Object.entries(run.environment)].map(([name, value]) => [
          name,
          typeof value === "number" ? number(value) : value,
        ]),
      ),
    ),
  );
  return part(cell.runs.length === 1 ? "Run and environment" : `${cell.runs.length} runs and their environment`, ...runs);
}
