"use strict";
// The chosen tensor: thresholds, charts, and the values under the cursor.
{
  const text = document.getElementById("data").textContent;
  const report = JSON.parse(text);
  const byName = new Map(report.tensors.map((tensor) => [tensor.name, tensor]));
  const PAPER = 960; // width of A4 in pixels, landscape
  const at = (id) => document.getElementById(id);
  let chosen = null;
  let charts = [];

  const number = (value, digits = 4) => (value === null ? "–" : String(Number(value.toPrecision(digits))));
  const fixed = (value, digits = 4) => (value === null ? "–" : value.toPrecision(digits));
  const whole = (value) => value.toLocaleString("en");
  const percent = (share) => (share === null ? "–" : `${number(100 * share, 3)}%`);

  const cell = (kind, content, className) => {
    const made = document.createElement(kind);
    made.append(content);
    if (className) made.className = className;
    if (kind === "th") made.scope = "row";
    return made;
  };

  const swatch = (criterion) => {
    const template = document.createElement("template");
    template.innerHTML = '<svg class="swatch" viewBox="0 0 34 10" aria-hidden="true"><path d="M0 5H34"/></svg>';
    const svg = template.content.firstChild;
    svg.style.stroke = `var(--${kindOf(criterion)})`;
    svg.style.strokeDasharray = DASHES[kindOf(criterion)].join(" ");
    return svg;
  };

  const criterionRow = (one) => {
    const row = document.createElement("tr");
    const isChosen = one.criterion === chosen.chosen.criterion;
    const name = cell("th", swatch(one.criterion));
    const isReplaced = chosen.guard.startsWith(`${one.criterion} -> `);
    name.append(one.criterion + (isChosen ? " (chosen)" : isReplaced ? " (replaced by the guard)" : ""));
    const numbers = [fixed(one.threshold), fixed(one.ratio, 3), percent(one.clipped)];
    const cells = [...numbers, fixed(one.sqnr_db, 3), fixed(one.divergence, 3)];
    row.append(name, ...cells.map((content) => cell("td", content, isChosen ? "number main" : "number")));
    return row;
  };

  const countBeyond = ({ counts }, edges, limit) =>
    counts.reduce((sum, count, k) => (edges[k] >= limit || edges[k + 1] <= -limit ? sum + count : sum), 0);

  const divergenceAt = (curve, t) => {
    const k = curve && t >= curve.thresholds[0] ? curve.thresholds.findIndex((candidate) => candidate >= t) : -1;
    return k < 0 ? "" : `; KL ${number(curve.divergences[k], 3)} nats at T = ${number(curve.thresholds[k])}`;
  };

  const read = (x) => {
    const { bars, curve, num_values: total } = chosen;
    const edges = edgesOf(bars);
    const bar = x === null ? -1 : edges.findIndex((edge) => edge > x) - 1;
    const values = `${whole(bars.counts[bar] ?? 0)} values from ${number(edges[bar] ?? 0)} to ${number(edges[bar + 1])}`;
    const beyond = percent(countBeyond(bars, edges, Math.abs(x)) / total);
    at("readout").textContent = bar < 0
      ? "Point at a chart to read values. Drag to zoom, double-click to reset."
      : `At ${number(x)}: ${values}; ${beyond} in bars beyond ±${number(Math.abs(x))}${divergenceAt(curve, Math.abs(x))}`;
  };

  const nearTies = ({ tie_low: low, tie_high: high }) =>
    low === null ? "" : ` Shaded: T from ${number(low)} to ${number(high)}, within 1 % of the least divergence.`;

  const describeCharts = () => {
    const { bars, curve, name, amax, chosen: found } = chosen;
    const marks = thresholdsOf(chosen).map((one) => `${one.criterion} ${number(one.threshold)}`).join(", ");
    const each = curve ? curve.candidates_per_point : 0;
    const lowest = curve && curve.divergences.length ? number(Math.min(...curve.divergences), 3) : "unknown";
    at("histogram").ariaLabel = `Histogram of ${name} from ${number(-amax)} to ${number(amax)}; thresholds: ${marks}`;
    at("histogram-caption").textContent =
      `Each bar shows ${bars.bins_per_bar > 1 ? `the mean of ${bars.bins_per_bar}` : "one"} of ${bars.num_bins} bins. ` +
      "Lines mark ±T of each criterion; the chosen one is thick.";
    at("divergence").ariaLabel =
      `Divergence of ${name} by candidate threshold: at least ${lowest} nats; chosen T ${number(found.threshold)}`;
    at("divergence-caption").textContent = curve
      ? `Divergence by candidate T.${each > 1 ? ` Each point is the lowest of ${each} neighbours.` : ""}` + nearTies(curve)
      : "No divergence curve: there are more levels than bins.";
  };

  const draw = () => {
    charts.forEach((chart) => chart.destroy());
    charts = [];
    const { bars, curve } = chosen;
    at("layer-charts").hidden = !bars;
    if (!bars) return; // always 0
    describeCharts();
    const half = (bars.counts.length - 1) / 2;
    const negative = bars.counts.slice(0, half).some((count) => count > 0);
    const from = negative ? edgesOf(bars)[0] : -bars.bin_width / 2;
    charts.push(drawHistogram(at("histogram"), chosen, { log: at("log").checked, from, onCursor: read }));
    if (curve && curve.divergences.length) {
      charts.push(drawDivergence(at("divergence"), chosen, { onCursor: read }));
    }
    read(null);
  };

  const factsOf = ({ num_bits: bits, amax, num_values: total, num_zeros: zeros, calls, ...one }) => [
    `${bits} bits, amax ${number(amax)}, ${whole(total)} values`,
    ...(total ? [`${percent(zeros / total)} in the bin around 0`] : []),
    `observed ${calls} × per batch, SQNR ${number(one.chosen.sqnr_db, 3)} dB expected`,
    ...(one.measured_sqnr_db === null ? [] : [`${number(one.measured_sqnr_db, 3)} dB measured`]),
  ];

  const choose = (name) => {
    chosen = byName.get(name);
    at("layer").hidden = false;
    at("layer-title").textContent = name;
    at("layer-facts").textContent = factsOf(chosen).join(", ");
    at("layer-warnings").replaceChildren(...chosen.warnings.map((warning) => cell("li", warning)));
    at("layer-criteria").tBodies[0].replaceChildren(...thresholdsOf(chosen).map(criterionRow));
    for (const row of at("tensor-table").tBodies[0].rows) {
      row.classList.toggle("picked", row.dataset.name === name);
      row.ariaCurrent = row.dataset.name === name ? "true" : null;
    }
    draw();
  };

  document.addEventListener("click", ({ target }) => {
    const name = target.closest("[data-pick]")?.dataset.pick;
    if (name === undefined) return;
    choose(name);
    at("layer").scrollIntoView({ block: "nearest" });
  });
  at("log").addEventListener("input", draw);

  const fit = () => {
    for (const chart of charts) {
      const width = matchMedia("print").matches ? PAPER : chart.root.parentElement.clientWidth;
      if (width && width !== chart.width) chart.setSize({ width, height: chart.height });
      else chart.redraw();
    }
  };
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", fit);
  new ResizeObserver(fit).observe(at("histogram"));

  at("download").href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  at("download").hidden = false;
  const worst = document.querySelector("header [data-pick]")?.dataset.pick;
  const first = report.tensors.find(({ name, bars }) => name === worst && bars) ?? report.tensors[0];
  if (first) choose(first.name);
}
