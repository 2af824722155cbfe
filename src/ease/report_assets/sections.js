// The page, from the headline down. Each section is a function of a run {label, summary, explorer, verdict}
// that returns elements, or says in one sentence what the run does not hold.

const { title, runs } = JSON.parse(document.getElementById("data").textContent);
const SPLIT_WORDS = { test: "held-out test split", val: "validation split (choices were made on it)" };
const splitName = (split) => SPLIT_WORDS[split === "validation" ? "val" : split] ?? (split ? `${split} split` : "split not recorded");
const empty = (sentence) => h("p", { class: "empty" }, sentence);
const note = (...words) => h("p", { class: "note" }, ...words);

// Phase 1 is the grey start that the others leave from; a lone line needs no grey.
const lineColour = (i, of) => `line-${of === 1 ? 1 : i === 0 ? 0 : 1 + ((i - 1) % 6)}`;
const markName = (i) => MARK_NAMES[i % MARK_NAMES.length];
const key = (i, of) => s("svg", { width: 14, height: 12, viewBox: "-7 -6 14 12", class: lineColour(i, of), "aria-hidden": "true" },
  s("path", { class: "mark", d: MARKS[markName(i)](4.5) }));
const lineNamed = (run, name) => run.summary.lines.find((line) => line.name === name);
const splitOf = (run) => run.verdict.split ?? (run.summary.lines.some((line) => line.test) ? "test" : "val");
const tokensIn = (line, split) => isNumber(line?.[split]?.tokens) ? `, ${count(line[split].tokens)} tokens` : "";

// Every exit any of the run's figures speaks of, so that an exit has one colour throughout the run.
function exitsOf(run) {
  const { lines } = run.summary;
  const all = lines.flatMap((line) => [Object.keys(line.test?.exit_shares ?? {}), Object.keys(line.val?.exit_shares ?? {}),
    Object.keys(line.exit_quality ?? {}), line.policy?.exits ?? []]).flat()
    .concat(run.explorer?.exits ?? [], run.summary.reliability?.exits?.map((exit) => exit.layer) ?? []);
  return [...new Set(all.map(Number))].filter(isNumber).sort((a, b) => a - b);
}

// ---------------------------------------------------------------------------------------------------------
// 1. The headline

const TONES = { better: "✓ better", worse: "✗ not better", mixed: "± mixed", even: "= even", none: "no verdict" };

function headline(run) {
  const { summary, verdict } = run, split = splitOf(run);
  const line = lineNamed(run, verdict.line), against = lineNamed(run, verdict.against);
  const card = (name, format, get, hint) => {
    const ours = line && get(line), theirs = against && get(against);
    return h("div", { class: "card" }, h("dt", {}, name), h("dd", {}, h("strong", {}, format(ours)),
      against && small(`${against.name}: ${format(theirs)}`), hint && small(hint)));
  };
  return h("div", {},
    h("div", { class: `verdict ${verdict.tone}` }, h("p", {}, h("span", { class: "tone" }, TONES[verdict.tone]), verdict.headline),
      verdict.detail && small(verdict.detail)),
    line?.[split] && [
      h("dl", { class: "cards" },
        card("Perplexity", ppl, (l) => l[split]?.ppl),
        card("Hard-token perplexity", ppl, (l) => l[split]?.hard_ppl),
        card("Leaving early", percent, (l) => leavingEarly(l, split)),
        card("FLOPs per token", flops, (l) => l[split]?.flops_per_token)),
      note(`${capital(line.name)}, measured on the ${splitName(split)}${tokensIn(line, split)}.`)]);
}

function leavingEarly(line, split) {
  const shares = line[split]?.exit_shares;
  if (!shares || !isNumber(line.num_layers)) return line[split]?.shallow_ratio;
  return Object.entries(shares).reduce((sum, [exit, share]) => sum + (Number(exit) < line.num_layers ? share : 0), 0);
}

// ---------------------------------------------------------------------------------------------------------
// 2. The lines

const lineRows = (run, split) => {
  const { lines } = run.summary, exits = exitsOf(run), before = lines[0][split]?.hard_ppl;
  return lines.map((line, i) => {
    const figures = line[split] ?? {}, speed = figures.tokens / figures.seconds;
    const policy = line.policy ? `leaves at exit ${line.policy.exits?.join(", ")} from ${thresholds(line.policy.thresholds)}` : "no routing";
    return [
      [h("span", { class: "named" }, key(i, lines.length), line.name), small(isNumber(line.num_layers) ? `${line.num_layers} layers, ${policy}` : policy)],
      ppl(figures.ppl), percent(figures.acc),
      i === 0 || !isNumber(before) ? ppl(figures.hard_ppl)
        : [small(`${ppl(before)} → `), ppl(figures.hard_ppl), small(h("br"), change(before, figures.hard_ppl))],
      shareBar(figures.exit_shares, exits), percent(figures.compute_cost), flops(figures.flops_per_token),
      [flops(line.train_flops), small(h("br"), duration(line.train_seconds))],
      [duration(figures.seconds), small(h("br"), isNumber(speed) ? `${flops(speed)}\u00a0tokens/s` : "–")],
    ];
  });
};
const LINE_HEAD = ["line", "perplexity", "accuracy", "hard-token perplexity", "tokens by exit", "compute by formula",
  "FLOPs per token", "training FLOPs, time", "scoring time, speed"];
const SPLIT_CHOICES = [["test", "test"], ["val", "validation"]];
const splitChoices = (of) => SPLIT_CHOICES.filter(([split]) => of.some((run) => run.summary.lines.some((line) => line[split])));

function linesSection(run) {
  const { hard } = run.summary, splits = splitChoices([run]);
  return [
    splits.length === 0 ? empty("No line of this run was scored.") : choices({ "measured on": splits }, ({ "measured on": split }) => table(
      `Lines of the run, measured on the ${splitName(split)}${tokensIn(run.summary.lines.find((line) => line[split]), split)}`,
      LINE_HEAD, lineRows(run, split))),
    hard && note(`The hard set is the same for all lines: tokens below ${thresholds(hard.thresholds)} at exit ${hard.exits?.join(", ")}, fixed by `
      + `${hard.fixed_by ?? "phase 1"} (${percent(hard.train_ratio)} of train, ${percent(hard.test_ratio)} of test tokens). `
      + "Before → after compares with the first line."),
    inSample(run)];
}

function inSample(run) {
  const seen = run.summary.in_sample;
  if (!seen) return null;
  const split = splitOf(run), first = run.summary.lines[0][split] ?? {}, last = lineNamed(run, run.verdict.line)?.[split] ?? {};
  const figures = (of) => h("dl", {}, of.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  const rows = (before, after, of) => figures([["hard-token perplexity", `${ppl(before)} → ${ppl(after)}`], ["change", change(before, after)],
    ["perplexity", ppl(of.ppl)], ["accuracy", percent(of.acc)], ["leaving early", percent(of.shallow_ratio)], ["compute by formula", percent(of.compute_cost)]]);
  return h("div", { class: "beside" },
    h("section", { class: "insample" }, h("h4", {}, "in-sample: measured on tokens that training saw"),
      rows(seen.hard_ppl_before, seen.hard_ppl_after, seen), small(`On the ${seen.split ?? "training"} split, as the seed's protocol does it. No claim rests on these.`)),
    h("section", { class: "heldout" }, h("h4", {}, `held-out: ${run.verdict.line}`),
      rows(first.hard_ppl, last.hard_ppl, last), small(`On the ${splitName(split)}.`)));
}

// ---------------------------------------------------------------------------------------------------------
// 3. Phases and their curves

// A line's curve falls into phases. Those that several lines share are drawn once, in the first line's colour.
function curveSeries(lines, x, y) {
  const drawn = new Set(), series = [];
  lines.forEach((line, i) => {
    const points = line.curve ?? [], own = [];
    points.forEach((point, at) => {
      const id = JSON.stringify([point.phase, point.step, point.flops, point.val_loss]);
      if (!drawn.has(id)) {
        // The line starts at the last shared point, where it parts from the others.
        if (own.length === 0 && at > 0) own.push({ x: points[at - 1][x], y: points[at - 1][y], tip: points[at - 1].phase });
        own.push({ x: point[x], y: point[y], tip: `${point.phase}${isNumber(point.epoch) ? `, epoch ${point.epoch}` : ""}${isNumber(point.step) ? `, step ${point.step}` : ""}` });
      }
    });
    points.forEach((point) => drawn.add(JSON.stringify([point.phase, point.step, point.flops, point.val_loss])));
    series.push({ name: line.name, colour: lineColour(i, lines.length), mark: markName(i), points: own, size: 3.5, dash: i === 0 ? "5 3" : null });
  });
  return series;
}

function curvesSection(run) {
  const { lines } = run.summary, points = lines.flatMap((line) => line.curve ?? []);
  if (points.length === 0) return empty("This run recorded no curve.");
  const has = (options) => options.filter(([value]) => points.some((point) => isNumber(point[value])));
  const names = { flops: "training FLOPs", seconds: "seconds of training", val_loss: "validation loss", train_loss: "training loss", val_acc: "validation accuracy" };
  const format = { flops, seconds: plain, val_loss: plain, train_loss: plain, val_acc: percent };
  const first = lines[0].curve?.at(-1);
  return [
    choices({ show: has([["val_loss", "validation loss"], ["train_loss", "training loss"], ["val_acc", "accuracy"]]), against: has([["flops", "training FLOPs"], ["seconds", "seconds"]]) },
      ({ show, against }) => chart({
        label: `${names[show]} against ${names[against]}`, x: { label: names[against], format: format[against], from: 0 }, y: { label: names[show], format: format[show] },
        series: curveSeries(lines, against, show), rules: lines.length > 1 && first ? [{ x: first[against], label: `${lines[0].name} ends` }] : [],
        note: show === "train_loss" ? "Measured on the training batches." : "Measured on the validation split.",
      })),
    flopsBy(lines)];
}

function flopsBy(lines) {
  const kinds = [...new Set(lines.flatMap((line) => Object.keys(line.flops_by ?? {})))];
  if (kinds.length === 0) return null;
  return [h("h4", {}, "What the training FLOPs went into"),
    table("Training FLOPs of each line by what they were spent on", ["line", ...kinds, "total"],
      lines.map((line, i) => [h("span", { class: "named" }, key(i, lines.length), line.name),
        ...kinds.map((kind) => barred(line.flops_by?.[kind], line.train_flops, flops(line.flops_by?.[kind]))), flops(line.train_flops)]))];
}

// ---------------------------------------------------------------------------------------------------------
// 4. What each exit is worth

function exitsSection(run) {
  const { lines } = run.summary, exits = exitsOf(run);
  const rows = lines.flatMap((line, i) => Object.entries(line.exit_quality ?? {}).map(([exit, worth]) => ({ line, i, exit, worth })));
  if (rows.length === 0) return empty("This run measured no exit on its own.");
  const most = Math.max(...rows.map(({ worth }) => worth.ppl).filter(isNumber));
  return [
    table("Quality if every token left at this exit, measured on the held-out test split", ["line", "exit", "perplexity (shorter is better)", "accuracy (longer is better)"],
      rows.map(({ line, i, exit, worth }, at) => [rows[at - 1]?.line === line ? h("span", { class: "repeat" }, line.name) : h("span", { class: "named" }, key(i, lines.length), line.name),
        h("span", { class: `exitname ${exitColour(exit, exits)}` }, `exit ${exit}`), barred(worth.ppl, most, ppl(worth.ppl), exitColour(exit, exits)), barred(worth.acc, 1, percent(worth.acc), exitColour(exit, exits))]))];
}

// ---------------------------------------------------------------------------------------------------------
// 5. Quality against compute

function operatingPoints(run, x) {
  const split = splitOf(run), { lines } = run.summary;
  return lines.map((line, i) => ({ name: line.name, colour: lineColour(i, lines.length), mark: markName(i), join: false, size: 6,
    points: [{ x: line[split]?.[x], y: line[split]?.ppl, label: line.name, tip: line.policy ? `${line.name}, threshold ${thresholds(line.policy.thresholds)}` : `${line.name}, no routing` }] }));
}
const sweepPoints = (run, x) => [...(run.summary.sweep?.points ?? [])].sort((a, b) => a[x] - b[x])
  .map((point) => ({ x: point[x], y: point.ppl, tip: `threshold ${thresholds(point.thresholds)}` }));
const plainPoints = (run, x) => (run.summary.plain ?? []).map((point) => ({ x: point[x], y: point.ppl, label: point.name, tip: "plain model, no exits" }));

function computeChart(series, label, note) {
  const axes = [["flops_per_token", "FLOPs per token"], ["compute_cost", "compute by formula"]];
  const usable = axes.filter(([x]) => series(x).some((each) => each.points.some((point) => isNumber(point.x) && isNumber(point.y))));
  if (usable.length === 0) return empty("This run has no threshold sweep and no scored line to draw.");
  return choices({ against: usable }, ({ against }) => chart({
    label, note, x: { label: axes.find(([x]) => x === against)[1], format: against === "compute_cost" ? percent : flops }, y: { label: "perplexity", format: plain }, series: series(against) }));
}

function computeSection(run) {
  const { sweep, lines } = run.summary, at = lines.findIndex((line) => line.name === sweep?.line);
  const series = (x) => [
    { name: `${sweep?.line ?? "sweep"}, thresholds swept`, colour: lineColour(Math.max(at, 0), lines.length), mark: "circle", size: 2.5, points: sweepPoints(run, x) },
    ...operatingPoints(run, x),
    { name: "plain models", colour: "line-0", mark: "diamond", hollow: true, size: 5, dash: "2 4", points: plainPoints(run, x) }];
  const swept = sweep ? ` The sweep of ${sweep.line ?? "the last line"} is measured on the ${splitName(sweep.split)}.` : " This run has no threshold sweep.";
  return computeChart(series, "Perplexity against compute per token", `Lower and further left is better. Lines are measured on the ${splitName(splitOf(run))}.${swept}`);
}

// ---------------------------------------------------------------------------------------------------------
// 6. Reliability

function reliabilitySection(run) {
  const { reliability } = run.summary, exits = exitsOf(run);
  if (!reliability?.exits?.length) return empty("This run measured no reliability.");
  return [h("div", { class: "multiples" }, reliability.exits.map(({ layer, ece, bins }) => {
    const full = (bins ?? []).filter((bin) => bin.share > 0), most = Math.max(...full.map((bin) => bin.share));
    return h("div", {}, h("h4", {}, h("span", { class: `exitname ${exitColour(layer, exits)}` }, `exit ${layer}`), ` calibration error ${fixed(3)(ece)}`), chart({
      label: `Reliability of exit ${layer}`, square: true, diagonal: true,
      x: { label: "confidence", format: plain, from: 0, to: 1 }, y: { label: "accuracy", format: plain, from: 0, to: 1 },
      series: [{ name: `exit ${layer}`, colour: `${exitColour(layer, exits)} strong`, mark: "circle",
        points: full.map((bin) => ({ x: bin.confidence, y: bin.accuracy, tip: `${percent(bin.share)} of tokens` })) }],
      bars: full.map((bin) => ({ from: bin.low, to: bin.high, share: (bin.share / most) * 0.3 })) }));
  })),
  note(`Measured on the ${splitName(reliability.split)}. On the dashed line a token with confidence 0.7 is right 7 times in 10; below it, the exit is too sure of itself. Bars show where the tokens are.`)];
}

// ---------------------------------------------------------------------------------------------------------
// 7. The exit explorer

// A token as one can see it: line ends and tabs get a sign, other control characters their picture.
const visible = (token) => String(token).replace(/[\x00-\x08\x0b-\x1f\x7f]/g, (c) => (c === "\x7f" ? "␡" : String.fromCharCode(0x2400 + c.charCodeAt(0))));
const written = (token) => visible(token).split(/(\n|\t)/).map((part) => (part === "\n" ? [h("span", { class: "sign" }, "⏎"), "\n"] : part === "\t" ? [h("span", { class: "sign" }, "⇥"), "\t"] : part));
const quoted = (token) => h("code", {}, visible(token).replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "(empty)");

function explorerSection(run) {
  const { explorer } = run;
  if (!explorer?.runs?.length || !explorer.tokens?.length) return empty("This run has no explorer.json, so there is no text to walk through.");
  const steps = [...explorer.runs].sort((a, b) => (a.thresholds?.[0] ?? 0) - (b.thresholds?.[0] ?? 0)), exits = exitsOf(run);
  let step = steps[Math.floor(steps.length / 2)], focused = 0;

  const tokens = explorer.tokens.map((token, i) => h("span", { class: "token", "data-i": i, tabindex: i === 0 ? 0 : -1 }, written(token)));
  const text = h("div", { class: "text", role: "group", "aria-label": "Held-out text; arrow keys walk the tokens" }, tokens);
  const totals = h("dl", { class: "cards", "aria-live": "polite" });
  const output = h("output");
  const slider = h("input", { type: "range", min: 0, max: steps.length - 1, step: 1, value: steps.indexOf(step), "aria-label": "threshold of the routed run", oninput: () => show(steps[slider.value]) });

  function show(chosen) {
    step = chosen;
    const { totals: sums = {} } = step, shares = sums.exit_shares ?? {};
    slider.setAttribute("aria-valuetext", `threshold ${thresholds(step.thresholds)}`);
    output.replaceChildren("threshold ", h("b", {}, thresholds(step.thresholds)), small(` run ${steps.indexOf(step) + 1} of ${steps.length}`));
    tokens.forEach((node, i) => {
      const exit = step.exits?.[i];
      node.className = isNumber(exit) ? `token ${exitColour(exit, exits)}` : "token";
      if (isNumber(exit)) node.dataset.exit = exit; else delete node.dataset.exit;
    });
    const card = (name, value) => h("div", { class: "card" }, h("dt", {}, name), h("dd", {}, h("strong", {}, value)));
    totals.replaceChildren(h("div", { class: "card wide" }, h("dt", {}, "Tokens by exit"), h("dd", {}, shareBar(shares, exits))),
      card("Compute by formula", percent(sums.compute_cost)), card("FLOPs per token", flops(sums.flops_per_token)), card("Perplexity", ppl(sums.ppl)), card("Accuracy", percent(sums.acc)));
  }

  function explain(i) {
    const exit = step.exits?.[i], next = explorer.tokens[i + 1], best = step.top?.[i] ?? [];
    showTip([
      h("div", {}, "after ", quoted(explorer.tokens[i]), isNumber(exit) ? [": left at ", h("b", { class: `exitname ${exitColour(exit, exits)}` }, `exit ${exit}`)] : ": not routed"),
      h("div", {}, "confidence ", h("b", {}, fixed(3)(step.confidences?.[i]))),
      best.length > 0 && h("table", {}, h("tbody", {}, best.map(([token, chance]) => h("tr", {},
        h("td", {}, quoted(token), token === next && " ✓"), h("td", {}, barred(chance, 1, fixed(3)(chance))))))),
      next !== undefined && h("div", { class: "dim" }, "next in the text: ", quoted(next)),
    ].filter(Boolean), () => tokens[i].getClientRects()[0]);
  }

  const indexOf = (event) => { const node = event.target.closest(".token"); return node ? Number(node.dataset.i) : -1; };
  const go = (i) => { tokens[focused].tabIndex = -1; focused = i; tokens[i].tabIndex = 0; tokens[i].focus(); };
  text.addEventListener("pointerover", (event) => { const i = indexOf(event); if (i >= 0) explain(i); });
  text.addEventListener("pointerleave", hideTip);
  text.addEventListener("focusin", (event) => { const i = indexOf(event); if (i >= 0) { focused = i; tokens[i].setAttribute("aria-describedby", "tip"); explain(i); } });
  text.addEventListener("focusout", hideTip);
  text.addEventListener("keydown", (event) => {
    const to = { ArrowRight: focused + 1, ArrowDown: focused + 1, ArrowLeft: focused - 1, ArrowUp: focused - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (to !== undefined && tokens[to]) { event.preventDefault(); go(to); }
  });

  show(step);
  return h("div", { class: "explorer" },
    h("div", { class: "slide" }, h("span", {}, "more leave early"), slider, h("span", {}, "more go deep"), output),
    totals,
    h("ul", { class: "legend" }, exits.map((exit) => h("li", {}, h("span", { class: `exitname ${exitColour(exit, exits)}` }, `left at exit ${exit}`)))),
    text,
    note(`Text of the ${splitName(explorer.split)}. A token has the colour of the exit at which the prediction of the next token left. Every step of the slider is a routed run that was really computed; the totals are its own.`));
}

// ---------------------------------------------------------------------------------------------------------
// 8. How it was made

const GLOSSARY = {
  layer: "One transformer block; layers are numbered from 1.",
  exit: "The place after a layer where a prediction can leave: the exit's own norm, then the shared output head.",
  stage: "A contiguous run of layers that is trained as one brick.",
  phase: "One training round of a strategy: which layers learn, from which tokens, until when.",
  line: "One trained model with its policy, as scored.",
  continued: "The earlier phase trained on, with the training FLOPs the later phase got: what the FLOPs buy without the new layers.",
  confidence: "A number in [0, 1] per token at an exit. A token leaves when its confidence is at least the threshold.",
  "hard token": "A token whose confidence at the exit is below the threshold. The set is fixed once, by phase 1's final model.",
  policy: "Exits, thresholds and confidence measure together.",
  perplexity: "exp of the mean loss per token; lower is better.",
  "compute by formula": "Layers run per token, as a share of full depth. It counts no output head.",
  "FLOPs per token": "The analytic count of a forward pass: projections, attention, feed-forward and every head evaluated.",
  "training FLOPs": "The same count over all training so far: training, mining, frozen trunk and validation passes.",
  "calibration error": "Expected calibration error: the mean distance of confidence from accuracy, weighted by tokens.",
  "held-out": "Measured on tokens that training never saw. In-sample figures are not.",
};

function madeSection(run) {
  const { data = {}, machine = {}, model = {}, hard, lines, ...rest } = run.summary;
  const say = (value) => (value === null || value === undefined || value === "" ? "–" : Array.isArray(value) ? value.map(say).join(", ")
    : typeof value === "object" ? Object.entries(value).map(([k, v]) => `${k} ${say(v)}`).join(", ") : isNumber(value) && Number.isInteger(value) ? count(value) : String(value));
  const block = (name, entries) => h("section", {}, h("h4", {}, name), h("dl", { class: "facts" }, entries.map(([k, v]) => h("div", {}, h("dt", {}, k.replaceAll("_", " ")), h("dd", {}, say(v))))));
  return [
    h("details", { class: "made" }, h("summary", {}, "Data, model, machine and seed"), h("div", { class: "blocks" },
      block("Data", Object.entries(data)), block("Model", [...Object.entries(model), ["parameters", rest.parameters]]),
      block("Run", [["strategy", rest.strategy], ["seed", isNumber(rest.seed) ? String(rest.seed) : rest.seed], ["ease", rest.ease_version],
        ...lines.filter((line) => line.policy).map((line) => [`policy of ${line.name}`, line.policy]), ...(hard ? [["hard set", hard]] : [])]),
      block("Machine", Object.entries(machine))),
      rest.config && [h("h4", {}, "Configuration"), h("pre", { tabindex: 0 }, JSON.stringify(rest.config, null, 2))])];
}

const glossary = () => h("details", { class: "made" }, h("summary", {}, "Words used in this report"),
  h("dl", { class: "glossary" }, Object.entries(GLOSSARY).map(([word, meaning]) => h("div", {}, h("dt", {}, word), h("dd", {}, meaning)))));

// ---------------------------------------------------------------------------------------------------------
// The page

const SECTIONS = [["lines", "Lines", linesSection], ["curves", "Phases and their curves", curvesSection], ["exits", "What each exit is worth", exitsSection],
  ["compute", "Quality against compute", computeSection], ["reliability", "Can confidence be trusted?", reliabilitySection],
  ["explorer", "Exit explorer", explorerSection], ["made", "How it was made", madeSection]];

const subtitle = ({ summary }) => h("p", { class: "subtitle" }, [summary.strategy, summary.data?.name,
  isNumber(summary.parameters) && `${flops(summary.parameters)} parameters`, summary.machine?.device && `on ${summary.machine.device}`,
  isNumber(summary.seed) && `seed ${summary.seed}`].filter(Boolean).join(" · "));
const badge = ({ summary }) => summary.note && h("p", { class: "badge" }, summary.note);
const sections = (run, id, level) => SECTIONS.map(([name, heading, content]) =>
  h("section", { id: `${id}${name}`, class: "part" }, h(level, {}, heading), content(run)));

function single(run) {
  return [h("header", {}, subtitle(run), h("h1", {}, title), badge(run), headline(run)),
    h("nav", { "aria-label": "Sections" }, SECTIONS.map(([name, heading]) => h("a", { href: `#${name}` }, heading))),
    sections(run, "", "h2")];
}

function comparison() {
  const all = (x) => runs.flatMap((run, i) => [
    { name: `${run.label}, thresholds swept`, colour: lineColour(i + 1, runs.length + 1), mark: markName(i), size: 3, points: sweepPoints(run, x) },
    { name: `${run.label}, lines as scored`, colour: lineColour(i + 1, runs.length + 1), mark: markName(i), size: 6, join: false,
      points: operatingPoints(run, x).flatMap((each) => each.points) }]);
  const corpora = new Set(runs.map(({ summary }) => summary.data?.hash ?? summary.data?.name));
  return [h("header", {}, h("p", { class: "subtitle" }, "Comparison"), h("h1", {}, title),
    h("ul", { class: "verdicts" }, runs.map((run) => h("li", { class: `verdict ${run.verdict.tone}` }, h("p", {}, h("span", { class: "tone" }, TONES[run.verdict.tone]), h("b", {}, run.label), ": ", run.verdict.headline),
      small([run.summary.note && capital(run.summary.note), run.verdict.detail].filter(Boolean).join(". "))))),
    corpora.size > 1 && h("p", { class: "badge" }, "These runs were measured on different data: their perplexities do not compare.")),
  h("section", { class: "part", id: "lines" }, h("h2", {}, "Lines, side by side"),
    choices({ "measured on": splitChoices(runs) }, ({ "measured on": split }) => table(`Lines of all runs, measured on the ${splitName(split)}`, LINE_HEAD,
      runs.flatMap((run) => [run.label, ...lineRows(run, split)]))),
    note("Each run's hard set is fixed by its own phase 1: hard-token perplexity compares within a run, not across runs.")),
  h("section", { class: "part", id: "compute" }, h("h2", {}, "Quality against compute"),
    computeChart(all, "Perplexity against compute per token, all runs", `Lower and further left is better. Curves are threshold sweeps, marks are lines as scored: ${[...new Set(runs.flatMap((run) => [splitOf(run), run.summary.sweep?.split]).filter(Boolean))].map(splitName).join(", ")}.`)),
  runs.map((run, i) => h("details", { class: "run" }, h("summary", {}, run.label), subtitle(run), badge(run), headline(run), sections(run, `run${i}-`, "h3")))];
}

document.getElementById("main").replaceChildren(...[runs.length === 1 ? single(runs[0]) : comparison(), glossary(),
  h("footer", {}, `Written by ease${runs[0].summary.ease_version ? ` ${runs[0].summary.ease_version}` : ""}. This file needs no network.`)].flat(Infinity).filter(Boolean));
addEventListener("beforeprint", () => document.querySelectorAll("details:not(.numbers)").forEach((each) => { each.open = true; }));
