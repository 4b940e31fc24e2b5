"""A file is the old or the new one, whatever happens while it is written."""

import os

import pytest

from mlx_pararnn.files.whole_file import whole_file, write_whole


@pytest.mark.parametrize("what", ["write_bytes", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file_alone(what, error, tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    write_whole(file, b"old")

    def fail(self, *_):
        self.touch()
        raise error

    monkeypatch.setattr(f"pathlib.Path.{what}", fail)
    with pytest.raises(type(error)):
        write_whole(file, b"new")
    monkeypatch.undo()
    assert (file.read_bytes(), os.listdir(tmp_path)) == (b"old", ["config.json"])


def test_a_body_that_fails_half_way_leaves_the_old_file_alone(tmp_path):
    """Whatever writes it: the name that it is given ends as the file's own does."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"old")

    def half() -> None:
        with whole_file(file) as partial:
            assert partial.suffix == file.suffix
            partial.write_bytes(b"half")
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        half()
    assert (file.read_bytes(), os.listdir(tmp_path)) == (b"old", ["model.safetensors"])


def test_its_bytes_are_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    done = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr("os.replace", lambda *names: done.append("name") or replace(*names))
    monkeypatch.setattr("os.fsync", lambda file: done.append("bytes") or fsync(file))
    write_whole(tmp_path / "file", b"new")
    assert done == ["bytes", "name", "bytes"]
    assert (tmp_path / "file").read_bytes() == b"new"
