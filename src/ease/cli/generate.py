"""`ease generate`: continue a text, each token coloured by its exit."""

from dataclasses import dataclass

from ease.errors import EaseError, check_text

USAGE = "MODEL --prompt TEXT [--mode M]"
HELP = "continue a text, its tokens coloured by exit"


COLOURS = ("green", "cyan", "blue", "magenta", "red", "yellow")


def main(args: list[str]) -> None:
    from typing import Literal

    import torch
    import tyro
    from rich.console import Console
    from rich.text import Text
    from tokenizers.decoders import DecodeStream

    import ease
    from ease.devices import choose_device
    from ease.generation.request import Token
    from ease.runs.reopen import load_start

    @dataclass(frozen=True)
    class Arguments:
        """Continue a text and show at which exit each token was decided."""

        model: tyro.conf.Positional[str]
        """Folder of a run, or a Llama-family checkpoint (a folder, or a name on the Hugging Face hub)."""
        prompt: str
        """The text to continue."""
        mode: Literal["full", "routed", "exact"] | None = None
        """Every layer; leave where an exit is sure; or draft at an exit and check, which gives the tokens of full.
        (Routed by default, where the model has a policy.)"""
        max_new_tokens: int | None = None
        """Tokens to add at most (100 by default, or as many as the model has positions for)."""
        threshold: float | None = None
        """Confidence in [0, 1] at which a token leaves, at every exit (the model's own policy by default).
        For mode routed."""
        draft_exit: int | None = None
        """In mode exact, the exit that drafts (the fastest, as measured on the way, by default)."""
        temperature: float = 0.0
        """0 takes the likeliest token; otherwise one is drawn."""
        top_k: int | None = None
        """Draw among the k likeliest only."""
        top_p: float | None = None
        """Draw among the likeliest that together have this probability."""
        repetition_penalty: float = 1.0
        """Above 1 makes tokens that came before less likely."""
        seed: int | None = None
        """Of the draws."""
        device: str = "auto"
        """auto, cpu, cuda or mps."""

    given = tyro.cli(Arguments, args=args, prog="ease generate")
    check_text("the prompt", given.prompt)
    if given.threshold is not None and given.mode in ("full", "exact"):
        raise EaseError(f"--threshold is for mode routed, and this is {given.mode}: leave it out")
    model, tokenizer, eos = load_start(given.model)
    model.to(choose_device(given.device))
    if given.threshold is not None:
        exits = ease.Policy.own(model).exits or model.early_exits
        if not exits:
            raise EaseError(f"{given.model} has no exits to route at: leave out --threshold, or tune it first")
        model.exit_layer, model.routing_threshold = exits, (given.threshold,) * len(exits)
    routes = bool(ease.Policy.own(model).exits)
    if given.mode == "routed" and not routes:
        raise EaseError(f"{given.model} says at no exit who leaves: add --threshold, or use --mode full")
    mode = given.mode or ("routed" if routes else "full")
    ids = tokenizer.encode(given.prompt).ids
    if not ids:
        raise EaseError("the prompt is empty: give it a few words")
    most = model.config.max_positions
    fitting = 100 if most is None else max(1, min(100, most + 1 - len(ids)))

    console, stream = Console(highlight=False), DecodeStream(skip_special_tokens=True)
    colours: dict[int, str] = {}

    def show(token: Token) -> None:
        if not colours:  # not before the first token, so that nothing stands before a refusal
            console.print(Text(given.prompt), end="", soft_wrap=True)
        colour = colours.setdefault(token.exit, COLOURS[len(colours) % len(COLOURS)])
        if piece := stream.step(tokenizer, token.token):
            console.print(Text(piece, style=colour), end="", soft_wrap=True)

    answer = ease.generate(
        model,
        torch.tensor([ids]),
        fitting if given.max_new_tokens is None else given.max_new_tokens,
        mode,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        repetition_penalty=given.repetition_penalty,
        stop=() if eos is None else eos,
        seed=given.seed,
        stream=show,
        draft_exit="auto" if given.draft_exit is None else given.draft_exit,
    )
    console.print()
    shares = [(exit, answer.exits.eq(exit).double().mean().item()) for exit in sorted(colours)]
    where = ", ".join(f"[{colours[exit]}]layer {exit}: {share:.0%}[/]" for exit, share in shares)
    stats = answer.stats
    Console(stderr=True, highlight=False).print(
        f"{stats['tokens']} tokens, {stats['tokens_per_second']:.1f} a second; decided at {where}; "
        f"{stats['layers_per_token']:.1f} of {model.num_layers} layers run a token"
        + (f"; {stats['acceptance']:.0%} of the drafts accepted" if stats.get("acceptance") is not None else ""),
        soft_wrap=True,
    )
