"use strict";
// The two charts of a tensor, one over the other with the same x axis: cursor and zoom of one are those of the other.
const DASHES = { entropy: [], mse: [8, 4], percentile: [2, 3], max: [10, 3, 2, 3], fixed: [14, 3] };

const kindOf = (criterion) => (Object.hasOwn(DASHES, criterion) ? criterion : "fixed"); // also "none"
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const compact = new Intl.NumberFormat("en", { notation: "compact" });

// Edges of the bars; those at 0 are half a bin from it. See Bars in drawing.py.
function edgesOf({ bin_width: width, num_bins: bins, bins_per_bar: each, counts }) {
  const ends = Array.from({ length: (counts.length + 1) / 2 }, (_, k) => (0.5 + Math.min(k * each, (bins - 1) / 2)) * width);
  return [...ends.map((end) => -end).reverse(), ...ends];
}

// All thresholds that a chart marks: those of the criteria, and the chosen one if it is none of them.
function thresholdsOf(tensor) {
  const all = Object.values(tensor.criteria);
  return all.some((one) => one.criterion === tensor.chosen.criterion) ? all : [...all, tensor.chosen];
}

// Vertical lines at every T, the chosen one thick, each with its name on a line of its own.
function markThresholds(chart, tensor, signs) {
  const { ctx, bbox } = chart;
  const dpr = devicePixelRatio;
  ctx.save();
  ctx.font = `${11 * dpr}px system-ui, sans-serif`;
  thresholdsOf(tensor).forEach((one, k) => {
    ctx.strokeStyle = ctx.fillStyle = colour(kindOf(one.criterion));
    ctx.lineWidth = (one.criterion === tensor.chosen.criterion ? 2.5 : 1.25) * dpr;
    ctx.setLineDash(DASHES[kindOf(one.criterion)].map((length) => length * dpr));
    for (const sign of signs) {
      const x = Math.round(chart.valToPos(sign * one.threshold, "x", true));
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      if (sign < 0) continue;
      const wide = ctx.measureText(one.criterion).width + 5 * dpr;
      ctx.textAlign = x - wide < bbox.left ? "left" : "right";
      ctx.fillText(one.criterion, x + (ctx.textAlign === "left" ? 4 : -4) * dpr, bbox.top + (12 + 14 * k) * dpr);
    }
  });
  ctx.restore();
}

function axis(label, values, size) {
  return {
    label, values, size, labelSize: 18, stroke: () => colour("soft"), font: "11px system-ui, sans-serif", labelFont: "11px system-ui, sans-serif",
    grid: { stroke: () => colour("line"), width: 1 }, ticks: { stroke: () => colour("line"), width: 1 },
  };
}

function drawChart(element, data, { tensor, signs, y, label, format, series, onCursor }) {
  const options = {
    width: element.clientWidth, height: Math.min(280, 140 + element.clientWidth / 5),
    legend: { show: false }, padding: [8, 12, 0, 0],
    cursor: { y: false, drag: { x: true, y: false }, sync: { key: "x", scales: ["x", null] } },
    scales: { x: { time: false }, y },
    axes: [axis("", (_, splits) => splits.map((v) => Number(v.toPrecision(6))), 32), axis(label, (_, splits) => splits.map((v) => (v === null ? "" : format(v))), 50)],
    series: [{}, { points: { show: false }, ...series }],
    hooks: { draw: [(chart) => markThresholds(chart, tensor, signs)], setCursor: [(chart) => onCursor(chart.cursor.left < 0 ? null : chart.posToVal(chart.cursor.left, "x"))] },
  };
  element.replaceChildren();
  return new uPlot(options, data, element);
}

function drawHistogram(element, tensor, { log, from, onCursor }) {
  const edges = edgesOf(tensor.bars);
  const { counts, bin_width: width, bins_per_bar: each } = tensor.bars;
  const least = log ? 0.5 / each : 0; // log has no 0
  const heights = counts.map((count, k) => Math.max(count / Math.round((edges[k + 1] - edges[k]) / width), least));
  const first = edges.findIndex((edge) => edge >= from);
  const y = log
    ? { distr: 3, range: (_, low, high) => [least, 10 ** Math.ceil(Math.log10(high) + 0.05)] }
    : { range: (_, low, high) => [0, high * 1.05] };
  return drawChart(element, [edges.slice(first), [...heights, heights.at(-1)].slice(first)], {
    tensor, signs: [-1, 1], y, label: "values per bin", format: (v) => compact.format(v), onCursor,
    series: { stroke: () => colour("soft"), fill: () => colour("bars"), width: 1, paths: uPlot.paths.stepped({ align: 1 }) },
  });
}

function drawDivergence(element, tensor, { from, onCursor }) {
  const { thresholds, divergences } = tensor.curve;
  const last = edgesOf(tensor.bars).at(-1);
  const xs = [from, ...thresholds, ...(thresholds.at(-1) < last ? [last] : [])];
  const ys = [null, ...divergences.map((d) => Math.max(d, 1e-9)), ...(thresholds.at(-1) < last ? [null] : [])];
  return drawChart(element, [xs, ys], {
    tensor, signs: [1], y: { distr: 3 }, label: "KL divergence, nats", format: (v) => Number(v.toPrecision(2)).toString(), onCursor,
    series: { stroke: () => colour("entropy"), width: 1.5 },
  });
}
