"""The paper: its numbers are those of the files it names, references are whole, it compiles with and without data."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from data_front import fake

import ease
from experiments import paper
from experiments.analysis.table import tex
from experiments.studies import cost_at_1b
from experiments.tiers.scales import SCALES
from experiments.tiers.tier1_front import strategies

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "paper"
# Without comments; a backslash keeps a per cent sign.
TEXT = re.sub(r"(?<!\\)%.*", "", (PAPER / "lash.tex").read_text(encoding="utf-8"))
PREAMBLE, BODY = TEXT.split(r"\begin{document}")
RESULT = re.compile(r"\\result\{([^}]+)\}\{([^}]+)\}")
ENTRIES = re.findall(r"^@(\w+)\{(\w+),\n(.*?)^\}", (PAPER / "references.bib").read_text(encoding="utf-8"), re.M | re.S)


# Numbers


def holds(text: str, number: str) -> bool:
    """Whether a text contains a number that is not part of another one."""
    return re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", text) is not None


def test_a_number_is_found_whole() -> None:
    assert holds("reaches 5.09.", "5.09")
    assert holds("a 47% gain", "47%")
    for text in ("5.092", "15.09", "1,5.09"):
        assert not holds(text, "5.09")


def test_every_number_stands_in_the_file_it_names() -> None:
    found = RESULT.findall(BODY)
    assert len(found) > 20
    for file, number in found:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert holds(text, number.replace(r"\%", "%")), f"{file} does not say {number}"


def test_prose_has_no_other_number() -> None:
    rest = RESULT.sub("", BODY)
    rest = re.sub(r"\\(?:cite|ref|label|texttt|generated\{\w+\})\{[^}]*\}", "", rest)
    assert not re.findall(r"\d\.\d", rest), "no measured number hides in a formula"
    rest = re.sub(r"\\\[.*?\\\]|\$[^$]*\$", "", rest, flags=re.S)
    rest = re.sub(r"WikiText-2|Rho-1|[Pp]hase[ ~]\d", "", rest)
    assert not re.findall(r".*\d.*", rest)


# References


def test_what_is_cited_is_listed_and_what_is_listed_is_cited() -> None:
    cited = {key for keys in re.findall(r"\\cite\{([^}]+)\}", BODY) for key in keys.split(",")}
    listed = [key for _, key, _ in ENTRIES]
    assert sorted(cited) == sorted(listed)
    assert (PAPER / "references.bib").read_text(encoding="utf-8").count("@") == len(listed)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry[1])
def test_a_reference_says_who_what_where_and_when(entry: tuple[str, str, str]) -> None:
    kind, key, fields = entry
    names = set(re.findall(r"^  (\w+) = ", fields, re.M))
    assert names >= {"author", "title", "year", "booktitle" if kind == "inproceedings" else "journal"}
    assert re.search(r"year = \{(\d{4})\}", fields)[1] == key[-4:]  # type: ignore[index]
    assert all(re.fullmatch(r"\d{4}\.\d{4,5}", id) for id in re.findall(r"arXiv:(\S+?)[,}]", fields))


def test_labels_and_what_refers_to_them_belong_together() -> None:
    labels = re.findall(r"\\label\{([^}]+)\}", BODY)
    assert len(set(labels)) == len(labels)
    assert set(re.findall(r"\\ref\{([^}]+)\}", BODY)) <= set(labels)


# What comes in


def test_generated_material_is_guarded() -> None:
    assert r"\newcommand{\generated}[2]{\IfFileExists{build/data/#1.tex}" in PREAMBLE
    assert not re.findall(r"\\(?:input|include|includegraphics|wide)\b", BODY)
    places = re.findall(r"\\generated\{([^}]+)\}", BODY)
    assert sorted(places) == sorted([*paper.SHOWN, *paper.MADE])


SMALL = cost_at_1b.Shape(vocab_size=100, dim=16, layers=4, brick=2, heads=2, seq=8)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """A small model, so that the cost table is fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost_at_1b.table, "__defaults__", (SMALL,))
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paper's folder with the tables of two fronts and of an ablation."""
    root = tmp_path_factory.mktemp("paper")
    shutil.copytree(PAPER, root / "paper", ignore=shutil.ignore_patterns("build"))
    for number, budget in enumerate((1e13, 1e12)):
        own = {"title": f"Front {number}", "command": "ease reproduce 1 --data stdlib --scales x"}
        keep(root / "data" / f"1-{number}", fake(budget=budget) | own)
    keep(root / "data" / "2-0", fake() | {"title": "Apart", "ablated": "exits & more_"})
    (root / "data" / "2-0" / "last-layer.tex").write_text(cost_at_1b.table().latex(), encoding="utf-8")
    paper.prepare(root / "data", root / "paper" / "build" / "data")
    return root / "paper"


def keep(folder: Path, data: dict[str, object]) -> None:
    folder.mkdir(parents=True)
    (folder / "test.json").write_text(json.dumps(data), encoding="utf-8")


def taken(folder: Path, place: str) -> list[str]:
    """The files that the index of a place includes, all of which exist."""
    text = (folder / "build" / "data" / f"{place}.tex").read_text(encoding="utf-8")
    found = re.findall(r"\\(?:input|wide|includegraphics\[[^]]*\])\{build/data/([^}]+)\}", text)
    for name in found:
        assert (folder / "build" / "data" / (name if name.endswith(".pdf") else f"{name}.tex")).exists()
    return found


def test_every_kept_experiment_comes_into_its_place(written: Path) -> None:
    assert taken(written, "fronts") == ["1-1/front.pdf", "1-0/front.pdf"], "from the small scale to the large one"
    assert taken(written, "tables") == ["1-1/front", "1-0/front"], "and nothing that saves nothing"
    assert taken(written, "apart") == ["2-0/parts", "2-0/last-layer"]
    assert taken(written, "costs") == ["1-1/costs", "1-0/costs"]
    assert taken(written, "scales") == ["all/scales.pdf", "all/scales"]
    assert not (written / "build" / "data" / "tokens.tex").exists(), "no line is shown by token group"


def test_without_kept_experiments_only_what_is_counted_comes_in(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.tex").touch()
    paper.prepare(tmp_path / "none", tmp_path / "out")
    assert {path.name for path in tmp_path.joinpath("out").iterdir()} == {"cluster.md", "cluster.tex"}


def test_commands_and_quotes_in_notes_keep_their_form() -> None:
    assert tex('`ease run --data d_1` "best"') == r"\texttt{ease run -{}-data d\_1} ``best''"


# Compiling


def latex(folder: Path) -> Iterator[str]:
    """Compile, and yield the warnings and errors of the log."""
    if shutil.which("latexmk") is None:
        pytest.skip("latexmk is not installed")
    command = ["latexmk", "-pdf", "-silent", "-interaction=nonstopmode", "-outdir=build", "lash.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    log = (folder / "build" / "lash.log").read_text(encoding="latin-1")
    assert done.returncode == 0, log[-3000:]
    return (line for line in log.splitlines() if re.match(r"!|Overfull|.*Warning", line))


def test_it_compiles_without_data(tmp_path: Path) -> None:
    folder = shutil.copytree(PAPER, tmp_path / "paper", ignore=shutil.ignore_patterns("build"))
    assert list(latex(folder)) == []


def test_it_compiles_with_data(written: Path) -> None:
    assert list(latex(written)) == []


# Cost at 1B parameters


def trained(config: object, text: torch.Tensor) -> list[float]:
    """FLOPs per token of every phase of a real training run, without validation."""
    torch.manual_seed(0)
    s = SMALL
    batches = ease.TokenBatches(text, s.seq, 10, max_batches=2)
    model = ease.StandardTransformer(s.vocab_size, s.dim, config.num_layers or s.layers, s.heads, tie_embeddings=True)  # type: ignore[attr-defined]
    found = []
    for _, history in ease.train(model, config.strategy(), ease.Data(batches, batches)):  # type: ignore[attr-defined]
        flops = sum(count for kind, count in history.flops.items() if kind != "validation")
        found.append(flops / (2 * 10 * s.seq))
    return found


@pytest.mark.parametrize(
    ("line", "config"),
    {
        "standard, 4 layers": ease.StandardConfig(num_layers=4, max_epochs=1),
        "deep supervision": ease.DeepSupervisionConfig(num_layers=4, max_epochs=1),
        "early exit": ease.EarlyExitConfig(num_layers=4, exit_layer=2, max_epochs=1),
        "early exit, distilled": ease.EarlyExitConfig(num_layers=4, exit_layer=2, objective="both", max_epochs=1),
        "progressive growth": ease.GrowthConfig(layers=(2, 4), max_epochs=2),
        "stacking, with exit": ease.GrowthConfig(layers=(2, 4), exit_weight=0.5, max_epochs=2),
        "open growth": ease.OpenGrowthConfig(shallow_layers=2, deep_layers=4, max_epochs=2),
        "discriminative": ease.DiscriminativeConfig(num_layers=4, max_epochs=1),
        "LayerSkip": ease.LayerSkipConfig(num_layers=4, exit_layer=2, max_epochs=1),
        "gated": ease.GatedConfig(deep_layers=4, exit_layer=2, max_epochs=2),
        "ASHEM": ease.ASHEMConfig(
            phase1_layers=2, phase2_layers=4, phase1_max_epochs=1, phase2_max_epochs=1, trunk_budget=0
        ),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_count_of_a_line_matches_its_training(line: str, config: object, text: torch.Tensor) -> None:
    counted = [part.per_token for part in cost_at_1b.lines(SMALL)[line]]
    assert counted == pytest.approx(trained(config, text % SMALL.vocab_size), rel=0.02)


def test_the_count_of_a_tuned_exit_matches_its_training(text: torch.Tensor) -> None:
    (part,) = cost_at_1b.parts(ease.TuneConfig(exits=(2,)), SMALL, (0.1,))
    assert [part.per_token] == pytest.approx(trained(ease.TuneConfig(exits=(2,), max_epochs=1), text % 100), rel=0.02)


def test_lines_have_the_names_of_tier_1() -> None:
    known = set(strategies(SCALES["m"])) | {f"standard, {layers} layers" for layers in (2, 4)} | {"progressive growth"}
    assert set(cost_at_1b.lines(SMALL)) <= known


def test_half_of_the_tokens_leave_at_inference(text: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = ease.StandardTransformer(SMALL.vocab_size, SMALL.dim, 4, SMALL.heads, tie_embeddings=True)
    batches = [(x % 100, y % 100) for x, y in ease.TokenBatches(text, SMALL.seq, 10, max_batches=20)]
    threshold = ease.compute_confidence_threshold(model, batches, 0.5, exit=2)
    scores = ease.score(model, batches, ease.Policy((2,), (threshold,)))
    assert cost_at_1b.inference(SMALL) == pytest.approx(scores.flops / scores.processed, rel=0.03)


def test_phases_share_flops_and_hours_follow() -> None:
    line = [cost_at_1b.Part(0.5, 1.0), cost_at_1b.Part(0.5, 3.0)]
    assert cost_at_1b.mean(line) == pytest.approx(1.5), "half of the FLOPs read three tokens for one of the other half"
    assert cost_at_1b.hours(cost_at_1b.SUSTAINED * 3600) == pytest.approx(1.0)
    rows = {row[0]: row for row in cost_at_1b.table(SMALL).rows}
    assert rows["standard, 4 layers"][2] == rows["standard, 4 layers"][-1] == "100%"


def test_the_counted_model_has_a_billion_parameters() -> None:
    D, L, V = cost_at_1b.BILLION.dim, cost_at_1b.BILLION.layers, cost_at_1b.BILLION.vocab_size
    assert pytest.approx(1e9, rel=0.05) == 12 * D * D * L + V * D
