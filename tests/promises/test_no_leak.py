"""Promise 4: a strategy sees no test split, mines from training tokens alone, and splits share no text."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ease import (
    STRATEGIES,
    ASHEMConfig,
    Data,
    MinedBatches,
    Phase,
    PhaseConfig,
    StagedConfig,
    StandardTransformer,
    TokenBatches,
    load_corpus,
    train,
)
from ease.data import sources as data_module
from ease.data.sources import SPLITS, read_splits

Make = Callable[..., StandardTransformer]


class Counted:
    """Batches that count how often they are read."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.reads = batches, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.reads += 1
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def poisoned() -> Data:
    """Training ids below 128; validation has only ids from 128 on."""

    def batches(low: int, count: int) -> Counted:
        ids = torch.randint(low, low + 128, (count, 4, 17))
        return Counted([(window[:, :-1], window[:, 1:]) for window in ids])

    return Data(batches(0, 6), batches(128, 3))


def ids_of(phase: Phase) -> Tensor:
    return torch.cat([torch.cat([item[0].flatten(), item[1].flatten()]) for item in phase.train])


def staged(*plans: tuple[int, float]) -> StagedConfig:
    return StagedConfig(tuple(PhaseConfig(layers=n, ratio=r, max_epochs=1) for n, r in plans))


def short_ashem(protocol: str) -> ASHEMConfig:
    return ASHEMConfig(1, phase2_layers=2, phase1_max_epochs=1, phase2_max_epochs=1, protocol=protocol)  # type: ignore[arg-type]


def test_data_has_no_test_split() -> None:
    assert Data._fields == ("train", "val", "progress")


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_strategy_asks_for_more_than_train_and_val(name: str, tiny: Make) -> None:
    """What `next_phase` gets is all there is: strategies and configurations hold no data before it."""
    config = STRATEGIES[name]()
    data = poisoned()
    phase = config.strategy().next_phase(tiny(config.num_layers or 4), data)
    assert phase is not None
    assert phase.train is data.train
    assert phase.val is data.val


@pytest.mark.parametrize(
    "config", [short_ashem("held-out"), staged((1, 1.0), (2, 0.5), (4, 0.2))], ids=["ashem", "staged"]
)
def test_held_out_phases_mine_and_train_on_training_tokens_alone(
    config: ASHEMConfig | StagedConfig, tiny: Make
) -> None:
    data, strategy, model = poisoned(), config.strategy(), tiny(1, sharp=True)
    mined = 0
    while True:
        reads = data.val.reads
        phase = strategy.next_phase(model, data)
        assert data.val.reads == reads, "choosing and mining a phase read validation tokens"
        if phase is None:
            break
        assert int(ids_of(phase).max()) < 128, "validation tokens are among those the phase trains on"
        assert phase.val is data.val
        mined += isinstance(phase.train, MinedBatches)
        # Run it as a trainer would, so that the next one mines a trained model.
        yielded = iter([phase])
        strategy_of_one = type("One", (), {"next_phase": lambda *_, it=yielded: next(it, None)})()
        for _ in train(model, strategy_of_one, data):
            pass
    assert mined == (1 if isinstance(config, ASHEMConfig) else 2)


def test_what_is_learned_does_not_depend_on_validation_tokens(tiny: Make) -> None:
    """With the stopping rule out of the way, other validation text leads to the same weights and thresholds."""
    ends = []
    for seed in (1, 2):
        torch.manual_seed(0)
        data = poisoned()
        torch.manual_seed(seed)
        val = [(x.roll(seed, 1), y.roll(seed, 0)) for x, y in data.val]
        model, strategy = tiny(1, sharp=True), staged((1, 1.0), (2, 0.5), (3, 0.2)).strategy()
        torch.manual_seed(0)
        for _ in train(model, strategy, Data(data.train, val)):
            pass
        ends.append((model.state_dict(), strategy.policy()))
    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())


def test_the_seed_protocol_mines_and_trains_on_validation_tokens(tiny: Make) -> None:
    """The original recipe, in-sample: the opposite of the above, shown by the same means."""
    data, strategy, model = poisoned(), short_ashem("original").strategy(), tiny(1, sharp=True)
    assert strategy.next_phase(model, data) is not None
    reads = data.train.reads
    phase = strategy.next_phase(model, data)
    assert phase is not None
    assert data.train.reads == reads
    ids = ids_of(phase)
    assert int(ids.min()) >= 128
    # Each trained pair is one of the validation pairs, and scoring happens on the same ones.
    pairs = {(int(a), int(b)) for x, y in data.val for a, b in zip(x.flatten(), y.flatten())}
    trained = [(int(a), int(b)) for x, y, *_ in phase.train for a, b in zip(x.flatten(), y.flatten())]
    assert set(trained) <= pairs
    assert len(trained) == sum(y.numel() for _, y in data.val) // 2
    assert phase.val is data.val


# Corpora


def numbered(start: int, count: int) -> str:
    """Lines that occur nowhere else."""
    return "".join(f"line {n:05d} of the book\n" for n in range(start, start + count))


def lines(text: str) -> set[str]:
    return {line for line in text.splitlines() if line}


def test_a_file_and_a_folder_are_cut_into_parts_that_share_no_line(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(numbered(0, 500))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.txt").write_text(numbered(0, 300))
    (folder / "valid.txt").write_text(numbered(300, 200))
    for source in (book, folder):
        splits = read_splits(source)
        parts = {split: "".join(splits[split]) for split in SPLITS}
        assert parts["train"] + parts["val"] + parts["test"] == numbered(0, 500)
        assert sum(len(lines(part)) for part in parts.values()) == 500

        corpus = load_corpus(source, "byte", cache_dir=tmp_path / "cache")
        found: dict[str, set[str]] = {}
        for split in SPLITS:
            batches = TokenBatches(getattr(corpus, split), 64, 4, drop_last=False)
            text = [corpus.tokenizer.decode([*map(int, x), int(y[-1])]) for xs, ys in batches for x, y in zip(xs, ys)]
            found[split] = set().union(*(lines(window) for window in text))
        whole = {split: {line for line in found[split] if len(line) == 22} for split in SPLITS}
        assert all(len(whole[split]) > 10 for split in SPLITS)
        assert not whole["train"] & (whole["val"] | whole["test"])
        assert not whole["val"] & whole["test"]


def test_the_standard_library_s_splits_share_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[str]] = {split: [] for split in SPLITS}
    monkeypatch.setattr(data_module, "_read_text", lambda path, errors="strict": str(path))
    for split, paths in read_splits("stdlib").items():
        seen[split] = paths
    assert len({path for paths in seen.values() for path in paths}) == sum(map(len, seen.values())) > 300
    stdlib = Path(data_module.sysconfig.get_paths()["stdlib"])
    tops = {s: {Path(p).relative_to(stdlib).parts[0].removesuffix(".py") for p in seen[s]} for s in SPLITS}
    assert not tops["train"] & (tops["val"] | tops["test"])
    assert not tops["val"] & tops["test"]
