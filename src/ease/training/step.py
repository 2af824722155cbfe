"""One training step: the weighted loss over exits, and its FLOPs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ease.flops import exit_flops, run_flops
from ease.interface import Batch, ExitModel
from ease.training.config import TrainingConfig
from ease.training.distributed import first_process, place, total_count
from ease.training.losses import CrossEntropy, Term, exit_loss
from ease.training.phases import Step
from ease.training.selection import scored_selector


def step_loss(
    model: ExitModel,
    config: TrainingConfig,
    batch: Batch,
    first: int = 0,
    step: Step | None = None,
    continued: dict[int, Tensor] | None = None,
    exit_losses: dict[int, Tensor] | None = None,
) -> Tensor:
    """The weighted loss of a batch: one pass up to the deepest weighted layer, a head only where there is a weight.

    Args:
        batch: inputs and targets; on the host their masks are evaluated without waiting for the device. A `state`
            enters layer `first`.
        first: the first layer that learns; the layers below run without gradients.
        step: loss weights and layer dropout of this step, instead of the configuration's.
        continued: filled with the tokens (B, T) that continued past each exit where the selection chose.
        exit_losses: filled with the mean loss (nats) at each weighted layer, where gradients are enabled.

    Returns:
        A scalar, in nats. Of several processes, each gets the part of its own tokens; the loss is their sum.
    """
    weights, skip = step or Step(config.weights)
    last, objective, selection = model.num_layers, config.objective, config.selection
    deepest = last if objective.teacher else max(weights)
    choices = [exit for exit, share in selection.keep.items() if exit < deepest and share < 1]
    learns = torch.is_grad_enabled()
    device, on_host = next(model.parameters()).device, batch
    batch = batch.to(device)
    at = 0 if batch.state is None else max(0, first - 1)
    with torch.set_grad_enabled(learns and first <= model.first_exit):
        state = model.embed(batch.x, layout=batch.layout) if batch.state is None else batch.state
    terms: list[Term] = []
    masks: list[Tensor] = []  # (B, T) the scored tokens of each term, where `on_host` is
    auxiliary: list[Tensor] = []
    pick = scored_selector(on_host.scored, device)
    num_scored = max(1, total_count(len(pick(batch.y)))) if selection.scores_once else 0
    for layer in pause_layers(at, first, [*weights, *choices, deepest], skip):
        running = on_host.active if layer >= first else None  # the frozen trunk runs all tokens
        if layer in skip:
            before, rows = place(len(batch.x))
            drawn = first_process(torch.rand(rows))[before : before + len(batch.x)]
            stays = (drawn >= skip[layer])[:, None].expand(batch.x.shape)
            running = stays if running is None else running & stays.to(running.device)
        with torch.set_grad_enabled(learns and layer >= first):
            state = model.run(state, at + 1, layer, layout=batch.layout, active=running)
        at = layer
        selected = selection.select(model, state, layer, on_host) if layer in choices else None
        if selected is not None and selected.loss is not None:
            auxiliary.append(selected.loss)
        if layer in weights:
            scored = on_host.scored if selected is None else selected.scored
            pick = scored_selector(scored, device)
            targets = pick(batch.y)
            # If a token is scored only where it leaves, every token has the same weight, whatever the shares are.
            weight = weights[layer] * (total_count(len(targets)) / num_scored if selection.scores_once else 1)
            term_objective = objective if layer < last else CrossEntropy()
            normed, softcap = model.exit_norm(pick(state), layer), model.config.logit_softcap
            term = Term(normed, targets, weight, term_objective, softcap=softcap, num_scored=len(targets), exit=layer)
            terms.append(term)
            masks.append(scored)
        if selected is not None:
            on_host = on_host._replace(active=selected.continuing)
            pick = scored_selector(on_host.scored, device)
            if continued is not None:
                continued[layer] = selected.continuing
    if learns:
        model.trained_exits |= set(weights)
    if objective.teacher:
        with torch.no_grad():
            teacher = model.exit_norm(pick(state), last)
        pairs = zip(terms, masks, strict=True)
        terms = [part for term, scored in pairs for part in term.taught(on_host.scored[scored], teacher)]
    return exit_loss(model.output_head.weight, terms, exit_losses) + selection.weight * sum(auxiliary)


def step_flops(
    model: ExitModel,
    config: TrainingConfig,
    batch: Batch,
    scored: int,
    first: int = 0,
    step: Step | None = None,
    continued: Mapping[int, Tensor] = {},
) -> dict[str, float]:
    """FLOPs of one training step by kind: layers that learn cost three times their forward, the frozen trunk once.

    Args:
        scored: number of scored tokens in the batch.
        first, step: as in `step_loss`.
        continued: as `step_loss` filled it.

    Returns:
        FLOPs of "training" and of the "trunk".
    """
    weights, skip = step or Step(config.weights)
    shape, last, teacher = model.config, model.num_layers, config.objective.teacher
    deepest = last if teacher else max(weights)
    trunk = run_flops(shape, min(max(0, first - 1), deepest), batch._replace(active=None).running, batch.layout)
    # A frozen head passes a gradient on but needs none of its own.
    factor = 3 if model.output_head.weight.requires_grad else 2
    training: float = 0
    below = -1
    for exit in [*continued, deepest]:
        layers = sum(1 - skip.get(layer, 0.0) for layer in range(max(1, first, below + 1), exit + 1))
        training += 3 * layers * run_flops(shape, 1, batch.running, batch.layout)
        heads = scored
        if exit in continued:
            training += config.selection.flops(shape, exit, int(batch.running.sum()), scored)
            batch = batch._replace(active=continued[exit].to(batch.x.device))
            scored = int(batch.scored.sum())
            heads -= scored if config.selection.scores_once else 0
        training += factor * sum(exit_flops(shape, heads, layer) for layer in weights if below < layer <= exit)
        below = exit
    # At each exit the teacher's head is evaluated for the tokens that reached the last layer.
    training += teacher * sum(exit_flops(shape, scored, layer) for layer in weights if layer < last)
    return {"training": training, "trunk": trunk if batch.state is None else batch.flops}


def pause_layers(at: int, first: int, exits: Iterable[int], skip: Iterable[int]) -> list[int]:
    """The layers above `at` after which a training forward pauses, up to the deepest exit.

    It pauses at exits, at the end of the trunk below layer `first`, and around layers that may be skipped.
    """
    exits, skip = set(exits), set(skip)
    pauses = exits | skip | {layer - 1 for layer in skip} | {first - 1}
    return sorted(layer for layer in pauses if at < layer <= max(exits) or layer == at == 0)
