"""A model that several threads share: evaluation leaves no trace on it, and the threads do not disturb each other."""

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import ease
from ease.errors import EaseError
from ease.evaluation.tasks import predict
from ease.hf.model import EaseForCausalLM

THREADS = 8


class Sharp(ease.DeepSupervisionTransformer):
    """A model that also has a Dropout module, as one wrapped by LoRA has."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.drop = nn.Dropout(0.5)

    def exit_norm(self, state: torch.Tensor, exit: int) -> torch.Tensor:
        dropped: torch.Tensor = self.drop(super().exit_norm(state, exit))
        return dropped


@pytest.fixture
def fast_switching() -> Iterator[None]:
    """Threads take turns as often as the interpreter allows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def model() -> Sharp:
    torch.manual_seed(0)
    model = Sharp(32, dim=16, num_layers=3, num_heads=2, dropout=0.5, exit_layer=(1, 2), routing_threshold=(0.06, 0.08))
    model.trained_exits = {1, 2, 3}
    return model


def uses(model: Sharp) -> dict[str, Callable[[int], Any]]:
    """Every evaluating call of the library, by name; the number selects the prompt."""
    torch.manual_seed(1)
    prompts = [torch.randint(32, (2, 6)) for _ in range(THREADS)]
    exact: dict[str, Any] = {"mode": "exact", "draft_exit": 1}
    return {
        "full": lambda i: ease.generate(model, prompts[i], 2 + 2 * i).tokens,
        "routed": lambda i: ease.generate(model, prompts[i], 2 + 2 * i, "routed").exits,
        "exact": lambda i: ease.generate(model, prompts[i], 2 + 2 * i, **exact).tokens,
        "sampled": lambda i: ease.generate(model, prompts[i], 8, temperature=1.0, seed=i).tokens,
        "route": lambda i: ease.route(model, prompts[i]).confidences,
        "score": lambda i: ease.score(model, [(prompts[i], prompts[i])], model.policy).losses,
        "predict": lambda i: predict(model, prompts[i], policy=model.policy)[0],
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["full", "routed", "exact", "sampled", "route", "score", "predict"])
def test_eight_threads_on_one_model_give_the_answers_of_one(
    model: Sharp, name: str, training: bool, fast_switching: None
) -> None:
    use = uses(model)[name]
    expected = [uses(model.eval())[name](i) for i in range(THREADS)]
    model.train(training)
    wrong, start = [], threading.Barrier(THREADS)

    def serve(i: int) -> None:
        start.wait()
        for _ in range(2):
            if not torch.equal(use(i), expected[i]):
                wrong.append(i)
            if i == 0:
                model.train(training)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("name", ["full", "routed", "exact", "route", "score", "predict"])
def test_the_mode_that_another_thread_sees_stays(model: Sharp, name: str) -> None:
    seen: list[bool] = []
    model.output_head.register_forward_hook(lambda *_: seen.append(all(part.training for part in model.modules())))
    uses(model)[name](1)
    assert seen
    assert all(seen)
    assert model.policy == ease.Policy((1, 2), (0.06, 0.08))


def test_evaluation_is_in_evaluation_mode_while_another_thread_sets_training_mode(model: Sharp) -> None:
    expected = ease.score(model, [(torch.ones(1, 9, dtype=torch.long),) * 2]).losses
    model.eval()

    def interfere(*_: Any) -> None:
        model.train()

    model.layers[0].register_forward_hook(interfere)
    assert torch.equal(ease.score(model, [(torch.ones(1, 9, dtype=torch.long),) * 2]).losses, expected)


def test_a_transformers_model_answers_eight_threads(model: Sharp) -> None:
    wrapped = EaseForCausalLM.wrap(model).eval()
    torch.manual_seed(1)
    prompts = [torch.randint(32, (1, 5)) for _ in range(THREADS)]

    def answer(i: int) -> torch.Tensor:
        tokens: torch.Tensor = wrapped.generate(prompts[i], max_new_tokens=3 + i, do_sample=False)
        return tokens

    expected, answers = [answer(i) for i in range(THREADS)], {}
    threads = [threading.Thread(target=lambda i=i: answers.update({i: answer(i)})) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(answers[i], expected[i]) for i in range(THREADS))


def test_a_model_whose_weights_are_offloaded_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    ids = torch.randint(32, (1, 5))
    model = ease.DeepSupervisionTransformer(32, 16, 2, 2).eval()
    expected = model(ids)
    wrapped = EaseForCausalLM.wrap(model, pad_token_id=0)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(ids), expected)  # at full depth each module loads its own weights
    calls: list[Callable[[], Any]] = [
        lambda: ease.generate(model, ids, 3),
        lambda: ease.route(model, ids),
        lambda: ease.score(model, [(ids, ids)]),
        lambda: wrapped.generate(ids, max_new_tokens=3),
    ]
    for call in calls:
        with pytest.raises(EaseError, match="the weights of the model are not on a device"):
            call()
