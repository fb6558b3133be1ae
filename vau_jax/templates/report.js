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
      font: { color: text }, hoverlabel: { namelength: -1 }, legend: { orientation: "h", y: 1.02, yanchor: "bottom" }, showlegend: true, ...chart.layout,
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
        && ["outcome", "change"].every((name) => !wanted[name] || card.dataset[name].split("|").includes(wanted[name]));
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

const cellsOf = (table) => [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent.trim().replace(/\s+/g, " ")));
const formats = {
  markdown: (rows) => {
    const lines = rows.map((row) => `| ${row.map((text) => text.replace(/[\\`*_{}[\]<>#|]/g, "\\$&")).join(" | ")} |`);
    return [lines[0], `|${" --- |".repeat(rows[0].length)}`, ...lines.slice(1)].join("\n") + "\n";
  },
  csv: (rows) => rows.map((row) => row.map((text) => { // RFC 4180
    const formula = /^[=+@-]/.test(text) && !/^[+-]?[\d.]*( \[[-\d., ]+\])?$/.test(text); // to a spreadsheet
    const safe = formula ? `'${text}` : text;
    return /[",]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
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

// The page of a run that goes on is loaded again when there is a newer one: with the choices made, what was unfolded, and
// whatever stood at the top of the window.
const anchors = () => [...document.querySelectorAll("h2, h3, .card")];
const nameOf = (place) => place.id || place.dataset.name || place.textContent;
function keep() {
  const top = anchors().find((place) => place.getBoundingClientRect().bottom > 0);
  sessionStorage.setItem("kept", JSON.stringify({
    choices: form ? Object.fromEntries(new FormData(form)) : {},
    open: [...document.querySelectorAll("details[open]")].map((details) => details.dataset.key),
    top: top && scrollY ? [nameOf(top), top.getBoundingClientRect().top] : null,
  }));
}
function restore() {
  const { choices = {}, open = [], top } = JSON.parse(sessionStorage.getItem("kept") || "{}");
  for (const [name, value] of Object.entries(choices)) if (form && form.elements[name]) form.elements[name].value = value;
  if (form) form.dispatchEvent(new Event("change"));
  for (const details of document.querySelectorAll("details")) details.open = open.includes(details.dataset.key);
  const place = top && anchors().find((one) => nameOf(one) === top[0]);
  if (!place) return;
  const move = () => scrollBy(0, place.getBoundingClientRect().top - top[1]);
  move();
  requestAnimationFrame(move); // cards near the window have got their heights
}
const { stamp } = document.body.dataset;
if (stamp) {
  history.scrollRestoration = "manual";
  restore();
  setInterval(async () => {
    try {
      if (await (await fetch("/stamp")).text() === stamp) return;
    } catch { return; } // the server has ended: the page stays
    keep();
    location.reload();
  }, 2000);
}
