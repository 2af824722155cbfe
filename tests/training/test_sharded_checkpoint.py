"""Checkpoints of sharded tensors, in a group of one process: kills, damage, and what is left on the disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ease.errors import EaseError
from ease.training import checkpoint, sharding
from ease.training.checkpoint import read_state, write_state
from ease.training.sharding import StoredTensor, loaded_like, read_parts


class Killed(BaseException):
    """What stands for a SIGKILL."""


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(value: float) -> Any:
    mesh = init_device_mesh("cpu", (1,))
    return distribute_tensor(torch.full((6, 2), value), mesh, [Shard(0)])


def state(value: float) -> dict[str, Any]:
    return {"n": value, "of": {"part": sharded(value), "whole": torch.full((2,), value)}, "list": [sharded(-value)]}


def loaded(path: Path) -> tuple[float, Tensor]:
    """The number and the sharded tensor of a file, as one process without shards reads them."""
    found, stored = read_state(path), dict[str, Tensor]()
    tensor = loaded_like(found["of"]["part"], torch.zeros(6, 2), stored)
    read_parts(path.parent / found["parts"]["folder"], stored)
    return found["n"], tensor


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_parts_come_back_whole_or_sharded(tmp_path: Path) -> None:
    path = tmp_path / "phase-1.safetensors"
    write_state(path, state(1.5))
    found = read_state(path)
    assert found["of"]["part"] == StoredTensor("of.part", (6, 2), torch.float32)
    assert found["of"]["whole"].tolist() == [1.5, 1.5]
    assert loaded(path)[1].tolist() == [[1.5] * 2] * 6
    stored = dict[str, Tensor]()
    like: Any = sharded(0)
    part: Any = loaded_like(found["list"][0], like, stored)
    read_parts(tmp_path / found["parts"]["folder"], stored)
    assert part.placements == like.placements
    assert part.full_tensor().tolist() == [[-1.5] * 2] * 6


def test_the_parts_of_the_newest_and_the_one_before_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "phase-1.safetensors"
    for value in (1.0, 2.0, 3.0):
        write_state(path, state(value))
    files = ["phase-1.parts-2", "phase-1.parts-3", "phase-1.previous.safetensors", "phase-1.safetensors"]
    assert names(tmp_path) == files
    assert [loaded(tmp_path / name)[1][0, 0].item() for name in files[2:]] == [2, 3]
    for value in (4.0, 5.0):  # one process goes on alone
        write_state(path, {"n": value, "t": torch.zeros(1)})
    assert names(tmp_path) == files[2:]


@pytest.mark.parametrize("at", ["parts", "file"])
def test_a_kill_while_writing_leaves_the_checkpoint_from_before(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "phase-1.safetensors"
    for value in (1.0, 2.0):
        write_state(path, state(value))

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if at == "parts":
            patch.setattr(sharding, "checksum", killed)
        else:
            patch.setattr(checkpoint, "set_usual_mode", killed)
        with pytest.raises(Killed):
            write_state(path, state(3.0))
    number, tensor = loaded(path)
    assert (number, tensor[0, 0].item()) == (2, 2)
    assert loaded(tmp_path / "phase-1.previous.safetensors")[0] == 1
    write_state(path, state(4.0))
    assert loaded(path)[0] == 4
    assert len(list(tmp_path.glob("*.parts-*"))) == 2
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("damage", ["bit", "missing", "another"])
def test_damaged_parts_are_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "phase-1.safetensors"
    write_state(path, state(1.0))
    (shard,) = (tmp_path / "phase-1.parts-1").iterdir()
    if damage == "bit":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    elif damage == "missing":
        shard.unlink()
    else:
        save_file({name: value + 1 for name, value in load_file(shard).items()}, shard)
    with pytest.raises(EaseError, match=r"phase-1.safetensors is damaged \(.*shard-00001.* remove it to resume"):
        read_state(path)


@pytest.mark.parametrize("value", ["no space", "no JSON"])
def test_parts_of_a_checkpoint_that_cannot_be_written_are_removed(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "phase-1.safetensors"
    write_state(path, state(1.0))
    extra: dict[str, Any] = {"batches": object()}
    if value == "no space":
        monkeypatch.setattr(checkpoint, "set_usual_mode", full)
        extra = {}
    with pytest.raises(EaseError, match=r"(cannot|could not) be written"):
        write_state(path, {**state(2.0), **extra})
    assert names(tmp_path) == ["phase-1.parts-1", "phase-1.safetensors"]
    assert loaded(path)[0] == 1


def test_a_disk_that_refuses_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "phase-1.safetensors"
    write_state(path, state(1.0))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(EaseError, match=r"could not be written \(.*No space left on device.* make room") as error:
        write_state(path, state(2.0))
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["phase-1.parts-1", "phase-1.safetensors"]
    assert loaded(path)[0] == 1
