// Sections of the page for a run {label, folder, summary, explorer, verdict, decoding}. Each is a function of the run
// that returns nodes, or one sentence if the run has no such data.

const SPLITS = { test: "held-out test split", val: "validation split (choices were made on it)" };
const splitName = (split) =>
  SPLITS[split === "validation" ? "val" : split] ?? (split ? `${split} split` : "split not recorded");
const empty = (sentence) => h("p.empty", sentence);
const note = (...words) => h("p.note", words);
const card = (name, value, ...below) =>
  h(
    "div.card",
    h("dt", name),
    h(
      "dd",
      h("strong", value),
      below.map((b) => b && h("small", b)),
    ),
  );

// The first line is grey, since later phases are built on it; a single line is not.
const lineColour = (i, many) => `line-${many === 1 ? 1 : i === 0 ? 0 : 1 + ((i - 1) % 6)}`;
const lineStyle = (i, many) => ({ colour: lineColour(i, many), mark: markName(i) });
const lineName = (lines, i) => h("span.named", sign(lineStyle(i, lines.length)), lines[i].name);
const lineNamed = (run, name) => run.summary.lines.find((line) => line.name === name);
const splitOf = (run) => run.verdict.split ?? (run.summary.lines.some((line) => line.test) ? "test" : "val");
const tokensIn = (line, split) =>
  isNumber(line?.[split]?.tokens) ? `, ${count(line[split].tokens)} tokens` : "";

// All exits of the run, so that an exit has the same color in every section.
function exitsOf({ summary, explorer }) {
  const all = summary.lines.flatMap((line) => [
    ...Object.keys(line.test?.exit_shares ?? {}),
    ...Object.keys(line.val?.exit_shares ?? {}),
    ...Object.keys(line.exit_quality ?? {}),
    ...(line.policy?.exits ?? []),
  ]);
  const more = [...(explorer?.exits ?? []), ...(summary.reliability?.exits ?? []).map((exit) => exit.layer)];
  return [...new Set([...all, ...more].map(Number))].filter(isNumber).sort((a, b) => a - b);
}

// The share of tokens that exit before the line's last layer.
function leavingEarly(line, split) {
  const shares = line[split]?.exit_shares;
  if (!shares || !isNumber(line.num_layers)) return line[split]?.shallow_ratio;
  const early = Object.entries(shares).filter(([exit]) => Number(exit) < line.num_layers);
  return early.reduce((sum, [, share]) => sum + share, 0);
}

// What routing saves by the clock: the time of routed decoding of a single row, for the line that was timed.
function decodingTime({ summary: { generation } }, line) {
  const routed = generation?.rows?.find((row) => row.batch === 1 && row.way?.startsWith("routed"));
  if (line?.name !== generation?.line || !isNumber(routed?.ratio)) return null;
  return `routed decoding takes ${percent(1 / routed.ratio)} of full depth's time`;
}

// ---------------------------------------------------------------------------------------------------------
// 1. The headline

const TONES = {
  better: "✓ better",
  worse: "✗ not better",
  mixed: "± mixed",
  even: "= even",
  none: "no verdict",
};

function headline(run) {
  const { verdict } = run;
  const split = splitOf(run);
  const line = lineNamed(run, verdict.line);
  const against = lineNamed(run, verdict.against);
  const figure = (name, format, get) =>
    card(name, format(get(line)), against && `${against.name}: ${format(get(against))}`);
  return [
    h(
      `div.verdict.${verdict.tone}`,
      h("p", h("span.tone", TONES[verdict.tone]), verdict.headline),
      verdict.detail && h("small", verdict.detail),
    ),
    line?.[split] && [
      h(
        "dl.cards",
        figure("Perplexity", ppl, (l) => l[split]?.ppl),
        figure("Hard-token perplexity", ppl, (l) => l[split]?.hard_ppl),
        figure("Exit early", percent, (l) => leavingEarly(l, split)),
        figure("FLOPs per token", flops, (l) => l[split]?.flops_per_token),
      ),
      note(
        [`${capital(line.name)}, measured on the ${splitName(split)}${tokensIn(line, split)}`, decodingTime(run, line)]
          .filter(Boolean)
          .join("; ") + ".",
      ),
    ],
  ];
}

// ---------------------------------------------------------------------------------------------------------
// 2. The lines

const LINE_HEAD = [
  "line",
  "perplexity",
  "accuracy",
  "hard-token perplexity",
  "tokens by exit",
  "layers run per token",
  "FLOPs per token, bytes of parameters read",
  "training FLOPs, time",
  "scoring time, speed",
];

function lineRows(run, split) {
  const { lines } = run.summary;
  const exits = exitsOf(run);
  const before = lines[0][split]?.hard_ppl;
  return lines.map((line, i) => {
    const figures = line[split] ?? {};
    const speed = figures.tokens / figures.seconds;
    const time = decodingTime(run, line);
    const policy =
      line.policy &&
      `exits at layer ${line.policy.exits?.join(", ")} from confidence ${thresholds(line.policy.thresholds)}`;
    const size = isNumber(line.num_layers) ? `${plural(line.num_layers, "layer")}, ` : "";
    const hard = ppl(figures.hard_ppl);
    const fromBefore = [
      h("small", `${ppl(before)} → `),
      hard,
      h("small", h("br"), change(before, figures.hard_ppl)),
    ];
    return [
      [lineName(lines, i), h("small", size + (policy ?? "no routing"))],
      ppl(figures.ppl),
      percent(figures.acc),
      i === 0 || !isNumber(before) ? hard : fromBefore,
      shareBar(figures.exit_shares, exits),
      percent(figures.compute_cost),
      [
        flops(figures.flops_per_token),
        isNumber(line.bytes_per_token) &&
          h("small", h("br"), `${flops(line.bytes_per_token)}B of ${flops(line.parameters)} parameters`),
        time && h("small", h("br"), time),
      ],
      [flops(line.train_flops), h("small", h("br"), duration(line.train_seconds))],
      [
        duration(figures.seconds),
        h("small", h("br"), isNumber(speed) ? `${flops(speed)}\u00a0tokens/s` : "–"),
      ],
    ];
  });
}

// The lines of runs that differ only in their random seed: mean ± half-width of the t interval.
function seedRows({ lines }, split) {
  const over = (format) => (value) =>
    isNumber(value?.mean) ? `${format(value.mean)} ± ${format(value.half)}` : "–";
  return lines.map((line, i) => {
    const metrics = line[split] ?? {};
    const size = isNumber(line.num_layers) ? plural(line.num_layers, "layer") : "";
    return [
      [lineName(lines, i), h("small", size)],
      over(ppl)(metrics.ppl),
      over(percent)(metrics.acc),
      over(ppl)(metrics.hard_ppl),
      isNumber(metrics.early?.mean) ? `${over(percent)(metrics.early)} exit early` : "–",
      over(percent)(metrics.compute_cost),
      over(flops)(metrics.flops_per_token),
      over(flops)(line.train_flops),
      "–",
    ];
  });
}

const splitChoices = (runs) =>
  [
    ["test", "test"],
    ["val", "validation"],
  ].filter(([split]) => runs.some((run) => run.summary.lines.some((line) => line[split])));

function linesSection(run) {
  const { hard, lines } = run.summary;
  const splits = splitChoices([run]);
  if (splits.length === 0) return empty("No line of this run was scored.");
  const caption = (split) =>
    `Lines of the run, measured on the ${splitName(split)}${tokensIn(
      lines.find((line) => line[split]),
      split,
    )}`;
  return [
    choices({ "measured on": splits }, ({ "measured on": split }) =>
      table(caption(split), LINE_HEAD, lineRows(run, split)),
    ),
    hard &&
      note(
        "The hard set is the same for all lines: tokens with a confidence below " +
          `${thresholds(hard.thresholds)} at exit ${hard.exits?.join(", ")} of ${hard.fixed_by ?? "phase 1"} ` +
          `(${percent(hard.train_ratio)} of training and ${percent(hard.test_ratio)} of test tokens). ` +
          "Arrows compare with the first line.",
      ),
    inSample(run),
  ];
}

function inSample(run) {
  const seen = run.summary.in_sample;
  if (!seen) return null;
  const split = splitOf(run);
  const first = run.summary.lines[0][split] ?? {};
  const last = lineNamed(run, run.verdict.line)?.[split] ?? {};
  const rows = (before, after, figures) =>
    h(
      "dl",
      [
        ["hard-token perplexity", `${ppl(before)} → ${ppl(after)}`],
        ["change", change(before, after)],
        ["perplexity", ppl(figures.ppl)],
        ["accuracy", percent(figures.acc)],
        ["exit early", percent(figures.shallow_ratio)],
        ["layers run per token", percent(figures.compute_cost)],
      ].map(([name, value]) => h("div", h("dt", name), h("dd", value))),
    );
  return h(
    "div.side-by-side",
    h(
      "section.insample",
      h("h4", "in-sample: measured on training tokens"),
      rows(seen.hard_ppl_before, seen.hard_ppl_after, seen),
      h(
        "small",
        `On the ${seen.split ?? "training"} split, by the original recipe, which trains and scores on the same ` +
          "tokens. This is no evidence of generalization.",
      ),
    ),
    h(
      "section",
      h("h4", `held-out: ${run.verdict.line}`),
      rows(first.hard_ppl, last.hard_ppl, last),
      h("small", `On the ${splitName(split)}.`),
    ),
  );
}

// ---------------------------------------------------------------------------------------------------------
// 3. Phases and their curves

// Points that several lines share (the early phases) are drawn once, with the first line that has them; later lines
// start at the last shared point.
function curveSeries(lines, x, y) {
  const identity = (point) => JSON.stringify([point.phase, point.step, point.flops, point.val_loss]);
  const words = ({ phase, epoch, step }) =>
    [phase, isNumber(epoch) && `epoch ${epoch}`, isNumber(step) && `step ${step}`].filter(Boolean).join(", ");
  const drawn = new Set();
  return lines.map((line, i) => {
    const curve = line.curve ?? [];
    const fresh = curve.findIndex((point) => !drawn.has(identity(point)));
    const own = fresh < 0 ? [] : curve.slice(Math.max(0, fresh - 1));
    curve.forEach((point) => drawn.add(identity(point)));
    return {
      name: line.name,
      ...lineStyle(i, lines.length),
      size: 3.5,
      dash: i === 0 ? "5 3" : null,
      points: own.map((point) => ({ x: point[x], y: point[y], tip: words(point) })),
    };
  });
}

const CURVE_NAMES = {
  val_loss: "validation loss",
  train_loss: "training loss",
  val_acc: "validation accuracy",
  flops: "training FLOPs",
  seconds: "seconds of training",
};

function curvesSection(run) {
  const { lines } = run.summary;
  const points = lines.flatMap((line) => line.curve ?? []);
  if (points.length === 0) return empty("This run recorded no curve.");
  const offered = (keys) =>
    keys.filter((key) => points.some((point) => isNumber(point[key]))).map((key) => [key, CURVE_NAMES[key]]);
  const axis = (key) => ({ label: CURVE_NAMES[key], format: { flops, val_acc: percent }[key] ?? plain });
  const end = lines.length > 1 && lines[0].curve?.at(-1);
  const curves = ({ show, against }) =>
    chart({
      label: `${capital(CURVE_NAMES[show])} against ${CURVE_NAMES[against]}`,
      x: { ...axis(against), from: 0 },
      y: axis(show),
      series: curveSeries(lines, against, show),
      rules: end ? [{ x: end[against], label: `${lines[0].name} ends` }] : [],
      note: show === "train_loss" ? "Measured on the training batches." : "Measured on the validation split.",
    });
  return [
    choices(
      { show: offered(["val_loss", "train_loss", "val_acc"]), against: offered(["flops", "seconds"]) },
      curves,
    ),
    flopsBy(lines),
  ];
}

function flopsBy(lines) {
  const kinds = [...new Set(lines.flatMap((line) => Object.keys(line.flops_by ?? {})))];
  if (kinds.length === 0) return null;
  const cell = (line, kind) => barred(line.flops_by?.[kind], line.train_flops, flops(line.flops_by?.[kind]));
  return [
    h("h4", "Training FLOPs by kind"),
    table(
      "Training FLOPs of each line, by kind of work",
      ["line", ...kinds, "total"],
      lines.map((line, i) => [
        lineName(lines, i),
        ...kinds.map((kind) => cell(line, kind)),
        flops(line.train_flops),
      ]),
    ),
  ];
}

// ---------------------------------------------------------------------------------------------------------
// 4. Quality of every exit

function exitsSection(run) {
  const { lines } = run.summary;
  const exits = exitsOf(run);
  const rows = lines.flatMap((line, i) =>
    Object.entries(line.exit_quality ?? {}).map(([exit, worth], nth) => ({
      i,
      exit,
      worth: worth ?? {},
      nth,
    })),
  );
  if (rows.length === 0) return empty("This run did not score its exits separately.");
  const most = Math.max(...rows.map(({ worth }) => worth.ppl).filter(isNumber));
  return table(
    "Quality if all tokens exit here, measured on the held-out test split",
    ["line", "exit", "perplexity (shorter is better)", "accuracy (longer is better)"],
    rows.map(({ i, exit, worth, nth }) => [
      nth === 0 ? lineName(lines, i) : h("span.repeat", lines[i].name),
      exitName(exit, exits),
      barred(worth.ppl, most, ppl(worth.ppl), exitColour(exit, exits)),
      barred(worth.acc, 1, percent(worth.acc), exitColour(exit, exits)),
    ]),
  );
}

// ---------------------------------------------------------------------------------------------------------
// 5. Quality against compute

const COMPUTE = [
  ["flops_per_token", "FLOPs per token"],
  ["compute_cost", "layers run per token"],
];

const sweepPoints = ({ summary }, x) =>
  [...(summary.sweep?.points ?? [])]
    .sort((a, b) => a[x] - b[x])
    .map((point) => ({ x: point[x], y: point.ppl, tip: `threshold ${thresholds(point.thresholds)}` }));

function linePoints(run, x) {
  const figures = (line) => line[splitOf(run)] ?? {};
  return run.summary.lines.map((line) => ({
    x: figures(line)[x],
    y: figures(line).ppl,
    label: line.name,
    tip: line.name + (line.policy ? `, threshold ${thresholds(line.policy.thresholds)}` : ", no routing"),
  }));
}

// Standard models of several depths, from cheap to expensive: the baseline front.
function standardPoints(run, x) {
  const points = linePoints(run, x).filter((point) => /^standard\b/.test(point.label) && isNumber(point.x));
  return points.length > 1 ? points.map(({ label, ...point }) => point).sort((a, b) => a.x - b.x) : [];
}

// `series(x)` returns what to draw against the measure `x` of compute.
function computeChart(label, words, series) {
  const drawable = ([x]) =>
    series(x).some(({ points }) => points.some((p) => isNumber(p.x) && isNumber(p.y)));
  const measures = COMPUTE.filter(drawable);
  if (measures.length === 0) return empty("This run has no threshold sweep and no scored line.");
  const format = { flops_per_token: flops, compute_cost: percent };
  return choices({ against: measures }, ({ against }) =>
    chart({
      label,
      note: words,
      series: series(against),
      y: { label: "perplexity", format: plain },
      x: { label: Object.fromEntries(COMPUTE)[against], format: format[against] },
    }),
  );
}

function computeSection(run) {
  const { sweep, lines } = run.summary;
  const at = Math.max(
    0,
    lines.findIndex((line) => line.name === sweep?.line),
  );
  const series = (x) => [
    {
      name: `${sweep?.line ?? "sweep"}, thresholds swept`,
      colour: lineColour(at, lines.length),
      mark: "circle",
      size: 2.5,
      points: sweepPoints(run, x),
    },
    ...linePoints(run, x).map((point, i) => ({
      name: lines[i].name,
      ...lineStyle(i, lines.length),
      join: false,
      size: 6,
      points: [point],
    })),
    {
      name: "standard models",
      colour: "line-0",
      mark: "diamond",
      hollow: true,
      size: 5,
      dash: "2 4",
      points: standardPoints(run, x),
    },
  ];
  const swept = sweep
    ? `The sweep is measured on the ${splitName(sweep.split)}.`
    : "This run has no threshold sweep.";
  return computeChart(
    "Perplexity against compute per token",
    `Lower and further left is better. Lines are measured on the ${splitName(splitOf(run))}. ${swept}`,
    series,
  );
}

// ---------------------------------------------------------------------------------------------------------
// 7. Reliability (6, decoding speed, is in decoding.js)

function reliabilitySection(run) {
  const { reliability } = run.summary;
  if (!reliability?.exits?.length) return empty("This run measured no reliability.");
  const exits = exitsOf(run);
  const diagram = ({ layer, ece, bins, auroc }) => {
    const full = (bins ?? []).filter((bin) => bin.share > 0);
    const most = Math.max(...full.map((bin) => bin.share));
    return h(
      "div",
      h(
        "h4",
        exitName(layer, exits),
        ` calibration error ${fixed(3)(ece)}${typeof auroc === "number" ? `, AUROC ${fixed(3)(auroc)}` : ""}`,
      ),
      chart({
        label: `Reliability of exit ${layer}`,
        square: true,
        diagonal: true,
        x: { label: "confidence", format: plain, from: 0, to: 1 },
        y: { label: "accuracy", format: plain, from: 0, to: 1 },
        series: [
          {
            name: `exit ${layer}`,
            colour: `${exitColour(layer, exits)}.strong`,
            mark: "circle",
            points: full.map((bin) => ({
              x: bin.confidence,
              y: bin.accuracy,
              tip: `${percent(bin.share)} of tokens`,
            })),
          },
        ],
        bars: full.map((bin) => ({ from: bin.low, to: bin.high, share: (bin.share / most) * 0.3 })),
      }),
    );
  };
  return [
    h("div.multiples", reliability.exits.map(diagram)),
    note(
      `Measured on the ${splitName(reliability.split)}. On the dashed line, a token with confidence 0.7 is ` +
        "correct 7 times in 10; below it, the exit is overconfident. Bars show the distribution of the tokens. AUROC is " +
        "the probability that a token on which the exit agrees with the last exit has a higher confidence than one on " +
        "which it does not.",
    ),
  ];
}

// ---------------------------------------------------------------------------------------------------------
// 9. Configuration of the run (8, the exit explorer, is in explorer.js)

function say(value) {
  if (value === null || value === undefined || value === "") return "–";
  if (Array.isArray(value)) return value.map(say).join(", ");
  if (typeof value === "object")
    return Object.entries(value)
      .map(([name, each]) => `${name} ${say(each)}`)
      .join(", ");
  return Number.isInteger(value) ? count(value) : String(value);
}

function madeSection({ summary }) {
  const { data, machine, model, lines, hard, config } = summary;
  const block = (name, facts) =>
    h(
      "section",
      h("h4", name),
      h(
        "dl.facts",
        facts.map(([what, value]) => h("div", h("dt", what.replaceAll("_", " ")), h("dd", say(value)))),
      ),
    );
  return h(
    "details.made",
    h("summary", "Data, model, machine and random seed"),
    h(
      "div.blocks",
      block("Data", Object.entries(data ?? {})),
      block("Model", [...Object.entries(model ?? {}), ["parameters", summary.parameters]]),
      block("Run", [
        ["strategy", summary.strategy],
        ["random seed", summary.seed],
        ["ease", summary.ease_version],
        ...lines.filter((line) => line.policy).map((line) => [`policy of ${line.name}`, line.policy]),
        ...(hard ? [["hard set", hard]] : []),
      ]),
      block("Machine", Object.entries(machine ?? {})),
    ),
    config && [h("h4", "Configuration"), h("pre", { tabindex: 0 }, JSON.stringify(config, null, 2))],
  );
}
