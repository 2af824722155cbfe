"use strict";
// Building blocks of all sections: elements, number formats, the tooltip and three small widgets.
// Text from a run only becomes text nodes.

// h("p.note", {id: "x"}, "text", node, [more]) creates <p class="note" id="x">; attributes are optional, and children
// that are null, undefined or false are skipped.
const maker =
  (space) =>
  (name, ...rest) => {
    const [tag, ...classes] = name.split(".");
    const node = document.createElementNS(space, tag);
    if (classes.length > 0) node.setAttribute("class", classes.join(" "));
    const attributes =
      rest.length > 0 && Object.getPrototypeOf(rest[0] ?? "") === Object.prototype ? rest.shift() : {};
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false)
        node.setAttribute(key, value === true ? "" : value);
    }
    node.append(
      ...rest.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
    );
    return node;
  };
const h = maker("http://www.w3.org/1999/xhtml");
const s = maker("http://www.w3.org/2000/svg");

// ---------------------------------------------------------------------------------------------------------
// Numbers. A missing number is a dash; a number and its unit stay on one line.

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const shown = (format) => (value) => (isNumber(value) ? format(value) : "–");

const plain = shown((v) => String(parseFloat(v.toPrecision(4))));
const fixed = (places) => shown((v) => v.toFixed(places));
const count = shown((v) => v.toLocaleString("en"));
const percent = shown((v) => (v * 100).toFixed(1) + "%");
const ppl = shown((v) => (v < 100 ? v.toFixed(2) : v < 1e5 ? v.toFixed(1) : v.toExponential(1)));
const flops = shown((v) => {
  const prefix = v >= 1 ? Math.min(Math.floor(Math.log10(v) / 3 + 1e-9), 6) : 0;
  const scaled = parseFloat((v / 1000 ** prefix).toPrecision(3));
  return `${scaled}\u00a0${" KMGTPE"[prefix]}`.trim();
});
const duration = shown((v) => {
  if (v < 120) return `${v.toFixed(v < 10 ? 2 : 1)}\u00a0s`;
  const minutes = Math.round(v / 60);
  return minutes < 60 ? `${minutes}\u00a0min` : `${Math.floor(minutes / 60)}\u00a0h ${minutes % 60}\u00a0min`;
});
const change = (before, after) => {
  if (!isNumber(before) || !isNumber(after) || before === 0) return "–";
  const relative = after / before - 1;
  return `${relative < 0 ? "−" : "+"}${Math.abs(relative * 100).toFixed(1)}%`;
};
const thresholds = (list) => (list ?? []).map(fixed(2)).join(", ");
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const sentence = (text) => (/[.!?]$/.test(text) ? capital(text) : `${capital(text)}.`);
const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;

// ---------------------------------------------------------------------------------------------------------
// The tooltip of the page, kept above the element it explains; `where` returns that element's current position.

const tip = document.getElementById("tip");
let tipWhere = null;

function showTip(content, where) {
  tip.replaceChildren(...content);
  tipWhere = where;
  tip.hidden = false;
  placeTip();
}
function hideTip() {
  tip.hidden = true;
}
function placeTip() {
  if (tip.hidden) return;
  const box = tipWhere();
  if (box.bottom < 0 || box.top > innerHeight) return hideTip();
  const { width, height } = tip.getBoundingClientRect();
  const rightmost = document.documentElement.clientWidth - width - 8;
  const above = box.top - height - 10;
  tip.style.left = `${Math.max(8, Math.min(box.left + box.width / 2 - width / 2, rightmost))}px`;
  tip.style.top = `${above > 8 ? above : box.bottom + 10}px`;
}
addEventListener("scroll", placeTip, { passive: true, capture: true });
addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});

// ---------------------------------------------------------------------------------------------------------
// Widgets

let groups = 0;

// Radio buttons for each question {question: [[value, label], ...]}; `draw` receives the answers {question: value} and
// returns the node to show below. A question with a single option has no buttons.
function choices(questions, draw) {
  const offered = Object.entries(questions).filter(([, options]) => options.length > 0);
  const answers = Object.fromEntries(offered.map(([question, options]) => [question, options[0][0]]));
  const shownNow = h("div");
  const refresh = () => shownNow.replaceChildren(draw(answers));
  const radio = (question, group, value, checked) => {
    const onchange = () => {
      answers[question] = value;
      refresh();
    };
    return h("input", { type: "radio", name: group, value, checked, onchange });
  };
  const fieldset = ([question, options]) => {
    const group = `choice-${groups++}`;
    const labels = options.map(([value, label], i) =>
      h("label", radio(question, group, value, i === 0), h("span", label)),
    );
    return h("fieldset.choice", h("legend", question), labels);
  };
  refresh();
  return h(
    "div",
    h("div.choices", offered.filter(([, options]) => options.length > 1).map(fieldset)),
    shownNow,
  );
}

// A table that scrolls horizontally on a narrow screen. Cells are nodes or text; the first cell of a row is its header.
// A row that is a single text is a heading of the rows below it.
function table(caption, head, rows) {
  const cells = (row) => row.map((cell, i) => (i === 0 ? h("th", { scope: "row" }, cell) : h("td", cell)));
  const heading = (text) => h("tr.group", h("th", { scope: "rowgroup", colspan: head.length }, text));
  return h(
    "div",
    h("p.caption", caption),
    h(
      "div.scroll",
      { tabindex: 0, role: "region", "aria-label": caption },
      h(
        "table",
        h(
          "thead",
          h(
            "tr",
            head.map((cell) => h("th", { scope: "col" }, cell)),
          ),
        ),
        h(
          "tbody",
          rows.map((row) => (typeof row === "string" ? heading(row) : h("tr", cells(row)))),
        ),
      ),
    ),
  );
}

// Shares of tokens by exit, as a stacked bar with its numbers in text.
function shareBar(shares, exits) {
  const known = exits.filter((exit) => isNumber(shares?.[exit]));
  if (known.length === 0) return "–";
  const parts = known.map((exit) => bar(shares[exit], exitColour(exit, exits)));
  const words = known.map((exit) => `exit ${exit}: ${percent(shares[exit])}`);
  return [h("div.shares", { "aria-hidden": "true" }, parts), h("small", words.join(" · "))];
}

// A number followed by a bar of length `value / most`.
function barred(value, most, text, colour) {
  if (!isNumber(value)) return "–";
  return h(
    "span.barred",
    h("span", text),
    h("span.track", { "aria-hidden": "true" }, bar(value / most, colour)),
  );
}
function bar(share, colour) {
  const node = h("i", { class: colour });
  node.style.width = `${Math.min(1, share) * 100}%`;
  return node;
}

// Early exits have cool colors, late ones warm. There are five; with more exits, neighbors share a color.
function exitColour(exit, exits) {
  const at = exits.indexOf(Number(exit));
  const many = exits.length;
  return `exit-${many === 2 ? 2 * at : many <= 5 ? at : Math.floor((at * 5) / many)}`;
}
const exitName = (exit, exits, text = `exit ${exit}`) => h(`span.exitname.${exitColour(exit, exits)}`, text);
