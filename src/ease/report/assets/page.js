// The page: one run in full, or several side by side with each run's sections folded below.

const GLOSSARY = {
  layer: "One transformer block; layers are numbered from 1.",
  exit: "The place after a layer where a prediction can leave: the exit's norm, then the shared output head.",
  stage: "A contiguous run of layers: one brick.",
  phase: "One training round of a strategy: which layers learn, from which tokens, until when.",
  line: "One trained model with its policy, as scored.",
  continued:
    "The earlier phase trained on with the FLOPs the later phase got: what they buy without the later phase.",
  confidence:
    "A number in [0, 1] per token at an exit. A token leaves when its confidence is at least the threshold.",
  "hard token":
    "A token whose confidence at the exit is below the threshold. The set is fixed by phase 1's final model.",
  policy: "Exits, thresholds and confidence measure together.",
  perplexity: "exp of the mean loss per token; lower is better.",
  "compute by formula": "Layers run per token, as a share of full depth. It counts no output head.",
  "FLOPs per token":
    "The analytic count of a pass: projections, attention, feed-forward and every head evaluated.",
  "training FLOPs":
    "The same count over all training of the line: training, mining, trunk and validation passes.",
  "calibration error":
    "Expected calibration error: the mean distance of confidence from accuracy over tokens.",
  "held-out": "Measured on tokens that training never saw. In-sample figures are not.",
};

const SECTIONS = [
  ["lines", "Lines", linesSection],
  ["curves", "Phases and their curves", curvesSection],
  ["exits", "What each exit is worth", exitsSection],
  ["compute", "Quality against compute", computeSection],
  ["decoding", "Three ways to decode", decodingSection],
  ["reliability", "Can confidence be trusted?", reliabilitySection],
  ["explorer", "Exit explorer", explorerSection],
  ["made", "How it was made", madeSection],
];

const part = (id, level, heading, ...content) => h("section.part", { id }, h(level, heading), content);
const sections = (run, prefix, level) =>
  SECTIONS.map(([id, heading, content]) => part(prefix + id, level, heading, content(run)));
const badge = ({ summary }) => summary.note && h("p.badge", summary.note);
const subtitle = ({ summary }) =>
  h(
    "p.subtitle",
    [
      summary.strategy,
      summary.data?.name,
      isNumber(summary.parameters) && `${flops(summary.parameters)} parameters`,
      isNumber(summary.head_in_layers) && `one head costs as much as ${summary.head_in_layers.toPrecision(2)} layers`,
      summary.machine?.device && `on ${summary.machine.device}`,
      isNumber(summary.seed) && `seed ${summary.seed}`,
    ]
      .filter(Boolean)
      .join(" · "),
  );

function single(title, run) {
  return [
    h("header", subtitle(run), h("h1", title), badge(run), headline(run)),
    h(
      "nav",
      { "aria-label": "Sections" },
      SECTIONS.map(([id, heading]) => h("a", { href: `#${id}` }, heading)),
    ),
    sections(run, "", "h2"),
  ];
}

function comparison(title, runs) {
  // Here a colour is a run, so phase 1's grey is left out.
  const style = (i) => ({ colour: lineColour(i + 1), mark: markName(i) });
  const series = (x) =>
    runs.flatMap((run, i) => [
      { name: `${run.label}, thresholds swept`, ...style(i), size: 3, points: sweepPoints(run, x) },
      {
        name: `${run.label}, lines as scored`,
        ...style(i),
        size: 6,
        join: false,
        points: linePoints(run, x),
      },
    ]);
  const verdictOf = (run) =>
    h(
      `li.verdict.${run.verdict.tone}`,
      h("p", h("span.tone", TONES[run.verdict.tone]), h("b", run.label), `: ${run.verdict.headline}`),
      h("small", [run.summary.note && `${capital(run.summary.note)}. `, run.verdict.detail]),
    );
  const corpora = new Set(runs.map(({ summary }) => summary.data?.hash ?? summary.data?.name));
  const splits = new Set(runs.flatMap((run) => [splitOf(run), run.summary.sweep?.split]).filter(Boolean));
  const lines = ({ "measured on": split }) =>
    table(
      `Lines of all runs, measured on the ${splitName(split)}`,
      LINE_HEAD,
      runs.flatMap((run) => [run.label, ...lineRows(run, split)]),
    );
  const scored = splitChoices(runs);
  return [
    h(
      "header",
      h("p.subtitle", "Comparison"),
      h("h1", title),
      h("ul.verdicts", runs.map(verdictOf)),
      corpora.size > 1 &&
        h("p.badge", "These runs were measured on different data: their perplexities do not compare."),
    ),
    part(
      "lines",
      "h2",
      "Lines, side by side",
      scored.length > 0
        ? choices({ "measured on": scored }, lines)
        : empty("No line of these runs was scored."),
      note(
        "Each run's hard set is fixed by its own phase 1: hard-token perplexity compares within a run only.",
      ),
    ),
    part(
      "compute",
      "h2",
      "Quality against compute",
      computeChart(
        "Perplexity against compute per token, all runs",
        "Lower and further left is better. Curves are threshold sweeps, marks are lines as scored, " +
          `measured on the ${[...splits].map(splitName).join(" and the ")}.`,
        series,
      ),
    ),
    runs.map((run, i) =>
      h(
        "details.run",
        h("summary", run.label),
        subtitle(run),
        badge(run),
        headline(run),
        sections(run, `run${i}-`, "h3"),
      ),
    ),
  ];
}

function show({ title, runs }) {
  const version = runs[0].summary.ease_version;
  const words = Object.entries(GLOSSARY).map(([word, meaning]) => h("div", h("dt", word), h("dd", meaning)));
  document
    .getElementById("main")
    .replaceChildren(
      ...h(
        "div",
        runs.length === 1 ? single(title, runs[0]) : comparison(title, runs),
        h("details.made", h("summary", "Words used in this report"), h("dl.glossary", words)),
        h("footer", `Written by ease${version ? ` ${version}` : ""}. This file needs no network.`),
      ).childNodes,
    );
}

// On paper everything is unfolded, but for the numbers that the charts already show.
addEventListener("beforeprint", () => {
  document.querySelectorAll("details:not(.numbers)").forEach((each) => {
    each.open = true;
  });
});
show(JSON.parse(document.getElementById("data").textContent));
