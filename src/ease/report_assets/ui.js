"use strict";
// What every section is made of: elements, number formats, the tooltip and three small widgets.
// Text from a run only ever becomes a text node.

const build = (space) => (tag, attributes = {}, ...children) => {
  const node = document.createElementNS(space, tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
};
const h = build("http://www.w3.org/1999/xhtml");
const s = build("http://www.w3.org/2000/svg");
const small = (...children) => h("small", {}, ...children);

// ---------------------------------------------------------------------------------------------------------
// Numbers. A figure that is not there is a dash.

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const shown = (format) => (value) => (isNumber(value) ? format(value) : "–");
const digits = (value) => String(parseFloat(value.toPrecision(4)));

const ppl = shown((v) => (v < 100 ? v.toFixed(2) : v < 1e5 ? v.toFixed(1) : v.toExponential(1)));
const percent = shown((v) => (v * 100).toFixed(1) + "%");
const plain = shown(digits);
const fixed = (places) => shown((v) => v.toFixed(places));
const count = shown((v) => v.toLocaleString("en"));
const flops = shown((v) => {
  const prefix = v >= 1 ? Math.min(Math.floor(Math.log10(v) / 3 + 1e-9), 6) : 0;
  return `${parseFloat((v / 1000 ** prefix).toPrecision(3))}\u00a0${["", "K", "M", "G", "T", "P", "E"][prefix]}`.trim();
});
const duration = shown((v) => {
  if (v < 120) return (v < 10 ? v.toFixed(2) : v.toFixed(1)) + "\u00a0s";
  const minutes = Math.round(v / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
});
const change = (before, after) => {
  if (!isNumber(before) || !isNumber(after) || before === 0) return "–";
  const relative = after / before - 1;
  return `${relative < 0 ? "−" : "+"}${Math.abs(relative * 100).toFixed(1)}%`;
};
const thresholds = (list) => (list ?? []).map((t) => (isNumber(t) ? t.toFixed(2) : "–")).join(", ");
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

// ---------------------------------------------------------------------------------------------------------
// One tooltip for the page, kept above what it explains; `box` is a function that says where that is now.

const tip = document.getElementById("tip");

let tipBox = null;

function showTip(content, box) {
  tip.replaceChildren(...content);
  tipBox = box;
  tip.hidden = false;
  placeTip();
}
function placeTip() {
  if (tip.hidden) return;
  const box = tipBox();
  if (box.bottom < 0 || box.top > innerHeight) return hideTip();
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), document.documentElement.clientWidth - width - 8);
  const above = box.top - height - 10;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above > 8 ? above : box.bottom + 10}px`;
}
function hideTip() { tip.hidden = true; }
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
addEventListener("scroll", placeTip, { passive: true, capture: true });

// ---------------------------------------------------------------------------------------------------------
// Widgets

let names = 0;

// Radio buttons for each question; `draw` gets the answers by question and returns what to show under them.
function choices(questions, draw) {
  const answers = {}, under = h("div"), group = `choice-${names++}`;
  const refresh = () => under.replaceChildren(draw(answers));
  const fields = Object.entries(questions).filter(([, options]) => options.length > 0).map(([question, options]) => {
    answers[question] = options[0][0];
    return options.length > 1 && h("fieldset", { class: "choice" }, h("legend", {}, question),
      options.map(([value, label], i) => h("label", {},
        h("input", { type: "radio", name: `${group}-${question}`, value, checked: i === 0,
          onchange: () => { answers[question] = value; refresh(); } }),
        h("span", {}, label))));
  });
  refresh();
  return h("div", {}, h("div", { class: "choices" }, fields), under);
}

// A table that scrolls sideways on a narrow screen. Cells are nodes or text; the first of a row names it. A row
// that is one text heads the rows below it.
function table(caption, head, rows) {
  const cells = (row) => row.map((cell, i) => (i === 0 ? h("th", { scope: "row" }, cell) : h("td", {}, cell)));
  const heading = (text) => h("tr", { class: "group" }, h("th", { scope: "rowgroup", colspan: head.length }, text));
  return h("div", {}, h("p", { class: "caption" }, caption),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, h("table", {},
      h("thead", {}, h("tr", {}, head.map((cell) => h("th", { scope: "col" }, cell)))),
      h("tbody", {}, rows.map((row) => (typeof row === "string" ? heading(row) : h("tr", {}, cells(row))))))));
}

// Shares of tokens by exit, as a stacked bar with its figures in words.
function shareBar(shares, exits) {
  const known = exits.filter((exit) => isNumber(shares?.[exit]));
  if (known.length === 0) return "–";
  const bar = h("div", { class: "shares", "aria-hidden": "true" }, known.map((exit) => {
    const part = h("i", { class: exitColour(exit, exits) });
    part.style.width = `${shares[exit] * 100}%`;
    return part;
  }));
  return [bar, small(known.map((exit, i) => [i > 0 && " · ", `exit ${exit}: ${percent(shares[exit])}`]))];
}

// A figure with a bar behind it whose length is `value / most`.
function barred(value, most, text, colour) {
  if (!isNumber(value)) return "–";
  const bar = h("i", { class: colour });
  bar.style.width = `${Math.min(1, value / most) * 100}%`;
  return h("span", { class: "barred" }, h("span", {}, text), h("span", { class: "track", "aria-hidden": "true" }, bar));
}

// Early exits are cool and late ones warm. There are five colours: with more exits, neighbours share one.
function exitColour(exit, exits) {
  const at = exits.indexOf(Number(exit)), many = exits.length;
  return `exit-${many === 2 ? 2 * at : many <= 5 ? at : Math.floor((at * 5) / many)}`;
}
