// Words and numbers: how values read, and elements whose text is never markup.

// An element. Attributes that are functions are listeners; children are elements or text, null and false are left out.
function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(key, value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value != null) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child != null && child !== false));
  return made;
}

// 4096 -> 4k, 1048576 -> 1M; as multirun_analysis.style.length.
function length(tokens) {
  if (tokens % 1000 === 0) return String(tokens);
  if (tokens >= 2 ** 20 && tokens % 2 ** 20 === 0) return `${tokens / 2 ** 20}M`;
  return tokens >= 1024 && tokens % 1024 === 0 ? `${tokens / 1024}k` : String(tokens);
}

// Three significant digits, and every digit of whole numbers.
function number(value) {
  if (value == null) return "-";
  if (Math.abs(value) >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return Math.abs(value) < 0.001 ? value.toExponential(2) : value.toPrecision(3);
}

const measured = (value, unit) => (value == null ? "not measured" : `${number(value)} ${unit}`);
const percent = (share) => (share == null ? "-" : `${(100 * share).toFixed(1)}%`);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

const OUTCOMES = {
  ok: { name: "ok", short: "ok" },
  oom_device: { name: "out of GPU memory", short: "GPU OOM" },
  oom_host: { name: "out of host memory", short: "host OOM" },
  does_not_fit: { name: "would not fit, refused", short: "no fit" },
  timeout: { name: "time limit exceeded", short: "timeout" },
  invalid: { name: "refused", short: "refused" },
  skipped: { name: "skipped", short: "skipped" },
  interrupted: { name: "interrupted", short: "interrupted" },
  error: { name: "error", short: "error" },
};
const outcomeOf = (cell) => (cell.status === "invalid" && cell.refused_for_memory ? "does_not_fit" : cell.status);
const outcome = (key) => OUTCOMES[key] || { name: key, short: key };

// A cell's outcome in words; of several runs also how many failed.
function outcomeText(cell) {
  return cell.status === "ok" && cell.failure ? `ok, but ${cell.failure}` : outcome(outcomeOf(cell)).name;
}

const failedRun = (cell) => cell.runs.find((run) => run.status !== "ok");
const message = (cell) => (cell.failure ? (failedRun(cell) || {}).message || "" : "");

// Plotly reads a few tags in the text of a figure, so nothing of a row may look like one.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function cut(text, most) {
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

function wrapped(text, width, mostLines = 6) {
  const lines = [""];
  for (const word of String(text).split(/\s+/)) {
    for (const part of word.match(new RegExp(`.{1,${width}}`, "gu")) || []) {
      if (lines.at(-1) && lines.at(-1).length + part.length >= width) lines.push("");
      lines[lines.length - 1] += (lines.at(-1) ? " " : "") + part;
    }
  }
  return lines.length > mostLines ? [...lines.slice(0, mostLines), "…"] : lines;
}
