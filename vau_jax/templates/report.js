"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)");
function drawCharts() {
  const source = document.getElementById("chart-data");
  if (!source) return;
  const charts = JSON.parse(source.textContent);
  const style = getComputedStyle(document.documentElement);
  const [text, line] = ["--text", "--line"].map((name) => style.getPropertyValue(name).trim());
  const draw = (place) => {
    const chart = charts[Number(place.dataset.chart)];
    const axis = (own) => ({ gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, ...own });
    Plotly.react(place, chart.data, {
      margin: { l: 50, r: 10, t: 10, b: 45 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: text }, hoverlabel: { namelength: -1 }, legend: { orientation: "h", y: 1.15 }, showlegend: true, ...chart.layout,
      xaxis: axis(chart.layout.xaxis), yaxis: axis(chart.layout.yaxis),
    }, { responsive: true, displayModeBar: false });
  };
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "300px" });
  for (const place of document.querySelectorAll("[data-chart]")) seen.observe(place);
}
drawCharts();
dark.addEventListener("change", drawCharts);

const form = document.getElementById("filters");
if (form) {
  const list = document.getElementById("cards"), cards = [...list.children];
  const number = (name) => (card) => Number(card.dataset[name]);
  const orders = {
    "": (a, b) => number("place")(a) - number("place")(b),
    worst: (a, b) => number("score")(a) - number("score")(b),
    best: (a, b) => number("score")(b) - number("score")(a),
    gain: (a, b) => number("gain")(b) - number("gain")(a),
    longest: (a, b) => number("duration")(b) - number("duration")(a),
    name: (a, b) => a.dataset.name.localeCompare(b.dataset.name),
  };
  let order = "";
  const show = () => {
    const wanted = Object.fromEntries(new FormData(form));
    let count = 0;
    for (const card of cards) {
      const fits = ["task", "class"].every((name) => !wanted[name] || card.dataset[name] === wanted[name])
        && (!wanted.outcome || card.dataset.outcome.split(" ").includes(wanted.outcome));
      card.hidden = !fits;
      count += fits;
    }
    if (wanted.order !== order) {
      order = wanted.order;
      list.append(...[...cards].sort(orders[order]));
    }
    document.getElementById("count").textContent = `${count} shown`;
  };
  form.addEventListener("change", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("all").addEventListener("click", () => { form.reset(); show(); });
  show(); // a browser may keep the choices when it loads the page again
}

const cellsOf = (table) => [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent.trim()));
const formats = {
  markdown: (rows) => {
    const lines = rows.map((row) => `| ${row.map((text) => text.replace(/[\\`*_{}[\]<>#|]/g, "\\$&")).join(" | ")} |`);
    return [lines[0], `|${" --- |".repeat(rows[0].length)}`, ...lines.slice(1)].join("\n") + "\n";
  },
  csv: (rows) => rows.map((row) => row.map((text) => {
    const safe = /^[=+@\t]|^-(?![\d.]|$)/.test(text) ? `'${text}` : text; // no formula for a spreadsheet
    return /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  }).join(",")).join("\r\n") + "\r\n",
};
async function copy(text) {
  if (navigator.clipboard && isSecureContext) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea"); // a page from a file may have no clipboard
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("not allowed");
}
for (const button of document.querySelectorAll("[data-copy]")) {
  const place = button.parentElement, table = place.previousElementSibling.querySelector("table");
  place.hidden = false;
  button.addEventListener("click", async () => {
    const said = place.querySelector("[role=status]");
    try {
      await copy(formats[button.dataset.copy](cellsOf(table)));
      said.textContent = "copied";
    } catch (error) {
      said.textContent = `cannot copy: ${error.message}`;
    }
    button.focus();
  });
}

const stamp = document.body.dataset.stamp;
if (stamp) { // the page of a run that goes on: loaded again when there is a newer one, with the choices made
  const kept = JSON.parse(sessionStorage.getItem("choices") || "{}");
  for (const [name, value] of Object.entries(kept)) if (form && form.elements[name]) form.elements[name].value = value;
  if (form) form.dispatchEvent(new Event("change"));
  setInterval(async () => {
    try {
      if (await (await fetch("/stamp")).text() === stamp) return;
    } catch { return; } // the server has ended: the page stays
    if (form) sessionStorage.setItem("choices", JSON.stringify(Object.fromEntries(new FormData(form))));
    location.reload();
  }, 2000);
}
