// One plot: its curves drawn by uPlot, its legend, the values under the cursor, zoom and keys.
import { element, number, place, color, duration } from "./format.js";

const HEIGHT = 190;
const TIMES = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 432800];

export class Chart {
  // shared: {axis, window, extent, smooth, zoom(from, to), marks()}, of the page.
  constructor(plot, shared) {
    this.plot = plot;
    this.shared = shared;
    this.logarithmic = plot.logarithmic;
    this.cache = new Map(); // run id -> {version, signature, curves: key -> {x, mean, low, high}}
    this.entries = []; // what is drawn
    this.shape = "";
    this.build();
  }

  build() {
    const { plot } = this;
    this.keys = element("span", { class: "keys" });
    this.of = element("span", { class: "of" });
    this.log = element("button", {
      type: "button", class: "log", "aria-pressed": String(this.logarithmic), "aria-label": `${plot.title}: log scale`,
      onclick: () => this.toggleLog(),
    }, "log");
    this.canvas = element("div", { class: "canvas" });
    this.tip = element("div", { class: "tip", hidden: true });
    this.read = element("span", { class: "read", "aria-live": "polite" });
    this.node = element("figure", {
      class: "plot", tabindex: "0", "aria-label": `${plot.title}${plot.unit ? `, ${plot.unit}` : ""}`,
      onkeydown: (event) => this.key(event),
      onblur: () => this.hideTip(),
    },
    element("figcaption", {}, element("span", { class: "title" }, plot.title),
      element("span", { class: "unit" }, plot.unit), this.of, this.keys, this.log),
    this.canvas, this.tip, this.read);
    this.canvas.addEventListener("mouseleave", () => this.hideTip());
  }

  // entries: [{color, run, label, key, curve, dash}]: one a line.
  draw(entries) {
    this.entries = entries;
    const shape = JSON.stringify([
      entries.map((entry) => [entry.color, entry.dash, entry.run, entry.label, !!entry.curve.low]),
      this.shared.axis, this.logarithmic, this.shared.smooth > 0, document.documentElement.dataset.theme,
    ]);
    const data = this.aligned(entries);
    const width = Math.max(120, this.canvas.clientWidth);
    if (shape !== this.shape || !this.chart) {
      this.chart?.destroy();
      this.chart = new uPlot(this.options(entries, width), data, this.canvas);
      this.shape = shape;
      this.legend(entries);
    } else {
      this.chart.setData(data);
    }
    if (!this.tip.hidden && this.chart.cursor.idx != null) this.showTip();
  }

  // The run that a plot of one run is of; "" where that is clear.
  owner(name) {
    this.of.textContent = name ? `of ${name}` : "";
  }

  resize() {
    if (this.chart) this.chart.setSize({ width: Math.max(120, this.canvas.clientWidth), height: HEIGHT });
  }

  destroy() {
    this.chart?.destroy();
    this.node.remove();
  }

  // --- data --------------------------------------------------------------------------------------------------------

  // All curves over one list of places: [x, then for each entry the columns of `columns`].
  aligned(entries) {
    const places = entries.map((entry) => entry.curve.x);
    const x = merged(places);
    const at = new Map(x.map((value, index) => [value, index]));
    const spread = (curve, values) => {
      const column = new Array(x.length).fill(null);
      values.forEach((value, index) => { column[at.get(curve.x[index])] = this.shown(value); });
      return column;
    };
    if (this.plot.form === "stack") return [x, ...this.stacked(entries, x.length, spread)];
    const columns = [];
    for (const entry of entries) {
      const { curve } = entry, smooth = this.smooths(entry);
      if (curve.low) columns.push(spread(curve, curve.high), spread(curve, curve.low));
      if (smooth) columns.push(spread(curve, curve.mean));
      columns.push(spread(curve, smooth ? smoothed(curve.mean, this.shared.smooth) : curve.mean));
    }
    return [x, ...columns];
  }

  stacked(entries, length, spread) {
    let below = new Array(length).fill(0);
    return entries.map(({ curve }) => {
      const own = spread(curve, curve.mean);
      below = below.map((sum, index) => sum + (own[index] ?? 0));
      return below;
    });
  }

  // Validation has few values, and each counts.
  smooths(entry) {
    return this.shared.smooth > 0 && this.plot.form === "runs" && !this.plot.exact && !entry.dash;
  }

  shown(value) {
    return this.logarithmic && value <= 0 ? null : value * this.plot.scale;
  }

  // --- uPlot -------------------------------------------------------------------------------------------------------

  options(entries, width) {
    const ink = color("--soft"), faint = color("--fainter");
    const axis = { stroke: ink, grid: { stroke: faint, width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const { shared } = this;
    return {
      width, height: HEIGHT, legend: { show: false }, padding: [8, 10, 0, 0],
      scales: {
        x: { time: false, range: () => shared.window ?? shared.extent },
        y: { distr: this.logarithmic ? 3 : 1, range: (_, low, high) => this.range(low, high) },
      },
      axes: [
        { ...axis, size: 26, gap: 4, space: 64, ...(shared.axis === "time" ? { incrs: TIMES } : {}),
          values: (_, values) => values.map((value) => (shared.axis === "time" ? short(value) : number(value, 5))) },
        { ...axis, gap: 4, space: 28, ...(this.logarithmic ? { splits: (_, axis, low, high) => decades(low, high) } : {}),
          values: (_, values) => values.map((value) => (value == null ? "" : number(value))),
          size: (_, values) => 12 + 6.3 * Math.max(2, ...(values ?? []).map((text) => text.length)) },
      ],
      series: [{}, ...this.lines(entries)],
      bands: this.bands(entries),
      cursor: {
        drag: { x: true, y: false, setScale: false }, sync: { key: "runs" }, points: { size: 6 }, y: false,
        bind: { dblclick: () => () => shared.zoom(null) },
      },
      hooks: {
        setSelect: [(chart) => this.selected(chart)],
        setCursor: [(chart) => { if (chart.cursor.event && this.node.contains(chart.cursor.event.target)) this.showTip(); }],
        draw: [(chart) => this.mark(chart)],
      },
    };
  }

  lines(entries) {
    const hidden = { stroke: "transparent", width: 0, points: { show: false }, spanGaps: true };
    if (this.plot.form === "stack") {
      return entries.map((entry, index) => ({
        stroke: entry.color, width: 1, fill: index ? undefined : faded(entry.color, 0.55), points: { show: false },
        spanGaps: true,
      }));
    }
    return entries.flatMap((entry) => {
      const few = entry.curve.x.length < 40;
      const line = {
        stroke: entry.color, width: entry.dash ? 1.75 : 1.5, dash: entry.dash ? [5, 3] : undefined, spanGaps: true,
        points: { show: few && (entry.dash || entry.curve.x.length < 3), size: 5, fill: entry.color, stroke: entry.color },
      };
      const raw = { ...hidden, stroke: faded(entry.color, 0.3), width: 1 };
      return [...(entry.curve.low ? [hidden, hidden] : []), ...(this.smooths(entry) ? [raw] : []), line];
    });
  }

  bands(entries) {
    if (this.plot.form === "stack") {
      return entries.slice(1).map((entry, index) => ({ series: [index + 2, index + 1], fill: faded(entry.color, 0.55) }));
    }
    const found = [];
    let at = 1;
    for (const entry of entries) {
      if (entry.curve.low) found.push({ series: [at, at + 1], fill: faded(entry.color, 0.16) });
      at += (entry.curve.low ? 2 : 0) + (this.smooths(entry) ? 1 : 0) + 1;
    }
    return found;
  }

  range(low, high) {
    if (low == null || high == null) return this.logarithmic ? [0.1, 1] : [0, 1];
    if (this.logarithmic) {
      if (low === high) return [low / 2, high * 2];
      const more = (high / low) ** 0.06;
      return [low / more, high * more];
    }
    if (this.plot.from_zero && low >= 0) return [0, high > 0 ? high * 1.08 : 1];
    const more = high === low ? Math.abs(high) * 0.1 || 1 : (high - low) * 0.07;
    return [low - more, high + more];
  }

  // What happened in the focused run: a line where it did.
  mark(chart) {
    const { ctx } = chart, { left, top, width, height } = chart.bbox;
    ctx.save();
    ctx.lineWidth = devicePixelRatio;
    for (const { x, kind } of this.shared.marks()) {
      const at = chart.valToPos(x, "x", true);
      if (!(at >= left && at <= left + width)) continue;
      ctx.strokeStyle = color(kind === "checkpoint" ? "--soft" : kind === "bad" ? "--bad" : "--warn");
      ctx.setLineDash(kind === "checkpoint" ? [] : [3 * devicePixelRatio, 3 * devicePixelRatio]);
      ctx.beginPath();
      ctx.moveTo(at, kind === "checkpoint" ? top + height - 5 * devicePixelRatio : top);
      ctx.lineTo(at, top + height);
      ctx.stroke();
    }
    ctx.restore();
  }

  legend(entries) {
    const runs = this.plot.form === "runs";
    const seen = new Map();
    for (const entry of entries) if (entry.label && !seen.has(entry.label)) seen.set(entry.label, entry);
    const several = seen.size > 1 || !runs;
    this.keys.replaceChildren(...(several ? [...seen.values()].map((entry) => {
      const stroke = runs ? "currentColor" : entry.color;
      return element("span", {}, sample(stroke, entry.dash, this.plot.form === "stack"), entry.label);
    }) : []));
  }

  // --- pointer and keys --------------------------------------------------------------------------------------------

  selected(chart) {
    const { left, width } = chart.select;
    if (width > 4) this.shared.zoom([chart.posToVal(left, "x"), chart.posToVal(left + width, "x")]);
    if (width) chart.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  }

  showTip() {
    const { chart, shared } = this;
    const x = chart.data[0][chart.cursor.idx];
    if (x == null) return this.hideTip();
    const rows = this.values(x);
    const named = new Set(this.entries.map((entry) => entry.run)).size > 1;
    const lines = rows.slice(0, 12).map(({ entry, value }) => {
      const dot = element("span", { class: "dot" });
      dot.style.setProperty("--color", entry.color);
      const label = [named && entry.run, entry.label].filter(Boolean).join(" · ");
      return element("div", {}, dot, element("span", { class: "label" }, label), element("span", { class: "value" }, number(value)));
    });
    const more = rows.length > 12 ? element("div", {}, `and ${rows.length - 12} more`) : null;
    this.tip.replaceChildren(element("b", {}, at(shared.axis, x)), ...lines, ...(more ? [more] : []));
    this.tip.hidden = false;
    const left = chart.valToPos(x, "x") + chart.over.offsetLeft + 8;
    const flip = left + 20 + this.tip.offsetWidth > this.node.clientWidth;
    const start = flip ? left - this.tip.offsetWidth - 12 : left + 16;
    this.tip.style.left = `${Math.max(2, Math.min(start, this.node.clientWidth - this.tip.offsetWidth - 2))}px`;
    this.tip.style.top = `${this.canvas.offsetTop + 6}px`;
    return rows;
  }

  hideTip() {
    this.tip.hidden = true;
  }

  // Of each curve the value at x, or the last one before it.
  values(x) {
    return this.entries.flatMap((entry) => {
      const { curve } = entry;
      const index = lastAt(curve.x, x);
      if (index < 0) return [];
      return [{ entry, value: curve.mean[index] * this.plot.scale }];
    });
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.chart || event.target !== this.node) return;
    const { chart, shared } = this;
    const [from, to] = shared.window ?? shared.extent;
    const xs = chart.data[0];
    const here = chart.cursor.idx ?? xs.length - 1;
    const zoomed = (factor) => {
      const middle = xs[here] ?? (from + to) / 2;
      const low = middle - (middle - from) * factor, high = middle + (to - middle) * factor;
      const whole = low <= shared.extent[0] && high >= shared.extent[1];
      shared.zoom(whole ? null : [Math.max(low, shared.extent[0]), Math.min(high, shared.extent[1])]);
    };
    const actions = {
      ArrowLeft: () => this.move(here - (event.shiftKey ? 10 : 1)), ArrowRight: () => this.move(here + (event.shiftKey ? 10 : 1)),
      Home: () => this.move(0), End: () => this.move(xs.length - 1),
      "+": () => zoomed(0.5), "=": () => zoomed(0.5), "-": () => zoomed(2), 0: () => shared.zoom(null),
      Escape: () => { this.hideTip(); shared.zoom(null); }, l: () => this.toggleLog(),
    };
    if (actions[event.key]) {
      event.preventDefault();
      actions[event.key]();
    }
  }

  move(index) {
    const xs = this.chart.data[0];
    if (!xs.length) return;
    const x = xs[Math.max(0, Math.min(xs.length - 1, index))];
    this.chart.setCursor({ left: this.chart.valToPos(x, "x"), top: 10 });
    const rows = this.showTip() ?? [];
    const said = rows.slice(0, 6).map(({ entry, value }) => `${entry.run} ${entry.label} ${number(value)}`);
    this.read.textContent = `${at(this.shared.axis, x)}: ${said.join(", ")}`;
  }

  toggleLog() {
    this.logarithmic = !this.logarithmic;
    this.log.setAttribute("aria-pressed", String(this.logarithmic));
    this.draw(this.entries);
  }
}

// The tail of a curve takes the place of what is known from its first point on.
export function joined(known, tail) {
  if (!known || !tail.x.length) return known ?? tail;
  let keep = known.x.length;
  while (keep && known.x[keep - 1] >= tail.x[0]) keep--;
  const made = { x: known.x.slice(0, keep).concat(tail.x), mean: known.mean.slice(0, keep).concat(tail.mean) };
  if (known.low || tail.low) {
    made.low = (known.low ?? known.mean).slice(0, keep).concat(tail.low ?? tail.mean);
    made.high = (known.high ?? known.mean).slice(0, keep).concat(tail.high ?? tail.mean);
  }
  return made;
}

const at = (axis, x) => (axis === "step" ? `step ${place(axis, x)}` : axis === "tokens" ? `${place(axis, x)} tokens` : place(axis, x));
const short = (seconds) => duration(seconds).replaceAll(" ", " ").replace(/(\d) (s|min|h|d)/g, "$1$2");

function lastAt(xs, x) {
  let low = 0, high = xs.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

// All different numbers of some ascending lists, ascending.
function merged(lists) {
  const all = new Set();
  for (const list of lists) for (const value of list) all.add(value);
  return [...all].sort((a, b) => a - b);
}

// Exponential moving average that starts unbiased.
function smoothed(values, weight) {
  let sum = 0, norm = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

// 1, 2 and 5 times powers of ten, or powers of ten alone where these are many.
function decades(low, high) {
  const found = [];
  const steps = Math.log10(high / low) > 2.5 ? [1] : [1, 2, 5];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const step of steps) {
      const value = Number((step * 10 ** power).toPrecision(3));
      if (value >= low && value <= high) found.push(value);
    }
  }
  return found;
}

function faded(hex, alpha) {
  return hex + Math.round(alpha * 255).toString(16).padStart(2, "0");
}

function sample(stroke, dash, filled) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 18 8");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS("http://www.w3.org/2000/svg", filled ? "rect" : "path");
  const attributes = filled ? { x: 4, width: 9, height: 8, rx: 1, fill: stroke }
    : { d: "M0 4h18", stroke, "stroke-width": 2, "stroke-dasharray": dash ? "5 3" : "none" };
  for (const [name, value] of Object.entries(attributes)) line.setAttribute(name, value);
  svg.append(line);
  return svg;
}
