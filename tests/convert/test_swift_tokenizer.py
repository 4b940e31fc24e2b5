"""What an export says of tokenizers that Swift's BPETokenizer refuses; its own tests read the same cases."""

import json
from pathlib import Path

import pytest

from mlx_pararnn.convert.package.swift_tokenizer import problem, why_unreadable
from mlx_pararnn.pocket.protocol import tokenizer_files

CASES = json.loads(
    (Path(__file__).parents[1] / "data/tools/tokenizer_parts.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_which_tokenizers_swift_reads(case):
    file = json.loads(tokenizer_files()["tokenizer.json"])
    file["model"] |= case.get("model", {})
    assert problem(file | case.get("parts", {})) == case["reason"]


def test_of_a_folder(tmp_path):
    assert why_unreadable(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert why_unreadable(tmp_path) == "it has no tokenizer.json"
    (tmp_path / "tokenizer.json").write_text(tokenizer_files()["tokenizer.json"])
    assert why_unreadable(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("[]")
    assert "a JSON object was expected" in why_unreadable(tmp_path)
