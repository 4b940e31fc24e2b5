"""Every instruction of a pickle and every trick of a zip file: read as data, or refused by name."""

import pickle
import pickletools
import zipfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

from mlx_pararnn.convert.readers.pickles import load_pickle
from mlx_pararnn.errors import PararnnError
from tests.support.golden import DATA
from tests.support.hostile import PLAIN, REFUSED, archives, attacks
from tests.support.pt_writer import write_archive


def test_the_lists_have_every_instruction_once():
    names = [opcode.name for opcode in pickletools.opcodes]
    assert sorted([*PLAIN, *REFUSED]) == sorted(names)
    for name, code in {**PLAIN, **{name: code for name, (code, _) in REFUSED.items()}}.items():
        used = {opcode.name for opcode, *_ in pickletools.genops(code)}
        assert name in used, name


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_value_is_pythons_own(name):
    code = PLAIN[name]
    assert load_pickle(code, "x") == pickle.loads(code)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_value_is_refused_by_name(name):
    code, said = REFUSED[name]
    with pytest.raises(PararnnError) as error:
        load_pickle(code, "x.pt")
    assert str(error.value).startswith("x.pt: ")
    assert said in str(error.value)


def test_what_a_zip_file_pretends_is_refused_by_name(refused, accepted, tmp_path):
    for name, (path, said) in archives(tmp_path).items():
        if said:
            assert said in refused(path), name
        else:
            accepted(path)
    assert not (tmp_path / "executed").exists()


# What docs/reliability.md says of fickling 0.1.12; "" where it does not get through.
VERDICTS = {
    "pickles": {"MALICIOUS": 18, "LIKELY_UNSAFE": 18, "SUSPICIOUS": 3, "LIKELY_SAFE": 9, "": 18},
    "archives": {"MALICIOUS": 4, "LIKELY_UNSAFE": 11, "LIKELY_SAFE": 1, "": 5},
}


def _verdict(*codes: bytes) -> str:
    """fickling's worst of these pickles, as a word of its scale."""
    from fickling.analysis import check_safety
    from fickling.fickle import Pickled

    try:
        worst = max(check_safety(Pickled.load(code, fail_on_decode_error=True)).severity for code in codes)
    except Exception:
        return ""
    return "MALICIOUS" if worst.name.endswith("MALICIOUS") else worst.name


def _pickles_in(path: Path) -> list[bytes]:
    """Nothing where Python's own reader of zip files does not get through."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [archive.read(record) for record in archive.infolist() if record.filename.endswith(".pkl")]
    except (zipfile.BadZipFile, RuntimeError, EOFError):
        return []


def test_verdicts_beside_another_scanners(refused, tmp_path):
    """Whatever fickling says of a hostile pickle or archive, it is refused."""
    pytest.importorskip("fickling", reason="pip install 'mlx-pararnn[clients]' has it")
    hostile = attacks(tmp_path / "executed")
    hostile |= {f"{name}, by itself": code for name, (code, _) in REFUSED.items()}
    verdicts = {"pickles": Counter(map(_verdict, hostile.values()))}
    for name in hostile:
        assert "evil.pt" in refused(write_archive(tmp_path / "evil.pt", hostile[name], {})), name
    pretending = [path for path, said in archives(tmp_path).values() if said]
    verdicts["archives"] = Counter(_verdict(*_pickles_in(path)) for path in pretending)
    for path in pretending:
        refused(path)
    assert not (tmp_path / "executed").exists()
    for name, code in PLAIN.items():
        assert _verdict(code) in ("LIKELY_SAFE", ""), name
    files = sorted((DATA / "pararnn_torch").glob("*/pytorch_model.bin"))
    assert len(files) == 5
    for file in files:  # it knows no tensors, and does not call them safe
        (code,) = _pickles_in(file)
        load_pickle(code, "x")
        assert _verdict(code) == "LIKELY_UNSAFE", file
    if version("fickling") == "0.1.12":  # another one may judge otherwise
        assert verdicts == VERDICTS
