"""Compiled libraries that were damaged or replaced are built again, never loaded as they are."""

import ctypes
import hashlib
import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from mlx_pararnn.compute import cpu_build
from tests.support.disks import small_disk
from tests.support.privileges import given_away

pytestmark = [
    pytest.mark.usefixtures("cpu_backend"),
    pytest.mark.skipif(sys.platform != "linux", reason="damages ELF files"),
]

# Large enough that the function stands on other pages than the header.
TEXT = """
extern "C" int data[100000] = {1, 2, 3};
extern "C" int answer() { return data[0] + 41; }
"""
LOAD = f"""
from mlx_pararnn.compute import cpu_build
library = cpu_build.build({TEXT!r}, "tiny")
import ctypes
print(library.answer(), sum((ctypes.c_int * 100000).in_dll(library, "data")))
"""
RAW = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
print(library.answer(), sum((ctypes.c_int * 100000).in_dll(library, "data")))
"""
SOUND = "42 6\n"


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mlx-pararnn"


def python(code, *arguments, **variables):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})


def load(**variables):
    done = python(LOAD, **variables)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


def the_library(cache) -> Path:
    (library,) = cache.glob("*.so")
    return library


def written(library, content):
    """In another file of that name: a process that has the old one mapped would not notice."""
    library.unlink()
    library.write_bytes(content)
    library.chmod(0o700)


def renamed(library, content):
    """With the hash of what it now is."""
    written(library, content)
    digest = hashlib.sha256(content).hexdigest()[:20]
    library.rename(library.with_stem(f"{library.stem.rpartition('-')[0]}-{digest}"))


DAMAGED = {
    "empty": lambda whole: b"",
    "one page": lambda whole: whole[:4096],
    "half": lambda whole: whole[: len(whole) // 2],
    "all but its last byte": lambda whole: whole[:-1],
    "zeroed after its first page": lambda whole: whole[:4096] + bytes(len(whole) - 4096),
    "zeroed": lambda whole: bytes(len(whole)),
    "one bit": lambda whole: whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
}


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_library_is_built_again(damage, cache):
    assert load() == SOUND
    library = the_library(cache)
    whole = library.read_bytes()
    written(library, DAMAGED[damage](whole))
    if damage in ("half", "zeroed after its first page"):
        raw = python(RAW, str(library))
        assert raw.returncode != 0 or raw.stdout != SOUND  # as it is it would do harm
    assert load() == SOUND
    assert the_library(cache).read_bytes()[:4] == b"\x7fELF"
    assert load() == SOUND


def test_another_machines_library_is_built_again(cache):
    assert load() == SOUND
    library = the_library(cache)
    whole = library.read_bytes()
    renamed(library, whole[:18] + b"\xf7\0" + whole[20:])  # e_machine: BPF
    assert load() == SOUND
    assert the_library(cache).read_bytes()[18:20] == whole[18:20]


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("who", ["a link", "another user's", "writable by others"])
def test_what_others_may_have_put_there_is_not_loaded(who, cache, tmp_path):
    assert load() == SOUND
    library = the_library(cache)
    (tmp_path / "planted.cpp").write_text(
        f"__attribute__((constructor)) static void run() {{ __builtin_trap(); }}\n{TEXT}"
    )
    planted = tmp_path / "planted.so"
    command = [cpu_build.compiler(), "-shared", "-fPIC", "-o", planted, tmp_path / "planted.cpp"]
    subprocess.run(command, check=True)
    renamed(library, planted.read_bytes())
    library = the_library(cache)
    assert load_raw_dies(library)
    if who == "a link":
        library.unlink()
        library.symlink_to(planted)
    elif who == "writable by others":
        library.chmod(0o777)
    with given_away(library) if who == "another user's" else nullcontext():
        assert load() == SOUND


def load_raw_dies(library):
    return python(RAW, str(library)).returncode < 0


def test_its_bytes_are_on_the_disk_before_its_name_is(cache, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (done.append(name), real(*a))[1])
    cpu_build.build(TEXT, "tiny")
    assert done == ["fsync", "replace"]


def test_a_library_that_is_there_needs_no_compiler(cache, tmp_path):
    assert load() == SOUND
    assert load(PATH=str(tmp_path), CXX="") == SOUND
    written(the_library(cache), b"damaged")
    done = python(LOAD, PATH=str(tmp_path), CXX="")
    assert "NoCompilerError: no C++ compiler; install one" in done.stderr


@pytest.mark.parametrize("fault", ["not a folder", "no home"])
def test_where_the_cache_cannot_be_written(fault, cache, monkeypatch, tmp_path, caplog):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(cpu_build.tempfile, "tempdir", str(temporary))
    if fault == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(cpu_build.Path, "home", no_home)
    else:
        cache.write_text("a file where the folder should be")
    cpu_build._temporary_folder.cache_clear()
    cpu_build._say_where.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert cpu_build.build(TEXT, "tiny").answer() == 42
        assert cpu_build.build(TEXT + "\n", "tiny").answer() == 42
    cpu_build._temporary_folder.cache_clear()
    (message,) = caplog.messages
    folder = temporary / f"mlx-pararnn-{os.geteuid()}"
    assert message.endswith(f"; compiled kernels are kept in {folder}")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len([*folder.glob("tiny-*.so")]) == 2


def test_a_cache_on_a_disk_that_is_read_only(monkeypatch, tmp_path, caplog):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(cpu_build.tempfile, "tempdir", str(temporary))
    with small_disk(tmp_path / "disk", "1m") as disk:
        (disk.path / "mlx-pararnn").mkdir(mode=0o700)
        disk.allow_writing(False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk.path))
        cpu_build._temporary_folder.cache_clear()
        cpu_build._say_where.cache_clear()
        assert cpu_build.build(TEXT, "tiny").answer() == 42
        cpu_build._temporary_folder.cache_clear()
        folder = temporary / f"mlx-pararnn-{os.geteuid()}"
        assert caplog.messages[-1].endswith(f"compiled kernels are kept in {folder}")
        assert len([*folder.glob("tiny-*.so")]) == 1


@pytest.mark.parametrize("linked", [False, True])
def test_another_users_folder_is_refused_whatever_stands_in_it(linked, cache, tmp_path):
    assert load() == SOUND
    place = cache
    if linked:
        place = cache.rename(tmp_path / "elsewhere")
        cache.symlink_to(place)
        assert load() == SOUND  # a link to a folder of one's own is that folder
    with given_away(place):
        done = python(LOAD)
    assert f"{cache} can be written by other users" in done.stderr
    assert done.stdout == ""


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_anothers_folder_among_temporary_files_is_not_used(cache, monkeypatch, tmp_path):
    cache.write_text("a file where the folder should be")
    monkeypatch.setattr(cpu_build.tempfile, "tempdir", str(tmp_path))
    taken = tmp_path / f"mlx-pararnn-{os.geteuid()}"
    taken.mkdir()
    taken.chmod(0o777)
    cpu_build._temporary_folder.cache_clear()
    library = cpu_build.build(TEXT, "tiny")
    cpu_build._temporary_folder.cache_clear()
    assert isinstance(library, ctypes.CDLL)
    assert library.answer() == 42
    assert not [*taken.iterdir()]
