// Sorts and filters the table of benchmark cells. The state of the filters is in the URL after #, so that it can be linked.
"use strict";

(() => {
  const table = document.getElementById("cells");
  const form = document.getElementById("cells-filter");
  const summary = document.getElementById("cells-summary");
  const details = document.getElementById("cells-details");
  const data = JSON.parse(document.getElementById("cells-data").textContent);
  const peers = Object.keys(data.peers);
  const headers = [...table.tHead.rows[0].cells];
  const columns = headers.map((header) => header.dataset.key);
  const body = table.tBodies[0];
  body.append(...table.tBodies[1].rows); // cells that are not run
  table.tBodies[1].remove();

  const rows = [...body.rows].map((element, index) => {
    const cells = [...element.cells].map((cell) => cell.textContent);
    const text = Object.fromEntries(columns.map((column, i) => [column, cells[i]]));
    element.tabIndex = -1;
    return { element, text, ...data.cells[index] };
  });
  const rowOf = new Map(rows.map((row) => [row.element, row]));

  const peerColumns = document.head.appendChild(document.createElement("style"));
  let sort = { column: null, descending: false }; // no column: the smallest ratio to the selected peers

  // Values

  const selectedPeers = () => (form.peer.value ? [form.peer.value] : peers);

  const median = (quartiles) => (quartiles ? quartiles[0] : null);

  function smallestRatio(row) {
    const ratios = selectedPeers().flatMap((peer) => row.ratios[peer]?.[0] ?? []);
    return ratios.length ? Math.min(...ratios) : null;
  }

  function value(row, column) {
    if (column === null) return smallestRatio(row);
    if (column === "shape") return row.size;
    if (column === "time") return median(row.seconds);
    if (column === "copy") return median(Object.values(row.copies)[0]);
    return peers.includes(column) ? median(row.ratios[column]) : row.text[column];
  }

  // Missing values are last in both directions.
  function compare(a, b) {
    const [x, y] = [value(a, sort.column), value(b, sort.column)];
    if (x === null || y === null) return (x === null) - (y === null);
    const order = typeof x === "string" ? x.localeCompare(y) : x - y;
    return sort.descending ? -order : order;
  }

  function matches(row) {
    const isRun = row.date !== null;
    const shape = form.shape.value.trim().replace(/\s*[x*,×]\s*/gi, "×");
    return (
      (form.machine.value ? row.text.machine === form.machine.value : isRun) &&
      ["operation", "dtype", "layout"].every((name) => !form[name].value || row.text[name] === form[name].value) &&
      row.text.shape.includes(shape) &&
      (!isRun || !form.peer.value || form.peer.value in row.ratios)
    );
  }

  // Texts

  function geometricMean(values) {
    return Math.exp(values.reduce((sum, x) => sum + Math.log(x), 0) / values.length);
  }

  function summarize(shown) {
    const run = shown.filter((row) => row.date !== null);
    if (!shown.length) return "No cell matches.";
    if (!run.length) return `${shown.length} planned cells, not run.`;
    const peer = form.peer.value || "torch";
    const ratios = run.flatMap((row) => row.ratios[peer]?.[0] ?? []);
    const slower = run.filter((row) => smallestRatio(row) < 1).length;
    const than = form.peer.value ? data.peers[peer] : "at least one peer";
    const mean = ratios.length
      ? ` Time of ${data.peers[peer]} / time of normfused: geometric mean ${geometricMean(ratios).toFixed(2)}` +
        (ratios.length < run.length ? ` of ${ratios.length} cells.` : ".")
      : "";
    return `${run.length} cells, ${slower} of them slower than ${than} (▼).${mean}`;
  }

  function spread(quartiles, scale = 1) {
    const [middle, ...others] = quartiles.map((x) => (x * scale).toPrecision(3));
    return others.length ? `${middle} (${others.join("–")})` : middle;
  }

  function describe(row) {
    const { operation, shape, dtype, layout, machine } = row.text;
    const parts = [`${operation}; ${shape}, ${dtype}, ${layout}; ${machine}${row.date ? `, ${row.date}` : ""}.`];
    if (row.seconds) parts.push(`normfused: ${spread(row.seconds, 1e3)} ms.`);
    const ratios = peers.filter((peer) => row.ratios[peer]);
    if (ratios.length) {
      const listed = ratios.map((peer) => `${data.peers[peer]} ${spread(row.ratios[peer])}`);
      parts.push(`Time of the peer / time of normfused: ${listed.join(", ")}.`);
    }
    const copies = Object.entries(row.copies).map(([bytes, distance]) => `${bytes}: ${spread(distance)}`);
    if (copies.length) parts.push(`Time of normfused / time of a copy of ${copies.join(", ")}.`);
    const all = [row.seconds, ...Object.values(row.ratios), ...Object.values(row.copies)];
    if (all.some((quartiles) => quartiles?.length > 1)) parts.push("Quartiles are in parentheses.");
    return parts.join(" ");
  }

  // The page

  function show() {
    const shown = rows.filter(matches).sort(compare);
    for (const row of rows) row.element.hidden = true;
    for (const row of shown) row.element.hidden = false;
    body.append(...shown.map((row) => row.element));
    select(shown[0]?.element);
    summary.textContent = summarize(shown);
    details.hidden = true;
    headers.forEach((header, i) => {
      const direction = sort.descending ? "descending" : "ascending";
      header.setAttribute("aria-sort", columns[i] === sort.column ? direction : "none");
    });
    const first = columns.indexOf(peers[0]) + 1;
    const only = columns.indexOf(form.peer.value) + 1;
    const others = `:nth-child(n + ${first}):nth-child(-n + ${first + peers.length - 1}):not(:nth-child(${only}))`;
    peerColumns.textContent = form.peer.value ? `#cells tr > ${others} { display: none; }` : "";
  }

  // One row is in the order of the Tab key; arrow keys move from row to row.
  function select(element) {
    for (const selected of body.querySelectorAll("[tabindex='0']")) selected.tabIndex = -1;
    if (element) element.tabIndex = 0;
  }

  function explain(element) {
    details.textContent = describe(rowOf.get(element));
    details.hidden = false;
  }

  function writeState() {
    const state = new URLSearchParams();
    for (const [name, entered] of new FormData(form)) if (entered) state.set(name, entered);
    if (sort.column) state.set("sort", (sort.descending ? "-" : "") + sort.column);
    const hash = state.toString();
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  }

  function readState() {
    const state = new URLSearchParams(location.hash.slice(1));
    const column = (state.get("sort") ?? "").replace("-", "");
    const isKnown = columns.includes(column);
    sort = { column: isKnown ? column : null, descending: isKnown && state.get("sort").startsWith("-") };
    const ignored = column && !isKnown ? [`sort=${column}`] : [];
    for (const control of form.elements) {
      if (!control.name) continue;
      const wanted = state.get(control.name) ?? "";
      control.value = wanted;
      if (control.value === wanted) continue;
      control.value = "";
      ignored.push(`${control.name}=${wanted}`);
    }
    show();
    if (ignored.length) summary.prepend(`Unknown and ignored: ${ignored.join(", ")}. `);
  }

  function update() {
    show();
    writeState();
  }

  headers.forEach((header, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => {
      sort = { column: columns[i], descending: sort.column === columns[i] && !sort.descending };
      update();
    });
    header.append(button);
  });
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => {
    sort = { column: null, descending: false };
    setTimeout(update); // after the controls are reset
  });
  for (const event of ["mouseover", "focusin", "click"]) {
    body.addEventListener(event, ({ target }) => {
      const element = target.closest("tr");
      explain(element);
      if (event !== "mouseover") select(element);
    });
  }
  body.addEventListener("keydown", (event) => {
    const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    if (!step) return;
    let element = event.target.closest("tr")[step];
    while (element?.hidden) element = element[step];
    element?.focus();
    event.preventDefault();
  });
  addEventListener("hashchange", readState);
  form.hidden = false;
  readState();
})();
