// The views beside the curves: experts, settings, events, answers.
import { element, number, whole, clock, color } from "./format.js";

const BAD = /fail|skip|spike|stop|nan/i;
const QUIET = /checkpoint$|resumed|best$/i;
export const severity = (name) => (name === "checkpoint" ? "checkpoint" : QUIET.test(name) ? "quiet" : BAD.test(name) ? "bad" : "warn");
const note = (text) => element("p", { class: "note" }, text);

// --- experts -------------------------------------------------------------------------------------------------------

export class Experts {
  constructor(section, load) {
    this.section = section;
    this.load = load; // (run id, frame) -> {steps, step, tokens}
    this.frame = null; // null: the newest
    this.version = 0;
  }

  async show(run) {
    if (!run || !run.frames) {
      this.run = null;
      return this.section.replaceChildren(note(run ? `${run.name} has no expert loads yet: they come every [logging] experts_every_steps.` : "No run is selected."));
    }
    if (this.run?.id !== run.id) {
      this.frame = null;
      this.build(run);
    }
    this.run = run;
    await this.update();
  }

  build(run) {
    this.slider = element("input", { type: "range", min: 0, max: 0, step: 1, "aria-label": "Step", oninput: () => {
      const last = Number(this.slider.value) === Number(this.slider.max);
      this.frame = last ? null : Number(this.slider.value);
      this.update();
    } });
    this.step = element("output");
    this.value = element("span", { class: "hint", "aria-live": "polite" });
    this.canvas = element("canvas", { tabindex: "0", role: "img", onmousemove: (event) => this.point(event),
      onmouseleave: () => this.tell() });
    this.bottom = element("span");
    this.layers = element("div", { class: "y" }, element("span", {}, "0"), element("span", {}, "layer"), this.bottom);
    this.first = element("span"), this.last = element("span");
    this.section.replaceChildren(
      element("h2", {}, "Tokens of each expert ", element("span", { class: "of" }, `in ${run.name}`)),
      element("div", { class: "heat" },
        element("div", { class: "bar" }, element("label", { class: "slider" }, "step ", this.slider, this.step),
          element("span", { class: "scale" }, "no token", element("i"), "2 × the mean or more"), this.value),
        element("div", { class: "heat-body" }, this.layers, this.canvas,
          element("div", { class: "x" }, this.first, element("span", {}, "expert"), this.last))));
  }

  async update() {
    const asked = ++this.version;
    const found = await this.load(this.run.id, this.frame);
    if (asked !== this.version || !found.tokens.length) return;
    this.slider.max = found.steps.length - 1;
    this.slider.value = this.frame ?? found.steps.length - 1;
    this.step.textContent = whole(found.step);
    this.tokens = found.tokens;
    this.paint();
    this.tell();
  }

  paint() {
    if (!this.tokens) return;
    const { tokens, canvas } = this;
    const layers = tokens.length, experts = tokens[0].length;
    canvas.width = experts;
    canvas.height = layers;
    canvas.style.height = `${Math.max(120, Math.min(620, layers * 12))}px`;
    const [low, even, high] = ["--low", "--even", "--high"].map((name) => rgb(color(name)));
    const context = canvas.getContext("2d");
    const image = context.createImageData(experts, layers);
    tokens.forEach((layer, row) => {
      const mean = layer.reduce((a, b) => a + b, 0) / experts || 1;
      layer.forEach((count, column) => {
        const load = Math.min(2, count / mean);
        const [from, to, share] = load < 1 ? [low, even, load] : [even, high, load - 1];
        const offset = 4 * (row * experts + column);
        for (let i = 0; i < 3; i++) image.data[offset + i] = from[i] + (to[i] - from[i]) * share;
        image.data[offset + 3] = 255;
      });
    });
    context.putImageData(image, 0, 0);
    this.first.textContent = "0";
    this.last.textContent = String(experts - 1);
    this.bottom.textContent = String(layers - 1);
    canvas.setAttribute("aria-label", this.summary());
  }

  summary() {
    let idle = 0, worst = [0, 0, 0];
    this.tokens.forEach((layer, row) => {
      const mean = layer.reduce((a, b) => a + b, 0) / layer.length || 1;
      layer.forEach((count, column) => {
        idle += count === 0;
        if (count / mean > worst[0]) worst = [count / mean, row, column];
      });
    });
    return `busiest: layer ${worst[1]}, expert ${worst[2]}, ${number(worst[0], 3)} × the mean; ` +
      `${idle} of ${this.tokens.length * this.tokens[0].length} without a token`;
  }

  tell() {
    this.value.textContent = this.tokens ? this.summary() : "";
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / box.height * this.canvas.height);
    const column = Math.floor((event.clientX - box.left) / box.width * this.canvas.width);
    const layer = this.tokens?.[row];
    if (!layer || layer[column] == null) return this.tell();
    const mean = layer.reduce((a, b) => a + b, 0) / layer.length || 1;
    this.value.textContent = `layer ${row}, expert ${column}: ${whole(layer[column])} tokens, ${number(layer[column] / mean, 3)} × the mean`;
  }
}

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

// --- settings ------------------------------------------------------------------------------------------------------

export class Settings {
  constructor(section) {
    this.section = section;
    this.only = true;
    this.words = "";
  }

  // runs: [{name, color, details: {config, about}}]
  show(runs) {
    this.runs = runs;
    if (!runs.length) return this.section.replaceChildren(note("No run is selected."));
    if (!this.table?.isConnected) {
      this.table = element("div", { class: "scroll" });
      this.box = element("input", { type: "checkbox", checked: this.only, onchange: () => { this.only = this.box.checked; this.fill(); } });
      this.boxLabel = element("label", {}, this.box, " only what differs");
      this.find = element("input", { type: "search", placeholder: "Filter by key or value", "aria-label": "Filter settings",
        oninput: () => { this.words = this.find.value.toLowerCase(); this.fill(); } });
      this.section.replaceChildren(element("div", { class: "bar" }, this.find, this.boxLabel), this.table);
    }
    this.fill();
  }

  fill() {
    const { runs } = this;
    const several = runs.length > 1;
    this.boxLabel.hidden = !several;
    const columns = runs.map(({ details }) => new Map([...details.config, ...details.about]));
    const keys = [...new Set(columns.flatMap((column) => [...column.keys()]))];
    const rows = keys.map((key) => [key, columns.map((column) => column.get(key))])
      .map(([key, values]) => [key, values, several && new Set(values).size > 1])
      .filter(([, , differs]) => differs || !several || !this.only)
      .filter(([key, values]) => [key, ...values].some((text) => text?.toLowerCase().includes(this.words)));
    if (!rows.length) {
      return this.table.replaceChildren(note(this.words ? "Nothing matches the filter." : several ? "These runs have the same settings." : "This run has no config.toml."));
    }
    const head = element("tr", {}, element("th", { scope: "col" }, "key"), ...runs.map((run) => {
      const dot = element("span", { class: "dot" });
      dot.style.setProperty("--color", run.color);
      dot.style.display = "inline-block";
      return element("th", { scope: "col" }, dot, ` ${run.name}`);
    }));
    this.table.replaceChildren(element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows.map(
      ([key, values, differs]) => element("tr", {}, element("td", { class: "key" }, key), ...values.map((value) =>
        element("td", { class: `${value == null ? "absent" : "mono"}${differs && value !== values[0] ? " differs" : ""}` }, value ?? "–")))))));
  }
}

// --- events --------------------------------------------------------------------------------------------------------

export class Events {
  constructor(section) {
    this.section = section;
    this.kind = "";
  }

  // runs: as in Settings.
  show(runs) {
    const all = runs.flatMap((run) => run.details.events.map((event) => ({ ...event, run })));
    all.sort((a, b) => b.time - a.time || b.step - a.step);
    const kinds = [...new Set(all.map((event) => event.event))].sort();
    if (!all.length) return this.section.replaceChildren(note(runs.length ? "Nothing has happened yet: checkpoints, skipped steps, restarts and early signs of trouble will be here." : "No run is selected."));
    if (!kinds.includes(this.kind)) this.kind = "";
    const select = element("select", { "aria-label": "Kind of event", onchange: () => { this.kind = select.value; this.show(runs); } },
      element("option", { value: "" }, `all kinds (${all.length})`),
      ...kinds.map((kind) => element("option", { value: kind, selected: kind === this.kind }, `${kind} (${all.filter((event) => event.event === kind).length})`)));
    const focused = document.activeElement?.getAttribute("aria-label") === "Kind of event";
    const rows = all.filter((event) => !this.kind || event.event === this.kind).slice(0, 500).map((event) => {
      const dot = element("span", { class: "dot" });
      dot.style.setProperty("--color", event.run.color);
      dot.style.display = "inline-block";
      const level = severity(event.event);
      return element("tr", {}, element("td", { class: "when" }, clock(event.time)), element("td", { class: "when" }, dot, ` ${event.run.name}`),
        element("td", { class: "number" }, whole(event.step)),
        element("td", {}, element("span", { class: `badge ${level === "checkpoint" ? "quiet" : level}` }, event.event.replaceAll("_", " ") || "event")),
        element("td", {}, event.reason));
    });
    const head = ["time", "run", "step", "event", "what"].map((name) => element("th", { scope: "col" }, name));
    this.section.replaceChildren(element("div", { class: "bar" }, select), element("div", { class: "scroll" },
      element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows))));
    if (focused) select.focus();
  }
}

// --- answers -------------------------------------------------------------------------------------------------------

const NAMES = [["before", "before training"], ["after", "after training"], ["reference", "reference"]];

export function showAnswers(section, run) {
  const answers = run?.details.answers ?? [];
  if (!answers.length) {
    return section.replaceChildren(note(run ? `${run.name} has no answers: a run that ends writes them where [logging] answers is above 0 and there is validation data.` : "No run is selected."));
  }
  section.replaceChildren(element("h2", {}, "Answers to validation prompts ", element("span", { class: "of" }, `of ${run.name}`)),
    ...answers.map((answer) => element("article", { class: "answer" },
      element("div", { class: "prompt" }, element("h3", {}, "prompt"), element("p", {}, answer.prompt ?? "")),
      element("div", { class: "texts" }, ...NAMES.filter(([name]) => answer[name] != null).map(([name, label]) =>
        element("div", { class: "text" }, element("h3", {}, label), element("p", {}, answer[name] || "(empty)")))))));
}
