// The page: one run with all sections, or several runs compared, each with its sections folded below.

const GLOSSARY = {
  layer: "One transformer block; layers are numbered from 1.",
  exit: "The point after a layer where a prediction can be made: the exit's norm, then the shared output head.",
  stage: "A contiguous group of layers.",
  phase: "One round of training: which layers learn, from which tokens, and when it ends.",
  line: "One trained model with its policy.",
  continued:
    "The earlier phase trained further with the FLOPs of the later phase, at the learning rate it ended with.",
  standard: "A model of fixed depth with the loss on its last layer, trained with the same FLOPs in all.",
  growth: "Layers are added during training; all layers learn from all tokens.",
  confidence:
    "A number in [0, 1] per token and exit. A token exits if its confidence is at least the threshold.",
  "hard token":
    "A token whose confidence at the exit is below the threshold, as determined by phase 1's final model.",
  policy: "Exits, thresholds and confidence measure.",
  perplexity: "Exponential of the mean loss per token; lower is better.",
  "layers run per token": "As a share of full depth; output heads are not counted.",
  "FLOPs per token":
    "Analytic count of a forward pass: projections, attention, feed-forward and every head that is evaluated.",
  "training FLOPs":
    "The same count over the whole training of a line: training, mining, trunk and validation passes.",
  "calibration error":
    "Expected calibration error: mean distance between confidence and accuracy over tokens.",
  "held-out": "Measured on tokens that were not used for training, unlike in-sample metrics.",
  "t interval": "95% confidence interval of the mean over random seeds, by Student's t distribution.",
};

const SECTIONS = [
  ["lines", "Lines", linesSection],
  ["curves", "Phases and their curves", curvesSection],
  ["exits", "Quality of every exit", exitsSection],
  ["compute", "Quality against compute", computeSection],
  ["decoding", "Decoding speed", decodingSection],
  ["reliability", "Reliability of the confidence", reliabilitySection],
  ["explorer", "Exit explorer", explorerSection],
  ["made", "Configuration", madeSection],
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
      isNumber(summary.seed) && `random seed ${summary.seed}`,
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

function comparison(title, runs, seeds) {
  // Here a color stands for a run, so the grey of the first line is not used.
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
      h("small", [run.summary.note && `${sentence(run.summary.note)} `, run.verdict.detail]),
    );
  const corpora = new Set(runs.map(({ summary }) => summary.data?.hash ?? summary.data?.name));
  const splits = new Set(runs.flatMap((run) => [splitOf(run), run.summary.sweep?.split]).filter(Boolean));
  const lines = ({ "measured on": split }) =>
    table(
      `Lines of all runs, measured on the ${splitName(split)}`,
      LINE_HEAD,
      [
        ...runs.flatMap((run) => [run.label, ...lineRows(run, split)]),
        ...seeds.flatMap((group) => [`${group.label} ± half-width of the 95% t interval`, ...seedRows(group, split)]),
      ],
    );
  const scored = splitChoices(runs);
  return [
    h(
      "header",
      h("p.subtitle", "Comparison"),
      h("h1", title),
      h("ul.verdicts", runs.map(verdictOf)),
      corpora.size > 1 &&
        h("p.badge", "These runs were measured on different data: their perplexities are not comparable."),
    ),
    part(
      "lines",
      "h2",
      "Lines, side by side",
      scored.length > 0
        ? choices({ "measured on": scored }, lines)
        : empty("No line of these runs was scored."),
      note(
        "Each run has its own hard set: hard-token perplexities are comparable only within a run.",
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

function show({ title, runs, seeds }) {
  const version = runs[0].summary.ease_version;
  const words = Object.entries(GLOSSARY).map(([word, meaning]) => h("div", h("dt", word), h("dd", meaning)));
  document
    .getElementById("main")
    .replaceChildren(
      ...h(
        "div",
        runs.length === 1 ? single(title, runs[0]) : comparison(title, runs, seeds ?? []),
        h("details.made", h("summary", "Glossary"), h("dl.glossary", words)),
        h("footer", `Written by ease${version ? ` ${version}` : ""}. This file works offline.`),
      ).childNodes,
    );
}

// In print everything is unfolded except the numbers that the charts already show.
addEventListener("beforeprint", () => {
  document.querySelectorAll("details:not(.numbers)").forEach((each) => {
    each.open = true;
  });
});
show(JSON.parse(document.getElementById("data").textContent));
