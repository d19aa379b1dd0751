// Numbers, times and elements. Text always goes in as text, never as HTML.

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

// 4 significant digits, with k, M, G, T from 10,000 on and powers of ten below 0.001.
export function number(value, digits = 4) {
  if (value == null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(Math.min(2, digits - 1)).replace(/\.?0+e/, "e");
  for (const [unit, sign] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit && size >= 1e4) return trimmed(value / unit, Math.min(3, digits)) + sign;
  }
  return trimmed(value, digits);
}

function trimmed(value, digits) {
  const text = value.toPrecision(digits);
  if (text.includes("e")) return String(Math.round(value));
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

export const whole = (value) => Math.round(value).toLocaleString("en-US");

export function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 60) return Number.isInteger(seconds) || seconds >= 10 ? `${s} s` : `${trimmed(seconds, 2)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min${s % 60 ? ` ${s % 60} s` : ""}`;
  const minutes = Math.round(s / 60);
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h${minutes % 60 ? ` ${minutes % 60} min` : ""}`;
  return `${trimmed(minutes / 1440, 3)} d`;
}

export function clock(seconds) {
  const at = new Date(seconds * 1000);
  const two = (n) => String(n).padStart(2, "0");
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ` +
    `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
}

export const place = (axis, value) => (axis === "time" ? duration(value) : axis === "step" ? whole(value) : number(value));

export const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
