"""Promise 2: exact decoding gives the tokens of full greedy decoding for every row, and with sampling the distribution.

The reference uses neither cache nor drafts: it runs whole texts at full depth, and a text is the result of greedy
decoding if each of its new tokens is the most likely one after the tokens before it. The tests use float64, and at
every exit 10 to 90% of the drafts are accepted; one test counts what rounding changes in other dtypes.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ease import CountTable, Generation, Layout, StandardTransformer, generate
from ease.generation.sources import BrickSource, TextSource

Make = Callable[..., StandardTransformer]
LAYERS, VOCAB = 4, 256


class Clock:
    """A clock whose pace changes at every reading, so that drafting, timed later, appears slower or faster."""

    now, pace, change = 0.0, 1.0, 1.0

    def perf_counter(self) -> float:
        self.now, self.pace = self.now + self.pace, self.pace * self.change
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("ease.generation.decode.time", made)
    monkeypatch.setattr("ease.generation.exact.time", made)
    return made


def prompts(vocab: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Random prompts of 1 to `width` tokens, padded on either side, and their mask."""
    lengths, left, place = torch.randint(1, width + 1, (rows, 1)), torch.rand(rows, 1) < 0.5, torch.arange(width)
    return torch.randint(vocab, (rows, width)), torch.where(left, place >= width - lengths, place < lengths)


def answers(generated: Generation) -> list[list[int]]:
    """The tokens of each row up to its end."""
    return [row[: int(exits.gt(0).sum())] for row, exits in zip(generated.tokens.tolist(), generated.exits)]


# Greedy


@torch.no_grad()
def greedy(
    model: StandardTransformer, prompts: list[list[int]], answered: list[list[int]], penalty: float
) -> list[list[int]]:
    """The most likely token at each place of the answers, given the tokens before it."""
    texts = [prompt + answer for prompt, answer in zip(prompts, answered)]
    T = max(map(len, texts))
    ids = torch.tensor([text + [0] * (T - len(text)) for text in texts])
    mask = torch.tensor([[True] * len(text) + [False] * (T - len(text)) for text in texts])
    logits = model.logits(model.run(model.embed(ids), 1, LAYERS, layout=Layout.from_attention_mask(mask)), LAYERS)
    seen = torch.nn.functional.one_hot(ids, logits.shape[-1]).cumsum(1) > 0
    logits = logits.where(~seen, torch.where(logits > 0, logits / penalty, logits * penalty))
    best = logits.argmax(-1).tolist()
    return [row[len(prompt) - 1 : len(text) - 1] for row, prompt, text in zip(best, prompts, texts)]


@pytest.mark.parametrize("source", ["full", 1, 2, 3, "lookup", "brick", "none", "auto"])
def test_every_token_equals_that_of_full_greedy_decoding(source: Any, tiny: Make, clock: Clock) -> None:
    counts, chosen = Counter[str](), set[str]()
    # An untrained brick is right by chance only, so its vocabulary is small. The search for the best source takes time.
    vocab, longer = (6, 1) if source == "brick" else (VOCAB, 4 if source == "auto" else 1)
    options: dict[str, Any] = {"draft_exit": source} if isinstance(source, int) else {"draft_source": source}

    @settings(max_examples=20)
    @given(
        seed=st.integers(0, 99),
        rows=st.sampled_from((64, 1, 64, 48)),
        width=st.integers(1, 9),
        steps=st.integers(1, 24),
        least=st.sampled_from((0.1, 0.3, 0.6, None)),
        penalty=st.sampled_from((1.0, 1.3, 0.8)),
        stops=st.integers(0, 20),
        change=st.sampled_from((0.8, 1.25)),
    )
    def check(
        seed: int, rows: int, width: int, steps: int, least: float | None, penalty: float, stops: int, change: float
    ) -> None:
        clock.now, clock.pace, clock.change = 0.0, 1.0, change
        steps *= longer
        model = tiny(LAYERS, seed=seed, vocab_size=vocab, sharp=True, num_kv_heads=2).double()
        model.trained_exits = {1, 2, 3}
        model.add_draft_brick(torch.arange(vocab - 1), torch.randn(64, model.config.dim).double())
        (ids, mask), stop = prompts(vocab, rows, width), set(range(stops * vocab // VOCAB))
        shared: dict[str, Any] = {"attention_mask": mask, "repetition_penalty": penalty, "stop": tuple(stop)}
        if source == "full":
            generated = generate(model, ids, steps, **shared)
        else:
            least = None if source == "none" else least
            generated = generate(model, ids, steps, "exact", draft_confidence=least, **options, **shared)
        answered = answers(generated)
        assert answered == greedy(model, [row[real].tolist() for row, real in zip(ids, mask)], answered, penalty)
        for answer in answered:
            assert len(answer) == steps or answer[-1] in stop
            assert not stop.intersection(answer[:-1])
            counts["stopped"] += answer[-1] in stop
        counts["prompts"] += rows
        for key in ("drafted", "accepted"):
            counts[key] += generated.stats.get(key, 0) if least is not None else 0  # a price depends on the clock
        chosen.add(generated.stats.get("draft_source", "full"))

    check()
    assert counts["prompts"] > 400
    assert counts["stopped"] > 50 or vocab < VOCAB
    if source not in ("full", "none", "auto"):
        assert 0.1 <= counts["accepted"] / counts["drafted"] <= 0.9
    assert source != "auto" or len(chosen) > 1, f"auto always chose {chosen}"


def test_drafts_that_are_all_accepted_change_no_token(tiny: Make) -> None:
    """New layers start as the identity, so the old last exit drafts exactly the tokens of the new one."""
    model = tiny(2, sharp=True).double().grow(LAYERS).eval()
    ids, mask = prompts(VOCAB, 16, 9)
    generated = generate(model, ids, 100, "exact", attention_mask=mask, draft_exit=2, draft_confidence=0.0)
    answered = answers(generated)
    assert answered == greedy(model, [row[real].tolist() for row, real in zip(ids, mask)], answered, 1.0)
    assert generated.stats["acceptance"] == 1
    assert set(map(len, answered)) == {100}


# Relative distance, of the largest logit, within which two logits may change places: what rounding moves a logit by in
# a few layers.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}


@pytest.mark.parametrize("dtype", ROUNDING)
def test_in_every_dtype_a_row_differs_from_full_only_from_a_tie_on(dtype: torch.dtype, tiny: Make) -> None:
    model, rows, differing = tiny(LAYERS, sharp=True).to(dtype), 48, 0
    ids = torch.randint(VOCAB, (rows, 8))
    full = generate(model, ids, 40).tokens
    exact = generate(model, ids, 40, "exact", draft_exit=2).tokens
    for prompt, one, other in zip(ids, full, exact):
        if torch.equal(one, other):
            continue
        differing += 1
        place = int((one != other).nonzero()[0])
        with torch.no_grad():
            logits = model(torch.cat([prompt, one[:place]])[None])[0, -1].double()
        margin = (logits[torch.stack((one[place], other[place]))] - logits.max()).abs().max() / logits.abs().max()
        assert margin <= ROUNDING[dtype], f"token {place} differs at a margin of {margin:.2g}"
    print(f"{dtype}: {differing} of {rows} rows differ from full decoding, all from a tie on")
    assert differing == 0 if dtype == torch.float64 else differing <= rows / 2


# Sampling


FEW = 5  # tokens in the vocabulary, so that every answer occurs often enough to be counted
LENGTH, ROWS = 4, 2000
PROMPTS = ([1, 4, 2], [3])
DRAWS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.6},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.2, "repetition_penalty": 1.8},
    {"temperature": 1.3, "top_k": 4, "top_p": 0.9, "repetition_penalty": 0.7, "stop": 2},
]


def chances(
    logits: list[float],
    text: list[int],
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> dict[int, float]:
    """The probability of each token that can follow a text."""
    for token in set(text):
        logits[token] *= 1 / repetition_penalty if logits[token] > 0 else repetition_penalty
    weights = sorted(((math.exp(logit / temperature), token) for token, logit in enumerate(logits)), reverse=True)
    total, before, kept = sum(weight for weight, _ in weights[:top_k]), 0.0, {}
    for weight, token in weights[:top_k]:
        if before < top_p * total:
            kept[token] = weight
        before += weight
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


@torch.no_grad()
def distribution(
    model: StandardTransformer, prompt: list[int], stop: int = -1, **options: Any
) -> dict[tuple[int, ...], float]:
    """The probability of each answer; an answer ends at `stop` or at the full length."""
    probabilities: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for answer, chance in probabilities.items():
            if answer[-1:] == (stop,):
                longer[answer] = chance
                continue
            text = [*prompt, *answer]
            for token, share in chances(model(torch.tensor([text]))[0, -1].tolist(), text, **options).items():
                longer[*answer, token] = chance * share
        probabilities = longer
    return probabilities


def p_value(tables: list[tuple[Counter[tuple[int, ...]], dict[tuple[int, ...], float]]]) -> float:
    """The p value of the counts under the expected probabilities (Pearson's chi-squared test)."""
    statistic, freedom = 0.0, 0
    for counted, expected in tables:
        if not counted.keys() <= expected.keys():
            return 0.0
        groups, count, mean = 0, 0, 0.0
        for answer, chance in sorted(expected.items(), key=lambda item: item[1]):
            count, mean = count + counted[answer], mean + chance * counted.total()
            if mean >= 5:  # rare answers form one group
                statistic, groups = statistic + (count - mean) ** 2 / mean, groups + 1
                count, mean = 0, 0.0
        freedom += groups - 1
    return torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)).item()


def drawn(model: StandardTransformer, mode: Any, options: dict[str, Any], **drafting: Any) -> tuple[float, Any]:
    """The p value of answers to prompts of different lengths, alternating in one batch, and the acceptance rate."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS]).repeat(ROWS // len(PROMPTS), 1)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    generated = generate(
        model, ids, LENGTH, mode, attention_mask=mask.repeat(ROWS // len(PROMPTS), 1), seed=1, **options, **drafting
    )
    answered = list(map(tuple, answers(generated)))
    tables = [
        (Counter(answered[i :: len(PROMPTS)]), distribution(model, prompt, **options))
        for i, prompt in enumerate(PROMPTS)
    ]
    return p_value(tables), generated.stats.get("acceptance")


@pytest.fixture
def few(tiny: Make) -> StandardTransformer:
    return tiny(LAYERS, vocab_size=FEW, sharp=True).double()


@pytest.mark.parametrize("options", DRAWS, ids=lambda options: " ".join(map(str, options.values())))
@pytest.mark.parametrize(
    ("mode", "draft_exit", "patience"), [("full", "auto", 0.0), ("exact", 1, 0.0), ("exact", 2, 0.4)]
)
def test_answers_have_the_distribution_of_full_decoding(
    mode: Any, draft_exit: Any, patience: float, options: dict[str, Any], few: StandardTransformer
) -> None:
    drafting = {"draft_exit": draft_exit, "draft_confidence": patience} if mode == "exact" else {}
    p, acceptance = drawn(few, mode, options, **drafting)
    assert p > 1e-4
    assert mode == "full" or 0.1 <= acceptance <= 0.9


@pytest.mark.parametrize("options", [DRAWS[0], DRAWS[-1]], ids=["temperature", "all settings"])
@pytest.mark.parametrize("source", ["lookup", "brick", "lookup, brick"])
def test_drafts_that_are_not_drawn_leave_the_distribution(
    source: str, options: dict[str, Any], few: StandardTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft of a text or a brick is always the same one in its place, however improbable it is."""
    sample = generate(few, torch.tensor([[1, 4, 2]] * 20), 20, temperature=1.0, seed=2).tokens.flatten()
    table = CountTable.of(sample, FEW)
    few.add_draft_brick(sample.mode().values[None], torch.randn(64, few.config.dim).double())  # drafts this token only
    monkeypatch.setattr("ease.generation.decode._source_names", lambda *_: [source])
    drafted: dict[str, int] = Counter()
    for kind in (TextSource, BrickSource):
        offer = kind.offer

        def counted(self: Any, *args: Any, offer: Any = offer) -> Any:
            drafts = offer(self, *args)
            drafted[self.name] += int(drafts.mask.sum())
            return drafts

        monkeypatch.setattr(kind, "offer", counted)
    least = 0.6 if "," in source else 0.0  # below it, a text offers nothing and the brick drafts
    p, acceptance = drawn(few, "exact", options, count_table=table, draft_confidence=least)
    assert set(filter(drafted.get, drafted)) == set(source.split(", "))
    assert p > 1e-4
    assert 0 < acceptance < 1


@pytest.mark.parametrize("wrong", [0.0, 0.8, 1.25], ids=["accepts every draft", "accepts too many", "accepts too few"])
def test_the_statistic_detects_a_wrong_acceptance_rate(
    wrong: float, few: StandardTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft is accepted if a random number in [0, 1) is small enough; scaled numbers must fail the test."""
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: wrong * rand(*shape, **options))
    p, _ = drawn(few, "exact", DRAWS[0], draft_exit=1, draft_confidence=0.0)
    assert p < 1e-9
