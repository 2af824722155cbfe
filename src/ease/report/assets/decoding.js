// The ways to decode, side by side: speed, tokens and what each way is.

const WAYS = {
  full:
    "Every layer runs for every token. In a small model a step's time goes into starting operations, not into " +
    "arithmetic.",
  routed:
    "A token leaves at the first exit that is sure of it, and only rows still on their way run the deeper layers. The " +
    "exit's head and the choice of rows come on top, and in a batch a step is short only if every row leaves early. " +
    "After the first other token a text goes its own way, so the share of same tokens is no measure of quality.",
  exact:
    "An exit drafts, the remaining layers check the drafts in one pass, and the tokens come out as full's. Every " +
    "token costs two heads, drafts that are thrown away cost layers, and in a batch all rows wait for the longest " +
    "draft. Auto tries the exits on the way and goes on in full where none is faster, or trying takes too much of a " +
    "short text.",
};

function decodingSection(run) {
  const { generation, machine } = run.summary;
  const rows = generation?.rows ?? [];
  if (rows.length === 0)
    return empty("This run did not time decoding: it has no exits, or it was made before runs did.");
  const most = Math.max(...rows.map((row) => row.ratio).filter(isNumber));
  const drafting = ({ way, draft_exit: exit }) => {
    if (way !== "exact, auto") return null;
    return h("small", isNumber(exit) ? `drafted at exit ${exit}` : "went on in full");
  };
  const cells = (row) => [
    [row.way, drafting(row)],
    isNumber(row.tokens_per_second) ? count(Math.round(row.tokens_per_second)) : "–",
    barred(row.ratio, most, fixed(2)(row.ratio)),
    `${fixed(2)(row.low)} to ${fixed(2)(row.high)}`,
    fixed(2)(row.layers_per_token),
    percent(row.same_tokens),
    percent(row.acceptance),
  ];
  const batches = [...new Set(rows.map((row) => row.batch))];
  const on = [machine?.cpu, isNumber(machine?.threads) && `${machine.threads} thread${machine.threads === 1 ? "" : "s"}`].filter(Boolean);
  return [
    run.decoding && h("p", run.decoding),
    table(
      `${capital(generation.line ?? "the model")} writes ${count(generation.new_tokens)} tokens after ` +
        `${count(generation.prompt_tokens)} of the ${splitName(generation.split)}, greedily`,
      [
        "way",
        "tokens/s",
        "times the speed of full",
        "range",
        "layers run per token",
        "same tokens as full",
        "drafts accepted",
      ],
      batches.flatMap((batch) => [
        batch === 1 ? "One row alone" : `${batch} rows together`,
        ...rows.filter((row) => row.batch === batch).map(cells),
      ]),
    ),
    h("dl.glossary", Object.entries(WAYS).map(([way, words]) => h("div", h("dt", way), h("dd", words)))),
    note(
      `Wall-clock on ${on.join(", ") || "a machine that was not recorded"}: the median of ${count(generation.rounds)} ` +
        "rounds in which the ways take turns, and the range over the rounds. Layers run per token count the prompt's.",
    ),
  ];
}
