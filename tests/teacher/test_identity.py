"""Which teacher it is: all bytes are read once, and other copies are compared by a sample."""

from __future__ import annotations

import shutil

import pytest
from builders import VOCAB_SIZE

from dask_logits.config.groups import TeacherConfig
from dask_logits.errors import TeacherError
from dask_logits.teacher import checkpoint, identity
from dask_logits.teacher.checkpoint import TeacherSpec, inspect_teacher, load_teacher
from dask_logits.teacher.identity import Identity, identify, require_same
from dask_logits.teacher.locate import Location

MIB = 1 << 20


def located(folder) -> Location:
    return Location(base=str(folder), folder=folder, adapter=None, tensors={})


@pytest.fixture
def large(tmp_path):
    """A folder whose weights are too large to be read as a whole. They only need a header's length."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with (folder / "model.safetensors").open("wb") as file:
        file.write((100).to_bytes(8, "little"))
        file.truncate(20 * MIB + 1)
    return folder


@pytest.fixture
def nothing_is_read(monkeypatch):
    def fail(path) -> str:
        raise AssertionError(f"{path} was read")

    def forbid() -> None:
        monkeypatch.setattr(identity, "_of_content", fail)
        monkeypatch.setattr(identity, "_of_sample", fail)

    return forbid


def change(folder, place: int, n_bytes: int = 1) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(place)
        file.write(b"\x01" * n_bytes)


def test_the_same_files_are_not_read_again(large, nothing_is_read) -> None:
    seen = identify(located(large), None, {})
    nothing_is_read()
    facts = {"identity": seen.content, "sample": seen.sample, "stamp": seen.stamp}
    assert identify(located(large), None, facts) == seen
    require_same(located(large), None, seen)


def test_a_copy_is_compared_by_a_sample(large, tmp_path, monkeypatch) -> None:
    seen = identify(located(large), None, {})
    # A copy that keeps the times of its files.
    shutil.copytree(large, tmp_path / "copy")
    found = identify(located(tmp_path / "copy"), None, {})
    assert (found.content, found.sample) == (seen.content, seen.sample)
    assert found.stamp != seen.stamp
    read = []
    whole = identity._of_content
    monkeypatch.setattr(identity, "_of_content", lambda path: read.append(path.name) or whole(path))
    require_same(located(tmp_path / "copy"), None, seen)
    assert read == ["config.json"]


@pytest.mark.parametrize(
    ("place", "n_bytes"),
    [(0, 1), (60, 1), (107, 1), (8 * MIB + 17, 1), (20 * MIB, 1), (1 * MIB, 4 * MIB), (9 * MIB + 5, 4 * MIB)],
)
def test_another_header_block_end_or_tensor_is_found(large, tmp_path, place: int, n_bytes: int) -> None:
    seen = identify(located(large), None, {})
    copy = shutil.copytree(large, tmp_path / "copy")
    change(copy, place, n_bytes)
    with pytest.raises(TeacherError, match=r"expected the teacher sample:\w{16}… that the driver saw, got sample:\w"):
        require_same(located(copy), None, seen)


def test_a_cut_file_and_another_configuration_are_found(large, tmp_path) -> None:
    seen = identify(located(large), None, {})
    for name, text in (("config.json", b"{ }"), ("model.safetensors", None), ("modeling_x.py", b"")):
        copy = shutil.copytree(large, tmp_path / name)
        if text is None:
            with (copy / name).open("r+b") as file:
                file.truncate(20 * MIB)
        else:
            (copy / name).write_bytes(text)
        with pytest.raises(TeacherError, match="give every machine the same files"):
            require_same(located(copy), None, seen)


def test_a_difference_between_the_blocks_is_found_by_the_next_driver_only(large, tmp_path) -> None:
    seen = identify(located(large), None, {})
    copy = shutil.copytree(large, tmp_path / "copy")
    change(copy, 5 * MIB)
    require_same(located(copy), None, seen)
    facts = {"identity": seen.content, "sample": seen.sample, "stamp": seen.stamp}
    assert identify(located(copy), None, facts).content != seen.content


def test_a_change_in_place_is_noticed_by_its_time(large) -> None:
    seen = identify(located(large), None, {})
    change(large, 5 * MIB)
    assert identify(located(large), None, {"stamp": seen.stamp}).content != seen.content


def test_without_a_sample_all_bytes_are_compared(large) -> None:
    seen = identify(located(large), None, {})
    require_same(located(large), None, Identity(content=seen.content))
    change(large, 5 * MIB)
    with pytest.raises(TeacherError, match="expected the teacher sha256:"):
        require_same(located(large), None, Identity(content=seen.content))


def test_a_worker_and_a_second_start_read_only_what_they_load(llama, nothing_is_read, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "_LOADED", {})
    config = TeacherConfig(model_path=str(llama))
    facts = inspect_teacher(config)
    nothing_is_read()
    again = inspect_teacher(config, {"identity": facts.identity, "sample": facts.sample, "stamp": facts.stamp})
    assert again == facts
    spec = TeacherSpec(
        path=str(llama), revision=None, identity=facts.identity, sample=facts.sample, stamp=facts.stamp,
        dtype="float32", device="cpu", torch_threads=1, trust_remote_code=False,
    )  # fmt: skip
    assert load_teacher(spec, VOCAB_SIZE).vocab_size == VOCAB_SIZE
