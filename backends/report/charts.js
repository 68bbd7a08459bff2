"use strict";
// The two charts of a tensor. Cursor and zoom of one apply to the other; the divergence has no negative half.
const DASHES = { entropy: [], mse: [8, 4], percentile: [2, 3], max: [10, 3, 2, 3], fixed: [14, 3] };

const kindOf = (criterion) => (Object.hasOwn(DASHES, criterion) ? criterion : "fixed"); // also "none"
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const compact = new Intl.NumberFormat("en", { notation: "compact" });

// Edges of the bars. The two around 0 are half a bin away from it. See Bars in charts.py.
function edgesOf({ bin_width: width, num_bins: bins, bins_per_bar: each, counts }) {
  const end = (_, k) => (0.5 + Math.min(k * each, (bins - 1) / 2)) * width;
  const ends = Array.from({ length: (counts.length + 1) / 2 }, end);
  return [...ends.map((x) => -x).reverse(), ...ends];
}

// Thresholds to mark: those of the criteria, and the chosen one if no criterion found it.
function thresholdsOf(tensor) {
  const all = Object.values(tensor.criteria);
  return all.some((one) => one.criterion === tensor.chosen.criterion) ? all : [...all, tensor.chosen];
}

// A vertical line at every T, thick for the chosen one, with the names above in separate rows.
function markThresholds(chart, tensor, signs) {
  const { ctx, bbox } = chart;
  const dpr = devicePixelRatio;
  const all = thresholdsOf(tensor).map((one) => ({ ...one, kind: kindOf(one.criterion) }));
  const place = (value) => Math.round(chart.valToPos(value, "x", true));
  const isInside = (x) => x >= bbox.left && x <= bbox.left + bbox.width;
  ctx.save();
  for (const { threshold, criterion, kind } of all) {
    ctx.strokeStyle = colour(kind);
    ctx.lineWidth = Math.round((criterion === tensor.chosen.criterion ? 3 : 1) * dpr);
    ctx.setLineDash(DASHES[kind].map((length) => length * dpr));
    ctx.beginPath();
    for (const x of signs.map((sign) => place(sign * threshold)).filter(isInside)) {
      const middle = x + (ctx.lineWidth % 2) / 2; // of a pixel, so that the line is sharp
      ctx.moveTo(middle, bbox.top);
      ctx.lineTo(middle, bbox.top + bbox.height);
    }
    ctx.stroke();
  }
  ctx.font = `${11 * dpr}px system-ui, sans-serif`;
  ctx.textAlign = "left";
  const lines = all.map(({ threshold }) => place(threshold));
  all.forEach(({ threshold, criterion, kind }, k) => {
    const [x, top, gap] = [place(threshold), bbox.top + (2 + 14 * k) * dpr, 4 * dpr];
    if (!isInside(x)) return;
    const wide = ctx.measureText(criterion).width;
    const left = freeOfLines(x, wide + gap, lines, bbox, gap);
    ctx.fillStyle = ctx.strokeStyle = colour(kind);
    ctx.fillText(criterion, left, top + 10 * dpr);
    ctx.lineWidth = dpr;
    ctx.setLineDash([1 * dpr, 2 * dpr]);
    ctx.beginPath(); // from the name to its line
    ctx.moveTo(left < x ? left + wide + 2 * dpr : left - 2 * dpr, top + 6 * dpr);
    ctx.lineTo(x, top + 6 * dpr);
    ctx.stroke();
  });
  ctx.restore();
}

// Where a name of this width meets no line: to the left of its line, or to the right of all near lines.
function freeOfLines(x, wide, lines, bbox, gap) {
  let end = x;
  for (const line of [...lines].sort((a, b) => b - a)) if (line < end && line > end - wide - gap) end = line;
  if (end - wide >= bbox.left) return end - wide;
  let start = x;
  for (const line of [...lines].sort((a, b) => a - b)) if (line > start && line < start + wide + gap) start = line;
  return start + gap;
}

// The range of T whose divergence is nearly the least.
function shadeTies(chart, { tie_low: low, tie_high: high }) {
  if (low === null) return;
  const { ctx, bbox } = chart;
  const [left, right] = [low, high].map((value) => chart.valToPos(value, "x", true));
  const [from, to] = [Math.max(left, bbox.left), Math.min(right, bbox.left + bbox.width)];
  ctx.save();
  ctx.fillStyle = colour("band");
  if (to >= from) ctx.fillRect(from, bbox.top, Math.max(to - from, devicePixelRatio), bbox.height);
  ctx.restore();
}

function axis(values, more) {
  const font = "11px system-ui, sans-serif";
  const lines = { stroke: () => colour("line"), width: 1 };
  return { values, font, labelFont: font, labelSize: 18, stroke: () => colour("soft"), grid: lines, ticks: lines, ...more };
}

// A y axis. If it is logarithmic, only powers of ten have grid lines.
function yAxis(label, format, log) {
  const isPower = (v) => Math.abs(Math.log10(v) - Math.round(Math.log10(v))) < 1e-9;
  const filter = (_, splits) => splits.map((v) => (log && !isPower(v) ? null : v));
  const lines = { stroke: () => colour("line"), width: 1, filter };
  const values = (_, splits) => splits.map((v) => (v === null ? "" : format(v)));
  return axis(values, { label, size: 50, grid: lines, ticks: lines });
}

function drawChart(element, data, { tensor, signs, y, label, format, series, onCursor, under }) {
  const pointed = ({ cursor, posToVal }) => (cursor.left < 0 ? null : posToVal(cursor.left, "x"));
  const options = {
    width: element.clientWidth,
    height: Math.min(280, 140 + element.clientWidth / 5),
    padding: [8, 12, 0, 0],
    legend: { show: false },
    cursor: { y: false, drag: { x: true, y: false }, sync: { key: "x", scales: ["x", null] } },
    scales: { x: { time: false }, y },
    axes: [
      axis((_, splits) => splits.map((v) => Number(v.toPrecision(6))), { size: 32 }),
      yAxis(label, format, y.distr === 3),
    ],
    series: [{}, { points: { show: false }, ...series }],
    hooks: {
      drawAxes: under ? [under] : [],
      draw: [(chart) => markThresholds(chart, tensor, signs)],
      setCursor: [(chart) => onCursor(pointed(chart))],
    },
  };
  element.replaceChildren();
  return new uPlot(options, data, element);
}

function drawHistogram(element, tensor, { log, from, onCursor }) {
  const edges = edgesOf(tensor.bars);
  const { counts, bin_width: width, bins_per_bar: each } = tensor.bars;
  const least = log ? 0.5 / each : 0; // a logarithmic axis has no 0
  const heights = counts.map((count, k) => Math.max(count / Math.round((edges[k + 1] - edges[k]) / width), least));
  const first = edges.findIndex((edge) => edge >= from);
  const y = log
    ? { distr: 3, range: (_, low, high) => [least, 10 ** Math.ceil(Math.log10(high) + 0.05)] }
    : { range: (_, low, high) => [0, high * 1.05] };
  return drawChart(element, [edges.slice(first), [...heights, heights.at(-1)].slice(first)], {
    tensor, signs: [-1, 1], y, label: "values per bin", format: (v) => compact.format(v), onCursor,
    series: {
      stroke: () => colour("soft"), fill: () => colour("bars"), width: 1, paths: uPlot.paths.stepped({ align: 1 }),
    },
  });
}

function drawDivergence(element, tensor, { onCursor }) {
  const { thresholds, divergences } = tensor.curve;
  const last = edgesOf(tensor.bars).at(-1);
  const xs = [0, ...thresholds, last]; // the ends have no value
  const ys = [null, ...divergences.map((divergence) => Math.max(divergence, 1e-9)), null];
  return drawChart(element, [xs, ys], {
    tensor, signs: [1], y: { distr: 3 }, label: "KL divergence, nats", onCursor,
    format: (v) => String(Number(v.toPrecision(2))),
    series: { stroke: () => colour("entropy"), width: 1.5 },
    under: (chart) => shadeTies(chart, tensor.curve),
  });
}
