"""`ease serve`: answer requests of OpenAI clients."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ease.errors import EaseError, check_integer, first_line, require

USAGE = "MODEL [--mode M] [--host H] [--port P]"
HELP = "answer OpenAI clients with the server of transformers"


def main(args: list[str]) -> None:
    """Serve a model until an interrupt."""
    from typing import Literal

    import tyro

    from ease.cli.decoding import check_threshold

    @dataclass(frozen=True)
    class Arguments:
        """Serve a model with transformers' OpenAI-compatible server, also streamed."""

        model: tyro.conf.Positional[str]
        """Run folder, or Llama-family checkpoint (a folder, a name on the Hugging Face hub, or a GGUF file). Clients
        call the model by this name."""
        mode: Literal["full", "routed", "exact"] | None = None
        """full runs every layer; routed exits early where the confidence suffices; exact drafts tokens and checks the
        drafts, which gives the tokens of full up to rounding (routed by default if the model has a policy, else
        full)."""
        threshold: float | None = None
        """For mode routed: confidence in [0, 1] from which on a token exits, the same at every exit (the model's own
        policy by default)."""
        host: str = "localhost"
        """Address to listen at; 0.0.0.0 for requests from other machines. The server asks for no key."""
        port: int = 8000
        """Port to listen at; 0 for a free one."""
        dtype: Literal["float32", "bfloat16"] = "float32"
        """dtype of the weights of a checkpoint; a run has its own."""
        device: str = "auto"
        """auto, cpu, cuda or mps."""

    given = tyro.cli(Arguments, args=args, prog="ease serve", config=(tyro.conf.FlagCreatePairsOff,))
    check_threshold(given.mode, given.threshold)
    check_integer("--port", given.port, 0, 65535)
    for package in ("fastapi", "uvicorn", "openai", "transformers.cli.serving.server"):
        require(package, "serve")
    from transformers.utils import logging

    from ease.cli.console import error_console
    from ease.cli.decoding import choose_mode, default_sampling, statistics
    from ease.devices import choose_device
    from ease.generation.request import Token
    from ease.hf.serving import server
    from ease.runs.reopen import load_start

    logging.set_verbosity_error()  # the server warns of each request
    console = error_console()

    def say(line: str) -> None:
        console.print(f"ease: {line}", soft_wrap=True, markup=False)

    def report(answer: Sequence[Token], stats: dict[str, Any]) -> None:
        say(statistics(stats, [token.exit for token in answer], model.num_layers))

    with _bound(given.host, given.port) as listening:  # before the model is loaded, which may take minutes
        model, tokenizer, _, stop, checkpoint = load_start(given.model, given.dtype)
        mode = choose_mode(given.model, model, given.mode, given.threshold)
        model.to(choose_device(given.device))
        serving = server(
            model,
            tokenizer,
            checkpoint=checkpoint,
            name=given.model,
            mode=mode,
            stop=stop,
            sampling=default_sampling(checkpoint),
            report=report,
        )
        listening.listen()
        host, port = listening.getsockname()[:2]
        say(f"serving {given.model} in mode {mode} at http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        try:
            serving.run(sockets=[listening])
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the server has stopped") from None


def _bound(host: str, port: int) -> socket.socket:
    """A socket with this address, which does not listen yet.

    Raises:
        EaseError: there is no such host, or the port is in use or not allowed.
    """
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except OSError as error:
        if bound is not None:
            bound.close()
        raise EaseError(
            f"port {port} of {host} cannot be listened at ({error.strerror or first_line(error)}): choose others with "
            "--host and --port"
        ) from error
