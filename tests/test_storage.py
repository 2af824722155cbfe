"""Output folders appear whole or not at all, and JSON has no NaN."""

import json
import math
from pathlib import Path

import pytest

from ease.errors import EaseError
from ease.storage import output_folder, write_json


def test_a_folder_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), output_folder(out) as folder:  # noqa: PT012
        (folder / "metrics.jsonl").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with output_folder(out) as folder:
        (folder / "config.json").write_text("{}")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_an_existing_folder_is_refused_unless_it_is_a_run_to_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with output_folder(out) as folder:
        (folder / "config.json").write_text('{"format": 1, "model": {}}')
    with pytest.raises(EaseError, match="--overwrite"), output_folder(out):
        pass
    with pytest.raises(RuntimeError), output_folder(out, overwrite=True):
        raise RuntimeError
    kept = json.loads((out / "config.json").read_text())
    assert kept["format"] == 1, "a run that failed must not cost the one before"
    with output_folder(out, overwrite=True) as folder:
        (folder / "config.json").write_text('{"format": 2, "model": {}}')
    assert json.loads((out / "config.json").read_text())["format"] == 2
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").touch()
    with pytest.raises(EaseError, match="not a run folder"), output_folder(photos, overwrite=True):
        pass
    assert (photos / "a.jpg").exists()
    (photos / "config.json").write_text('{"theme": "dark"}')  # many things have a config.json
    with pytest.raises(EaseError, match="not a run folder"), output_folder(photos, overwrite=True):
        pass
    assert (photos / "a.jpg").exists()


def test_nan_is_written_as_null_and_infinity_stays(tmp_path: Path) -> None:
    """JSON has no NaN, and a threshold may be infinite."""
    write_json(tmp_path / "figures.json", {"auroc": {1: math.nan, 2: (0.5, math.nan)}, "threshold": math.inf})
    text = (tmp_path / "figures.json").read_text()
    assert "NaN" not in text
    assert json.loads(text) == {"auroc": {"1": None, "2": [0.5, None]}, "threshold": math.inf}


def make_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"format": 1, "model": {}}')
    return folder


@pytest.mark.parametrize("source", ["par", "par/child", "par/child/deeper"])
@pytest.mark.parametrize("out", ["par", "par/child"])
def test_nothing_that_is_read_is_overwritten(source: str, out: str, tmp_path: Path) -> None:
    for folder in ("par/child/deeper", "par/child", "par"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "config.json").write_text('{"format": 1, "model": {}}')
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(EaseError, match="is read: choose another folder"),
        output_folder(tmp_path / out, overwrite=True, reads=[tmp_path / source]),
    ):
        pass
    assert sorted(tmp_path.rglob("*")) == before
    with output_folder(tmp_path / "other", overwrite=True, reads=[tmp_path / source, "stdlib"]) as folder:
        (folder / "config.json").write_text("{}")


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    precious = make_run(tmp_path / "precious")
    (tmp_path / ".run.partial").symlink_to(precious)
    (tmp_path / "link").symlink_to(precious)
    (tmp_path / "dangling").symlink_to(tmp_path / "missing")
    for name, resumable in (("run", True), ("link", False), ("dangling", False)):
        with (
            pytest.raises(EaseError, match="is a symbolic link"),
            output_folder(tmp_path / name, overwrite=True, resumable=resumable),
        ):
            pass
    assert (precious / "config.json").exists()
    assert not (tmp_path / "missing").exists()


def test_the_current_folder_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_run(tmp_path / "run" / "child"))
    (tmp_path / "run" / "config.json").write_text('{"format": 1, "model": {}}')
    for out in (Path(), Path("..")):
        with pytest.raises(EaseError, match="holds the current folder"), output_folder(out, overwrite=True):
            pass
    assert (tmp_path / "run" / "child" / "config.json").exists()
