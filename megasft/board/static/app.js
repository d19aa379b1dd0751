// The page: which runs and which view are shown, and what is new since the last look.
import { Chart, joined } from "./charts.js";
import { Experts, Settings, Events, showAnswers, severity } from "./panels.js";
import { element, number, whole, duration, color } from "./format.js";

const SECONDS_BETWEEN = 2;
const COLORS = 10;
const BAND_RUNS = 3; // up to so many runs, the lowest and highest values are drawn behind the means
const byId = (id) => document.getElementById(id);

const state = {
  runs: [], hidden: new Set(), focus: null, axis: "step", smooth: 0, window: null, tab: "curves",
  details: new Map(), colors: new Map(), filter: "",
};
const charts = new Map(); // plot id -> Chart
const visible = new Set(); // charts on the screen
let plots = [];

const shared = {
  get axis() { return state.axis; },
  get window() { return state.window; },
  get smooth() { return state.smooth; },
  get extent() { return extent(); },
  zoom: (range) => { state.window = range; byId("reset").hidden = !range; redraw(); refresh(); },
  marks,
};

const tabs = {
  experts: new Experts(byId("experts"), (id, frame) => get("/api/experts", { id, ...(frame == null ? {} : { frame }) })),
  settings: new Settings(byId("settings")),
  events: new Events(byId("events")),
};

async function get(path, parameters = {}) {
  const query = new URLSearchParams(parameters).toString();
  const answer = await fetch(query ? `${path}?${query}` : path);
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

const shownRuns = () => state.runs.filter((run) => !state.hidden.has(run.id));
const focused = () => state.runs.find((run) => run.id === state.focus) ?? null;

// From the lowest to the highest place of any run that is shown.
function extent() {
  const found = shownRuns().map((run) => run.extents[state.axis]).filter(Boolean);
  const low = Math.min(...found.map((range) => range[0])), high = Math.max(...found.map((range) => range[1]));
  return high > low ? [low, high] : found.length ? [low - 1, low + 1] : [0, 1];
}

function colorOf(run) {
  if (!state.colors.has(run.id)) state.colors.set(run.id, state.colors.size);
  return color(`--c${state.colors.get(run.id) % COLORS}`);
}

// --- the loop ------------------------------------------------------------------------------------------------------

let busy = false, again = false;

// Bring the view up to date; calls while it runs are done together after it.
async function refresh() {
  again = true;
  if (busy) return;
  busy = true;
  try {
    while (again) {
      again = false;
      if (state.tab === "curves") await refreshCurves();
      else await refreshPanel();
    }
  } catch {
    lost(true); // the next look at the runs tells whether it is over
  } finally {
    busy = false;
  }
}

async function look() {
  try {
    const found = await get("/api/runs");
    lost(false);
    takeRuns(found);
    await refresh();
  } catch {
    lost(true);
  }
  setTimeout(() => (document.hidden ? document.addEventListener("visibilitychange", look, { once: true }) : look()), SECONDS_BETWEEN * 1000);
}

function lost(yes) {
  const live = byId("live");
  const running = state.runs.filter((run) => run.state === "running").length;
  live.className = yes ? "lost" : running ? "running" : "";
  const text = yes ? "no connection" : running ? `${running} running` : "nothing runs";
  if (live.textContent !== text) live.textContent = text;
}

function takeRuns({ runs, folders }) {
  state.runs = runs;
  for (const run of runs) colorOf(run);
  if (!focused()) state.focus = (runs.find((run) => run.state === "running") ?? runs.at(-1))?.id ?? null;
  for (const id of state.details.keys()) if (!runs.some((run) => run.id === id)) state.details.delete(id);
  const empty = byId("empty");
  empty.hidden = runs.length > 0;
  empty.textContent = `No run yet in ${folders.join(", ")}. Start one with "megasft train --config run.toml"; it will show up here.`;
  document.title = runs.length === 1 ? `${runs[0].name} · megasft` : "megasft";
  drawRuns();
  lost(false);
}

// --- the list of runs ----------------------------------------------------------------------------------------------

const lines = new Map(); // run id -> its elements

function drawRuns() {
  const list = byId("runs");
  for (const [id, line] of lines) if (!state.runs.some((run) => run.id === id)) { line.node.remove(); lines.delete(id); }
  state.runs.forEach((run, index) => {
    if (!lines.has(run.id)) lines.set(run.id, line(run));
    const { node } = lines.get(run.id);
    if (list.children[index] !== node) list.insertBefore(node, list.children[index] ?? null);
    fillLine(run, lines.get(run.id));
  });
  const shown = shownRuns().length;
  byId("runs-count").textContent = state.runs.length ? `${shown} of ${state.runs.length} shown` : "";
  byId("runs-tools").hidden = state.runs.length < 2;
}

function line(run) {
  const box = element("input", { type: "checkbox", "aria-label": `Show ${run.name}`, onchange: () => {
    if (box.checked) state.hidden.delete(run.id); else state.hidden.add(run.id);
    changed();
  } });
  const label = element("span"), stateText = element("span", { class: "state" });
  const name = element("button", { type: "button", class: "name", title: "Show this run's own panels", onclick: () => {
    state.focus = run.id;
    state.hidden.delete(run.id);
    changed();
  } }, label, stateText);
  const facts = element("div", { class: "facts" });
  const progress = element("progress", { max: 1, value: 0, "aria-label": `Progress of ${run.name}` });
  return { node: element("li", { class: "run" }, box, name, progress, facts), box, name, label, stateText, facts, progress };
}

function fillLine(run, parts) {
  parts.node.style.setProperty("--color", colorOf(run));
  parts.node.classList.toggle("focused", run.id === state.focus);
  parts.node.hidden = !run.name.toLowerCase().includes(state.filter);
  parts.name.setAttribute("aria-current", String(run.id === state.focus));
  parts.box.checked = !state.hidden.has(run.id);
  set(parts.label, run.name);
  parts.stateText.className = `state ${run.state}`;
  set(parts.stateText, run.state);
  parts.progress.value = run.steps ? Math.min(1, run.step / run.steps) : 0;
  parts.progress.hidden = !run.steps || run.state === "finished";
  const facts = factsOf(run);
  if (parts.facts.textContent !== facts.join("")) parts.facts.replaceChildren(...facts.map((text) => element("span", {}, text)));
}

function set(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function factsOf(run) {
  const { last } = run;
  const facts = [run.step ? `step ${whole(run.step)}${run.steps ? ` / ${whole(run.steps)}` : ""}` : "no step yet"];
  if (last["train.loss"] != null) facts.push(`loss ${number(last["train.loss"])}`);
  if (run.lowest) facts.push(`validation ${number(run.lowest[0])} at ${whole(run.lowest[1])}`);
  if (last["train.tokens_per_second"] != null) facts.push(`${number(last["train.tokens_per_second"])} tok/s`);
  if (last["train.mfu"] != null) facts.push(`MFU ${number(100 * last["train.mfu"], 3)}%`);
  const left = run.state === "running" && run.steps && run.step ? (run.ended - run.started) / run.step * (run.steps - run.step) : 0;
  if (left > 0) facts.push(`${duration(left)} left`);
  if (run.read < 1) facts.push(`${Math.floor(100 * run.read)}% read`);
  return facts;
}

// --- curves --------------------------------------------------------------------------------------------------------

const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const chart = charts.get(target.dataset.plot);
    if (chart) visible[isIntersecting ? "add" : "delete"](chart);
  }
  refresh();
}, { rootMargin: "300px" });

const resizer = new ResizeObserver(() => { for (const chart of charts.values()) chart.resize(); });

// Make the charts that a shown run has data for, in their groups.
function layOut() {
  const runs = shownRuns();
  const wanted = plots.filter((plot) => (plot.form === "runs" ? runs : [focused()]).some((run) => run?.plots.includes(plot.id)));
  const key = wanted.map((plot) => plot.id).join() + `|${focused()?.name}`;
  if (byId("plots").dataset.key === key) return;
  byId("plots").dataset.key = key;
  for (const [id, chart] of charts) {
    if (!wanted.some((plot) => plot.id === id)) {
      watcher.unobserve(chart.node);
      visible.delete(chart);
      chart.destroy();
      charts.delete(id);
    }
  }
  const groups = Map.groupBy ? Map.groupBy(wanted, (plot) => plot.group) : grouped(wanted);
  byId("plots").replaceChildren(...[...groups].flatMap(([name, members]) => [
    element("h2", {}, name), element("div", { class: "grid" }, ...members.map((plot) => {
      if (!charts.has(plot.id)) {
        const chart = new Chart(plot, shared);
        chart.node.dataset.plot = plot.id;
        charts.set(plot.id, chart);
        watcher.observe(chart.node);
      }
      return charts.get(plot.id).node;
    }))]));
  for (const chart of charts.values()) chart.owner(chart.plot.form === "runs" || state.runs.length < 2 ? "" : focused()?.name ?? "");
}

function grouped(wanted) {
  const found = new Map();
  for (const plot of wanted) found.set(plot.group, [...(found.get(plot.group) ?? []), plot]);
  return found;
}

async function refreshCurves() {
  layOut();
  await refreshDetails([focused()]);
  const own = [...visible].filter((chart) => chart.plot.form !== "runs");
  const common = [...visible].filter((chart) => chart.plot.form === "runs");
  await load(common, shownRuns());
  if (own.length && focused()) await load(own, [focused()]);
}

const signature = () => JSON.stringify([state.axis, state.window, points(), shownRuns().length <= BAND_RUNS]);
const points = () => (shownRuns().length > 6 ? 240 : 480);

// Bring some charts up to date with some runs: what is known goes on from its end, the rest comes as a whole.
async function load(members, runs) {
  const mine = signature();
  const fits = (chart, run) => {
    const known = chart.cache.get(run.id);
    return known && known.signature === mine && known.version[0] === run.version[0];
  };
  const known = members.filter((chart) => runs.every((run) => fits(chart, run)));
  const changed = runs.filter((run) => known.some((chart) => chart.cache.get(run.id).version[1] !== run.version[1]));
  if (known.length && changed.length) await ask(known, runs, mine, changed);
  const fresh = members.filter((chart) => !known.includes(chart));
  if (fresh.length && runs.length) await ask(fresh, runs, mine, []);
  for (const chart of members) drawChart(chart, runs);
}

async function ask(members, runs, mine, changed) {
  const tail = changed.length > 0;
  const place = (run) => {
    const first = members[0].cache.get(run.id);
    const after = Math.min(...members.map((chart) => chart.cache.get(run.id).after));
    return `${run.id}:${first.version[0]}:${Number.isFinite(after) ? after : ""}`;
  };
  const [from, to] = state.window ?? [];
  const width = tail ? members[0].width : undefined;
  const parameters = {
    plots: members.map((chart) => chart.plot.id), runs: runs.map((run) => (tail ? place(run) : run.id)),
    axis: state.axis, points: points(), bands: runs.length <= BAND_RUNS ? 1 : 0, ...(state.window ? { from, to } : {}), ...(width != null ? { width } : {}),
  };
  const found = await get("/api/curves", parameters);
  if (mine !== signature()) return; // asked again meanwhile
  for (const chart of members) {
    chart.width = found.width;
    for (const [id, part] of Object.entries(found.runs)) {
      const before = part.tail ? chart.cache.get(id) : null;
      const curves = part.plots[chart.plot.id] ?? {};
      const all = before ? { ...before.curves } : {};
      for (const [key, curve] of Object.entries(curves)) all[key] = before ? joined(all[key], curve) : curve;
      const ends = Object.values(all).map((curve) => curve.x.at(-1) ?? -Infinity);
      chart.cache.set(id, { version: part.version, signature: mine, curves: all, after: Math.max(-Infinity, ...ends) });
    }
  }
}

function drawChart(chart, runs) {
  const { plot } = chart;
  const entries = [];
  for (const run of runs) {
    const { curves } = chart.cache.get(run.id) ?? { curves: {} };
    keysOf(plot, curves).forEach(([key, label], index) => {
      const curve = curves[key];
      if (!curve.x.length) return;
      const shade = plot.form === "runs" ? colorOf(run) : color(`--c${index % COLORS}`);
      const band = curve.low && runs.length <= BAND_RUNS && plot.form === "runs";
      entries.push({ color: shade, run: run.name, label, dash: plot.form === "runs" && index > 0, curve: band ? curve : { x: curve.x, mean: curve.mean } });
    });
  }
  chart.draw(entries);
}

function keysOf(plot, curves) {
  return Object.entries(plot.keys).flatMap(([key, label]) => (key.endsWith(".")
    ? Object.keys(curves).filter((name) => name.startsWith(key)).map((name) => [name, name.slice(key.length)])
    : key in curves ? [[key, label]] : []));
}

function redraw() {
  for (const chart of visible) drawChart(chart, chart.plot.form === "runs" ? shownRuns() : [focused()].filter(Boolean));
}

// Where something happened in the focused run, on the axis that is shown.
function marks() {
  const run = focused(), details = state.details.get(state.focus);
  if (!run || !details || state.axis === "tokens") return [];
  return details.events.slice(-200).map((event) => ({ x: state.axis === "step" ? event.step : event.time - run.started, kind: severity(event.event) }))
    .filter(({ kind }) => kind !== "quiet");
}

// --- the other views -----------------------------------------------------------------------------------------------

async function refreshDetails(runs) {
  for (const run of runs.filter(Boolean)) {
    const known = state.details.get(run.id);
    const key = `${run.version[0]}:${run.noted}:${run.answers}:${run.state}`;
    if (known?.key !== key) state.details.set(run.id, { ...await get("/api/run", { id: run.id }), key });
  }
}

async function refreshPanel() {
  if (state.tab === "experts") return tabs.experts.show(focused());
  const runs = state.tab === "answers" ? [focused()].filter(Boolean) : shownRuns();
  await refreshDetails(runs);
  const described = runs.map((run) => ({ name: run.name, color: colorOf(run), details: state.details.get(run.id) }));
  const key = JSON.stringify([state.tab, document.documentElement.dataset.theme, described.map((run) => [run.name, run.details.key])]);
  const section = byId(state.tab);
  if (section.dataset.key === key) return; // a view that is being read does not move
  section.dataset.key = key;
  if (state.tab === "answers") showAnswers(section, described[0]);
  else tabs[state.tab].show(described);
}

// --- controls ------------------------------------------------------------------------------------------------------

function changed() {
  remember();
  drawRuns();
  redraw();
  refresh();
}

function choose(tab) {
  state.tab = tab;
  for (const button of document.querySelectorAll('[role="tab"]')) {
    const mine = button.id === `tab-${tab}`;
    button.setAttribute("aria-selected", String(mine));
    button.tabIndex = mine ? 0 : -1;
    byId(button.getAttribute("aria-controls")).hidden = !mine;
  }
  remember();
  refresh();
}

function remember() {
  const { tab, axis, smooth, hidden, focus } = state;
  history.replaceState(null, "", `#${new URLSearchParams({ tab, axis, smooth, focus: focus ?? "", hidden: [...hidden].join(",") })}`);
}

function recall() {
  const saved = new URLSearchParams(location.hash.slice(1));
  if (["step", "tokens", "time"].includes(saved.get("axis"))) state.axis = saved.get("axis");
  state.smooth = Math.min(0.98, Math.max(0, Number(saved.get("smooth")) || 0));
  state.focus = saved.get("focus") || null;
  state.hidden = new Set((saved.get("hidden") ?? "").split(",").filter(Boolean));
  document.querySelector(`input[name="axis"][value="${state.axis}"]`).checked = true;
  byId("smooth").value = state.smooth;
  showSmooth();
  return ["curves", "experts", "settings", "events", "answers"].includes(saved.get("tab")) ? saved.get("tab") : "curves";
}

const showSmooth = () => { byId("smooth-value").textContent = state.smooth ? state.smooth.toFixed(2) : "off"; };

const THEMES = { auto: "dark", dark: "light", light: "auto" };
const preferred = matchMedia("(prefers-color-scheme: dark)");

function theme(name) {
  try { localStorage.setItem("theme", name); } catch { /* no storage: the choice lasts as long as the page */ }
  document.documentElement.dataset.theme = name === "auto" ? (preferred.matches ? "dark" : "light") : name;
  byId("theme").textContent = `theme: ${name}`;
  byId("theme").dataset.name = name;
  redraw();
  tabs.experts.paint?.();
  drawRuns();
}

function listen() {
  const buttons = [...document.querySelectorAll('[role="tab"]')];
  buttons.forEach((button, index) => {
    button.addEventListener("click", () => choose(button.id.slice(4)));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = buttons[(index + step + buttons.length) % buttons.length];
      next.focus();
      choose(next.id.slice(4));
    });
  });
  for (const input of document.querySelectorAll('input[name="axis"]')) {
    input.addEventListener("change", () => { state.axis = input.value; state.window = null; byId("reset").hidden = true; changed(); });
  }
  byId("smooth").addEventListener("input", () => { state.smooth = Number(byId("smooth").value); showSmooth(); redraw(); });
  byId("smooth").addEventListener("change", remember);
  byId("reset").addEventListener("click", () => shared.zoom(null));
  byId("filter").addEventListener("input", () => { state.filter = byId("filter").value.toLowerCase(); drawRuns(); });
  byId("show-all").addEventListener("click", () => { state.hidden.clear(); changed(); });
  byId("show-one").addEventListener("click", () => {
    state.hidden = new Set(state.runs.map((run) => run.id).filter((id) => id !== state.focus));
    changed();
  });
  byId("theme").addEventListener("click", () => theme(THEMES[byId("theme").dataset.name]));
  preferred.addEventListener("change", () => theme(byId("theme").dataset.name));
  resizer.observe(byId("plots"));
}

async function begin() {
  if (innerWidth <= 760) byId("runs-box").open = false;
  const tab = recall();
  listen();
  let chosen = "auto";
  try { chosen = localStorage.getItem("theme") ?? "auto"; } catch { /* no storage */ }
  theme(THEMES[chosen] ? chosen : "auto");
  try { plots = await get("/api/plots"); } catch { return lost(true); }
  choose(tab);
  look();
}

begin();
