
(() => {
  "use strict";
  document.querySelectorAll("img[data-as]").forEach((image) => { image.src = document.getElementById(`image${image.dataset.as}`).src; });
  const charts = JSON.parse(document.getElementById("chart-data").textContent);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dashes = [[], [], [], [], [6, 3], [6, 3], [2, 3], [2, 3]];
  const plots = [];
  const number = (value) => (value == null ? "–" : Number(value.toPrecision(4)).toString());
  const axis = (size) => ({
    stroke: () => colour("--quiet"), font: "11px system-ui, sans-serif", size,
    grid: { stroke: () => colour("--grid"), width: 1 }, ticks: { stroke: () => colour("--grid"), width: 1 },
  });
  const draw = (chart) => {
    const box = document.getElementById(chart.id);
    if (!box || plots.some((plot) => plot.box === box) || !box.clientWidth) return;
    const few = chart.steps.length <= 12;
    const series = chart.series.map((part, i) => ({
      label: part.name, value: (_, value) => number(value), spanGaps: true, width: 1.6,
      stroke: () => colour(`--c${i % 8}`), dash: dashes[i % 8], points: { show: few, size: 5, fill: () => colour(`--c${i % 8}`) },
    }));
    const showLast = (plot) => { if (plot.cursor.idx == null) plot.setLegend({ idx: chart.steps.length - 1 }); };
    const options = {
      width: box.clientWidth, height: 190, padding: [8, 8, 0, 0], scales: { x: { time: false } },
      cursor: { sync: { key: chart.id.split("-")[0], setSeries: false }, drag: { x: true, y: false } },
      hooks: { ready: [showLast], setCursor: [showLast] },
      series: [{ label: "step", value: (_, value) => (value == null ? "–" : String(value)) }, ...series],
      axes: [axis(28), { ...axis(54), values: (_, values) => values.map(number) }],
    };
    plots.push({ box, plot: new uPlot(options, [chart.steps, ...chart.series.map((part) => part.values)], box) });
  };
  const resize = (width) => plots.forEach(({ box, plot }) => {
    const wanted = width || box.clientWidth;
    if (wanted && wanted !== plot.width) plot.setSize({ width: wanted, height: 190 });
  });
  const drawAll = () => charts.forEach(draw);
  drawAll();
  addEventListener("resize", () => resize());
  document.querySelectorAll("details.more").forEach((part) => part.addEventListener("toggle", drawAll));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach(({ plot }) => plot.redraw(false)));
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.more:not([open]), details.problems:not([open])")];
    opened.forEach((part) => { part.open = true; });
    document.documentElement.dataset.print = "";
    drawAll();
    resize(330);
    plots.forEach(({ plot }) => plot.redraw(false));
  });
  addEventListener("afterprint", () => {
    delete document.documentElement.dataset.print;
    opened.forEach((part) => { part.open = false; });
    resize();
    plots.forEach(({ plot }) => plot.redraw(false));
  });
})();
