"""Sharded folders and the links of the hub's cache: an index and links lead nowhere but where they may."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import dgemma
from dgemma.checkpoints import safetensors
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.convert import convert
from said import says
from tiny import INDEX, edit_json, shard, tiny_checkpoint

ROUTER = "model.decoder.layers.0.router.proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path)


@pytest.fixture
def sharded(folder: Path) -> Path:
    return shard(folder)


# ---- The index ------------------------------------------------------------------------------------------------


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = (sharded / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    file = safetensors.SafetensorsFile.open(first)
    name = next(iter(file.entries))
    other = safetensors.SafetensorsFile.open(second)
    both = {one: other.tensor(one).copy() for one in other.entries} | {name: file.tensor(name)}
    safetensors.write(second, both)
    with says("two files", name, first.name, second.name):
        Checkpoint.open(sharded)


def test_an_index_that_names_tensors_its_shard_lacks(sharded: Path) -> None:
    table = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit_json(sharded / INDEX, weight_map=table | {"ghost": "model-00002-of-00003.safetensors"})
    with says(INDEX, "1 tensor not in the files", "ghost", "model-00002-of-00003.safetensors"):
        Checkpoint.open(sharded)


def test_a_shard_with_tensors_the_index_does_not_name(sharded: Path) -> None:
    table = json.loads((sharded / INDEX).read_text())["weight_map"]
    del table[ROUTER]
    edit_json(sharded / INDEX, weight_map=table)
    with says(INDEX, "not listed", ROUTER):
        Checkpoint.open(sharded)


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with says("model-00002-of-00003.safetensors", "no such file"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    "name",
    ["../tiny/model.safetensors", "/etc/passwd", "/x.safetensors", "a/b.safetensors", "..\\b.safetensors", "..",
     ".safetensors", "x.bin", "x\0.safetensors", "x\n.safetensors", 7, None, ["x.safetensors"], "y" * 300],
)  # fmt: skip
def test_an_index_names_plain_files_only(sharded: Path, name: Any) -> None:
    table = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit_json(sharded / INDEX, weight_map=table | {ROUTER: name})
    with says(INDEX, ROUTER, "plain name"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("data", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": "b"}, "x": 1}])
def test_an_index_has_a_weight_map(sharded: Path, data: dict[str, Any]) -> None:
    (sharded / INDEX).write_text(json.dumps(data))
    with says(INDEX, "weight_map"):
        Checkpoint.open(sharded)


# ---- Links ----------------------------------------------------------------------------------------------------


def hub_cache(folder: Path, root: Path, *, shared: bool) -> Path:
    """Lay a folder out as huggingface_hub's cache: snapshots link to blobs, and those, since 2.x, to a shared store."""
    repository = root / "models--owner--tiny"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    if shared:
        (root / "blobs" / "ab").mkdir(parents=True)
        (root / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    for i, path in enumerate(sorted(folder.iterdir())):
        blob = blobs / f"blob{i}"
        if shared and path.suffix == ".safetensors":
            shutil.copy(path, root / "blobs" / "ab" / blob.name)
            blob.symlink_to(Path("..") / ".." / "blobs" / "ab" / blob.name)
        else:
            shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_the_hub_cache_s_links_work(sharded: Path, tmp_path: Path, shared: bool) -> None:
    snapshot = hub_cache(sharded, tmp_path / "hub", shared=shared)
    Checkpoint.open(snapshot).check()
    (tmp_path / "link").symlink_to(snapshot)  # so does a link to the folder itself
    Checkpoint.open(tmp_path / "link").check()


def move_out(folder: Path, name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / name).rename(target)
    (folder / name).symlink_to(target)


def test_weights_may_be_links_to_wherever_they_lie(sharded: Path, tmp_path: Path) -> None:
    for path in sorted(sharded.glob("*.safetensors"))[:2]:
        move_out(sharded, path.name, tmp_path / "other disk" / path.name)
    Checkpoint.open(sharded).check()
    convert(sharded, tmp_path / "out", "bf16", workers=1)
    Checkpoint.open(tmp_path / "out").check()


TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.mark.parametrize("name", TEXTS)
def test_text_out_of_the_folder_is_neither_read_nor_copied(folder: Path, tmp_path: Path, name: str) -> None:
    move_out(folder, name, tmp_path / "elsewhere" / name)
    for act in (dgemma.load, lambda path: convert(path, tmp_path / "out", "bf16", workers=1),
                lambda path: dgemma.export(path, tmp_path / "onnx")):  # fmt: skip
        with says(name, "link out of the folder"):
            act(folder)
    inner = folder / f"my-{name}"
    (tmp_path / "elsewhere" / name).rename(inner)
    (folder / name).unlink()
    (folder / name).symlink_to(inner.name)
    dgemma.load(folder)


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_is_not_there_or_no_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("nothing")
    with says(name, "not there"):
        dgemma.load(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with says(name, "regular"):
        dgemma.load(folder)


def test_text_of_another_repository_or_of_none(folder: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(folder, tmp_path / "hub", shared=False)
    for place, good in {
        "hub/models--other--one/blobs/" + "a" * 40: True,  # of a cache, by its name
        "hub/models--other--one/blobs/config": False,
        "hub/other/blobs/" + "a" * 40: False,
        "home/.ssh/" + "a" * 64: False,
    }.items():
        target = tmp_path / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "config.json", target)
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(target)
        if good:
            Checkpoint.open(snapshot).check()
            continue
        with says("config.json", "link out of the folder"):
            Checkpoint.open(snapshot)


def test_a_cache_whose_blobs_lie_elsewhere_and_a_folder_of_links_into_it(folder: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(folder, tmp_path / "hub", shared=False)
    blobs = snapshot.parent.parent / "blobs"
    for path in list(snapshot.iterdir()):
        number = path.resolve().name.removeprefix("blob")
        digest = number.rjust(40, "0")
        path.resolve().rename(blobs / digest)
        path.unlink()
        path.symlink_to(Path("..") / ".." / "blobs" / digest)
    mine = tmp_path / "mine"
    mine.mkdir()
    for path in snapshot.iterdir():
        (mine / path.name).symlink_to(path)
    dgemma.load(mine)
    (tmp_path / "disk").mkdir()
    blobs.rename(tmp_path / "disk" / "blobs")
    blobs.symlink_to(tmp_path / "disk" / "blobs")
    dgemma.load(snapshot)
    (tmp_path / "disk" / "secret").write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../blobs/../secret")
    with says("config.json", "link out of the folder"):
        Checkpoint.open(snapshot)


def test_broken_and_circular_links_and_odd_files(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.unlink()
    path.symlink_to("nothing")
    with says("model.safetensors", "nothing", "not there"):
        Checkpoint.open(folder)
    path.unlink()
    path.symlink_to("model.safetensors")
    with says("model.safetensors"):
        Checkpoint.open(folder)
    path.unlink()
    path.mkdir()
    with says("model.safetensors", "regular"):
        Checkpoint.open(folder)
    path.rmdir()
    os.mkfifo(path)  # opening it would wait for ever
    with says("model.safetensors", "regular"):
        Checkpoint.open(folder)
    with says("model.safetensors", "regular"):
        safetensors.SafetensorsFile.open(path)
