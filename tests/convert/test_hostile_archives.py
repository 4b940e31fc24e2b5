"""Every instruction of a pickle and every trick of a zip file: read as data, or refused by name."""

import pickle
import pickletools
import zipfile

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


def _verdict(code: bytes) -> str:
    """fickling's, as a word of its scale; "" where it does not get through the pickle."""
    from fickling.analysis import check_safety
    from fickling.fickle import Pickled

    try:
        return check_safety(Pickled.load(code, fail_on_decode_error=True)).severity.name
    except Exception:
        return ""


def test_verdicts_beside_another_scanners(refused, tmp_path):
    """Whatever fickling says of a hostile pickle, it is refused; docs/reliability.md has its verdicts."""
    pytest.importorskip("fickling", reason="pip install 'mlx-pararnn[clients]' has it")
    hostile = attacks(tmp_path / "executed")
    hostile |= {f"{name}, by itself": code for name, (code, _) in REFUSED.items()}
    verdicts = {name: _verdict(code) for name, code in hostile.items()}
    counts = {verdict: list(verdicts.values()).count(verdict) for verdict in set(verdicts.values())}
    assert sum(verdict.endswith("MALICIOUS") for verdict in verdicts.values()) > 10, counts
    for name in hostile:
        assert "evil.pt" in refused(write_archive(tmp_path / "evil.pt", hostile[name], {})), name
    assert not (tmp_path / "executed").exists()
    for name, code in PLAIN.items():
        assert _verdict(code) in ("LIKELY_SAFE", ""), name
    files = sorted((DATA / "pararnn_torch").glob("*/pytorch_model.bin"))
    assert files
    for file in files:  # it knows no tensors, and does not call them safe
        with zipfile.ZipFile(file) as archive:
            [inner] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            code = archive.read(inner)
        load_pickle(code, "x")
        assert not _verdict(code).endswith("MALICIOUS"), file
