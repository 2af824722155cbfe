// The exit explorer: held-out text with each token colored by its exit, and a slider over routed runs that were
// actually computed.

// Visible form of a token: line ends and tabs get a sign, other control characters their Unicode picture.
const CONTROL = /[\x00-\x08\x0b-\x1f\x7f]/g;
const picture = (c) => (c === "\x7f" ? "␡" : String.fromCharCode(0x2400 + c.charCodeAt(0)));
const visible = (token) => String(token).replace(CONTROL, picture);
const SIGNS = { "\n": "⏎", "\t": "⇥" };
const written = (token) =>
  visible(token)
    .split(/(\n|\t)/)
    .map((part) => (SIGNS[part] ? [h("span.sign", SIGNS[part]), part] : part));
const quoted = (token) =>
  h(
    "code",
    visible(token)
      .replace(/[\n\t]/g, (c) => SIGNS[c])
      .replaceAll(" ", "␣") || "(empty)",
  );

function explorerSection({ explorer, ...run }) {
  if (!explorer?.runs?.length || !explorer.tokens?.length) {
    return empty("This run has no explorer.json, so there is no text to show.");
  }
  const exits = exitsOf({ explorer, ...run });
  const steps = [...explorer.runs].sort((a, b) => (a.thresholds?.[0] ?? 0) - (b.thresholds?.[0] ?? 0));
  let step = steps[Math.floor(steps.length / 2)];
  let focused = 0;

  // Only one token is a tab stop; arrow keys move from there.
  const tokens = explorer.tokens.map((token, i) =>
    h("span.token", { "data-i": i, tabindex: i === 0 ? 0 : -1, "aria-describedby": "tip" }, written(token)),
  );
  const text = h(
    "div.text",
    { role: "group", "aria-label": "Held-out text; arrow keys move between tokens" },
    tokens,
  );
  const totals = h("dl.cards", { "aria-live": "polite" });
  const output = h("output");
  const slider = h("input", {
    type: "range",
    min: 0,
    max: steps.length - 1,
    step: 1,
    value: steps.indexOf(step),
    "aria-label": "threshold of the routed run",
    oninput: () => show(steps[slider.value]),
  });

  function show(chosen) {
    step = chosen;
    const sums = step.totals ?? {};
    slider.setAttribute("aria-valuetext", `threshold ${thresholds(step.thresholds)}`);
    output.replaceChildren(
      "threshold ",
      h("b", thresholds(step.thresholds)),
      h("small", ` run ${steps.indexOf(step) + 1} of ${steps.length}`),
    );
    tokens.forEach((node, i) => {
      const exit = step.exits?.[i];
      node.className = isNumber(exit) ? `token ${exitColour(exit, exits)}` : "token";
      if (isNumber(exit)) node.dataset.exit = exit;
      else delete node.dataset.exit;
    });
    totals.replaceChildren(
      h("div.card.wide", h("dt", "Tokens by exit"), h("dd", shareBar(sums.exit_shares, exits))),
      card("Layers run per token", percent(sums.compute_cost)),
      card("FLOPs per token", flops(sums.flops_per_token)),
      card("Perplexity", ppl(sums.ppl)),
      card("Accuracy", percent(sums.acc)),
    );
  }

  function explain(i) {
    const exit = step.exits?.[i];
    const next = explorer.tokens[i + 1];
    const guesses = (step.top?.[i] ?? []).map(([token, chance]) =>
      h("tr", h("td", quoted(token), token === next && " ✓"), h("td", barred(chance, 1, fixed(3)(chance)))),
    );
    showTip(
      [
        h(
          "div",
          "after ",
          quoted(explorer.tokens[i]),
          isNumber(exit) ? [": exits at ", exitName(exit, exits, `layer ${exit}`)] : ": not routed",
        ),
        h("div", "confidence ", h("b", fixed(3)(step.confidences?.[i]))),
        guesses.length > 0 && h("table", h("tbody", guesses)),
        next !== undefined && h("div.dim", "next in the text: ", quoted(next)),
      ].filter(Boolean),
      () => tokens[i].getClientRects()[0] ?? tokens[i].getBoundingClientRect(),
    );
  }

  const explainUnder = (event) => {
    const node = event.target.closest(".token");
    if (node) explain(Number(node.dataset.i));
  };
  text.addEventListener("pointerover", explainUnder);
  text.addEventListener("focusin", explainUnder);
  text.addEventListener("pointerleave", hideTip);
  text.addEventListener("focusout", hideTip);
  text.addEventListener("focusin", (event) => {
    tokens[focused].tabIndex = -1;
    focused = Number(event.target.closest(".token")?.dataset.i ?? focused);
    tokens[focused].tabIndex = 0;
  });
  text.addEventListener("keydown", (event) => {
    const moves = {
      ArrowRight: focused + 1,
      ArrowDown: focused + 1,
      ArrowLeft: focused - 1,
      ArrowUp: focused - 1,
      Home: 0,
      End: tokens.length - 1,
    };
    const to = tokens[moves[event.key]];
    if (!to) return;
    event.preventDefault();
    to.focus();
  });

  show(step);
  return h(
    "div.explorer",
    h("div.slide", h("span", "more exit early"), slider, h("span", "more run deep"), output),
    totals,
    h(
      "ul.legend",
      exits.map((exit) => h("li", exitName(exit, exits, `exits at layer ${exit}`))),
    ),
    text,
    note(
      `Text of the ${splitName(explorer.split)}. The color of a token is the exit at which the next token was ` +
        "predicted. Every step of the slider is a routed run that was actually computed, with its own totals.",
    ),
  );
}
