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
    longest: (a, b) => number("duration")(b) - number("duration")(a),
    name: (a, b) => a.dataset.name.localeCompare(b.dataset.name),
  };
  let order = "";
  const show = () => {
    const wanted = Object.fromEntries(new FormData(form));
    let count = 0;
    for (const card of cards) {
      const fits = ["evaluation", "task", "class"].every((name) => !wanted[name] || card.dataset[name] === wanted[name])
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
}
