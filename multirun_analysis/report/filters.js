// The bar of filters: a menu of checkboxes each, a search, and what is shown of all.

function buildFilters(changed) {
  const bar = document.getElementById("filters");
  const menus = FILTERS.map((filter) => {
    const boxes = filter.values.map((value) => {
      const box = el("input", {
        type: "checkbox",
        value,
        change: () => {
          choose(filter.key, value, box.checked);
          changed();
        },
      });
      const count = el("span", { class: "count" });
      return { value, box, count, line: el("label", {}, box, el("span", {}, filter.name(value)), count) };
    });
    const summary = el("summary");
    const menu = el(
      "details",
      { "data-filter": filter.key },
      summary,
      el("div", { class: "menu" }, ...boxes.map((one) => one.line)),
    );
    return { filter, boxes, summary, menu };
  });
  const search = el("input", {
    type: "search",
    placeholder: "Search, e.g. a message",
    "aria-label": "Search in settings, messages and run ids",
    input: () => {
      view.search = search.value.trim();
      changed();
    },
  });
  const shown = el("output");
  const clear = el("button", { type: "button", class: "clear" }, "Clear filters");
  bar.append(...menus.map((one) => one.menu), search, clear, shown);
  bar.addEventListener("submit", (event) => event.preventDefault());
  for (const button of document.querySelectorAll(".clear")) {
    button.addEventListener("click", () => {
      view.chosen = new Map();
      view.search = "";
      changed();
    });
  }
  closeMenus(menus.map((one) => one.menu));

  // Brings the bar in line with the view; counts are of the cells that the other filters leave.
  return (visible) => {
    for (const { filter, boxes, summary } of menus) {
      const chosen = view.chosen.get(filter.key);
      const rest = CELLS.filter((cell) => matches(cell, filter.key)).map(filter.of);
      for (const { value, box, count } of boxes) {
        box.checked = Boolean(chosen && chosen.has(value));
        count.textContent = rest.filter((one) => one === value).length;
      }
      const names = chosen ? filter.values.filter((value) => chosen.has(value)).map(filter.name) : [];
      summary.textContent = filter.title + (names.length ? `: ${names.length > 2 ? names.length : names.join(", ")}` : "");
      summary.classList.toggle("on", names.length > 0);
    }
    if (search.value.trim() !== view.search) search.value = view.search;
    clear.hidden = !view.chosen.size && !view.search;
    shown.textContent =
      visible.length === CELLS.length ? plural(CELLS.length, "cell") : `${visible.length} of ${plural(CELLS.length, "cell")}`;
  };
}

// One menu is open at a time; Escape and a click elsewhere close it.
function closeMenus(menus) {
  for (const menu of menus) {
    menu.addEventListener("toggle", () => {
      if (menu.open) for (const other of menus) if (other !== menu) other.open = false;
    });
    menu.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && menu.open) {
        menu.open = false;
        menu.querySelector("summary").focus();
      }
    });
  }
  document.addEventListener("click", (event) => {
    for (const menu of menus) if (!menu.contains(event.target)) menu.open = false;
  });
}
