"""`ease generate`: continue a text and color each token by its exit."""

from dataclasses import dataclass

from ease.errors import EaseError, check_text

USAGE = "MODEL --prompt TEXT [--chat] [--mode M]"
HELP = "continue a text, its tokens colored by exit"

COLORS = ("green", "cyan", "blue", "magenta", "red", "yellow")


def main(args: list[str]) -> None:
    """Generate a continuation of the prompt and print it token by token."""
    from pathlib import Path

    import torch
    import tyro
    from rich.text import Text
    from tokenizers.decoders import DecodeStream

    from ease.cli.console import error_console, output_console
    from ease.cli.decoding import check_threshold, choose_mode, default_sampling, statistics
    from ease.data.counts import CountTable
    from ease.devices import choose_device
    from ease.generation.decode import DraftSource, Mode, generate
    from ease.generation.request import Token
    from ease.hf.prompting import chat_prompt
    from ease.runs.reopen import count_table, load_start

    @dataclass(frozen=True)
    class Arguments:
        """Continue a text and show at which exit each token was predicted."""

        model: tyro.conf.Positional[str]
        """Run folder, or Llama-family checkpoint (a folder, a name on the Hugging Face hub, or a GGUF file)."""
        prompt: str
        """The text to continue."""
        chat: bool = False
        """Take the prompt as a user's message: the chat template of the checkpoint makes the text to continue."""
        split_special_tokens: bool | None = None
        """Whether a special token that the prompt spells, such as <|im_start|>, stays text (by default as the
        tokenizer of a checkpoint says, and as a run was trained)."""
        mode: Mode | None = None
        """full runs every layer; routed exits early where the confidence suffices; exact drafts tokens and checks
        several at once, which gives the tokens of full up to rounding (routed by default if the model has a policy,
        else full)."""
        max_new_tokens: int | None = None
        """Largest number of new tokens (100 by default, or as many as the model has positions for)."""
        threshold: float | None = None
        """For mode routed: confidence in [0, 1] from which on a token exits, the same at every exit (the model's own
        policy by default)."""
        draft_source: DraftSource | None = None
        """For mode exact: what drafts, see the guide on generation (by default the fastest, measured during
        decoding)."""
        draft_exit: int | None = None
        """For mode exact: the exit that drafts (by default the fastest, measured during decoding)."""
        count_table: str | None = None
        """For mode exact: a file of CountTable.save, to draft from the text that it counted; "train" makes one of the
        training text of a run and keeps it in the run folder."""
        temperature: float | None = None
        """0 chooses the most likely token; above 0 tokens are sampled. What is not given of this and the next three
        options is that of the checkpoint's generation_config.json, or else 0 and no limit."""
        top_k: int | None = None
        """Sample among the k most likely tokens."""
        top_p: float | None = None
        """Sample among the most likely tokens that together have this probability."""
        repetition_penalty: float | None = None
        """Values above 1 make tokens that occurred before less likely."""
        seed: int | None = None
        """Random seed of the sampling."""
        device: str = "auto"
        """auto, cpu, cuda or mps."""

    given = tyro.cli(Arguments, args=args, prog="ease generate", config=(tyro.conf.FlagCreatePairsOff,))
    check_text("the prompt", given.prompt)
    check_threshold(given.mode, given.threshold)
    if given.chat and given.split_special_tokens:
        raise EaseError("--split-special-tokens True would also split the tokens of the chat template: leave one out")
    model, tokenizer, _, stop, checkpoint = load_start(given.model, split_special_tokens=given.split_special_tokens)
    prompt = given.prompt
    if given.chat:
        if checkpoint is None:
            raise EaseError(f"{given.model} did not start from a checkpoint with a chat template: leave out --chat")
        prompt = chat_prompt(checkpoint, given.prompt)
    defaults = default_sampling(checkpoint)
    options = {name: getattr(given, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")}
    stated = {name: value for name, value in options.items() if value is not None}
    if stated.get("temperature") == 0:
        defaults = {name: value for name, value in defaults.items() if name == "repetition_penalty"}
    model.to(choose_device(given.device))
    mode = choose_mode(given.model, model, given.mode, given.threshold)
    ids = tokenizer.encode(prompt, add_special_tokens=not given.chat).ids  # the template has written its own
    if not ids:
        raise EaseError("the prompt is empty: give it a few words")
    limit = model.config.max_positions
    default_tokens = 100 if limit is None else max(1, min(100, limit + 1 - len(ids)))

    table = None
    if given.count_table is not None and mode != "exact":  # before one is made
        raise EaseError(f"--count-table applies to mode exact, not {mode}: leave it out")
    if given.count_table == "train":
        table = count_table(Path(given.model))
    elif given.count_table is not None:
        table = CountTable.load(given.count_table)
    console, stream = output_console(), DecodeStream(skip_special_tokens=True)
    colors: dict[int, str] = {}

    def show(token: Token) -> None:
        if not colors:  # with the first token, so that an error has no output before it
            console.print(Text(prompt), end="", soft_wrap=True)
        color = colors.setdefault(token.exit, COLORS[len(colors) % len(COLORS)])
        if piece := stream.step(tokenizer, token.token):
            console.print(Text(piece, style=color), end="", soft_wrap=True)

    answer = generate(
        model,
        torch.tensor([ids]),
        default_tokens if given.max_new_tokens is None else given.max_new_tokens,
        mode,
        **(defaults | stated),
        stop=stop,
        seed=given.seed,
        stream=show,
        draft_source=given.draft_source or "auto",
        draft_exit="auto" if given.draft_exit is None else given.draft_exit,
        count_table=table,
    )
    console.print()
    error_console().print(statistics(answer.stats, answer.exits[0].tolist(), model.num_layers, colors), soft_wrap=True)
