// Decoding speed: every mode compared with full decoding.

const MODES = {
  full:
    "Every layer runs for every token. In a small model, most of a step's time is overhead of starting operations, not " +
    "arithmetic.",
  routed:
    "A token exits at the first exit whose confidence suffices, and only the remaining rows run the deeper layers. The " +
    "exit's head and the selection of rows cost extra, and in a batch a step is short only if every row exits early. " +
    "After the first different token the texts diverge, so the share of same tokens does not measure quality.",
  exact:
    "A source drafts (the row's own text, a draft brick, or an exit), one pass of the model checks several drafts, and " +
    "the tokens are those of full decoding. Rejected drafts cost layers. Auto measures the sources during decoding and " +
    "continues with the fastest.",
};

function decodingSection(run) {
  const { generation, machine } = run.summary;
  const rows = generation?.rows ?? [];
  if (rows.length === 0)
    return empty("This run did not time decoding: it has no exits, or an earlier version of ease wrote it.");
  const most = Math.max(...rows.map((row) => row.ratio).filter(isNumber));
  const drafting = ({ way, draft_source: source }) => {
    if (way !== "exact, auto" || !source) return null;
    return h("small", source === "none" ? "continued in full" : `most tokens by ${source}`);
  };
  const cells = (row) => [
    [row.way, drafting(row)],
    isNumber(row.tokens_per_second) ? count(Math.round(row.tokens_per_second)) : "–",
    barred(row.ratio, most, fixed(2)(row.ratio)),
    `${fixed(2)(row.low)} to ${fixed(2)(row.high)}`,
    fixed(2)(row.layers_per_token),
    percent(row.same_tokens),
    percent(row.acceptance),
    fixed(2)(row.tokens_per_round),
  ];
  const batches = [...new Set(rows.map((row) => row.batch))];
  const on = [machine?.cpu, isNumber(machine?.threads) && plural(machine.threads, "thread")].filter(Boolean);
  return [
    run.decoding && h("p", run.decoding),
    table(
      `Greedy decoding of ${generation.line ?? "the model"}: ${plural(generation.new_tokens, "new token")} after a ` +
        `prompt of ${plural(generation.prompt_tokens, "token")} from the ${splitName(generation.split)}`,
      [
        "mode",
        "tokens/s",
        "speed, full = 1",
        "range of speed",
        "layers run per token",
        "same tokens as full",
        "drafts accepted",
        "tokens per pass",
      ],
      batches.flatMap((batch) => [
        batch === 1 ? "Single row" : `Batch of ${batch} rows`,
        ...rows.filter((row) => row.batch === batch).map(cells),
      ]),
    ),
    h("dl.glossary", Object.entries(MODES).map(([way, words]) => h("div", h("dt", way), h("dd", words)))),
    note(
      `Wall-clock time on ${on.join(", ") || "an unrecorded machine"}: median and range of the speed over ` +
        `${plural(generation.rounds, "round")}, in each of which every mode decodes once. Tokens/s is the median of full ` +
        "decoding times this speed. Layers run per token include the prompt.",
    ),
  ];
}
