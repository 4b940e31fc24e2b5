"""The completion model's data from wheels, the n-gram beside it, and how keystrokes are counted."""

import json
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from examples.completion import data, evaluate
from examples.completion.ngram import DISCOUNT, ORDER, NGram
from mlx_pararnn import Model, ModelArgs
from mlx_pararnn.loading import load_tokenizer
from mlx_pararnn.training.tokenizers import write_tokenizer

ROOT = Path(__file__).parents[1]
CODE = "def add(first, second):\n    return first + second\n\n\n" * 5


def wheel(folder, name, files):
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/METADATA", f"{info}/WHEEL"])
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nAuthor: Łu Ba\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", record)


def test_texts_are_a_packages_own_modules_each_once_and_none_is_run(tmp_path, monkeypatch):
    where = tmp_path / "index"
    bad = "raise SystemExit('was run')\n" * 20
    wheel(where, "held", {"held/a.py": CODE, "held/_vendor/b.py": CODE + "x"})
    wheel(where, "learned", {
        "learned/a.py": CODE,  # held out
        "learned/b.py": bad,
        "learned/c.py": CODE.replace("    ", "\t").replace("\n", "\r\n") + "# é\n",
        "learned/d.py": "x = 1\n",  # too short
        "learned/e.py": "x = 1\n" * 20_000,  # a table
        "learned/f.py": b"# \xff\n" * 100,
        "learned/g.txt": CODE + "#",
        "learned/data/h.py": CODE + "##",
        "learned/i.py": bad,
    })  # fmt: skip
    monkeypatch.setattr(data, "HELD_OUT", "\nheld==1.0 MIT\n")
    monkeypatch.setattr(data, "TRAIN", "\nlearned==1.0 MIT\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(where))
    monkeypatch.setattr(sys, "argv", ["data", "-o", str(tmp_path / "out")])
    data.main()
    found = {
        name: [json.loads(line)["text"] for line in (tmp_path / f"out/{name}.jsonl").open()]
        for name in ("held-out", "train")
    }
    assert found["held-out"] == [CODE]
    assert sorted(found["train"]) == sorted([bad, CODE + "# é\n"])
    assert "learned 1.0, by Łu Ba: MIT" in (tmp_path / "out/NOTICE").read_text()


def test_packages_are_named_once_with_permissive_licences():
    lines = [line.split() for text in (data.TRAIN, data.HELD_OUT) for line in text.split("\n") if line]
    assert {licence for _, licence in lines} == {"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "MIT"}
    names = [pinned.split("==")[0] for pinned, _ in lines]
    assert len(names) == len(set(names)) == len(lines) > 70


def test_an_n_gram_is_that_of_counts():
    tokens = np.random.default_rng(0).integers(0, 4, 3000).astype(np.uint16)
    ngram = NGram(tokens, 10**9, 5)
    assert ngram.least == 2
    listed = tokens.tolist()
    counts = [
        Counter(tuple(listed[i : i + order]) for i in range(len(listed) - order + 1))
        for order in range(1, ORDER + 1)
    ]

    def expected(context):
        shares = np.full(5, 1 / 5)
        for order in range(min(len(context), ORDER - 1) + 1):
            after = tuple(context[len(context) - order :])
            total = sum(count for key, count in counts[order].items() if key[:-1] == after)
            kept = {key[-1]: count for key, count in counts[order].items() if key[:-1] == after}
            own = np.zeros(5)
            for token, count in kept.items():
                if count >= (1 if order == 0 else ngram.least):
                    own[token] = (count - DISCOUNT) / total
            shares = own + (1 - own.sum()) * shares
        return shares

    for context in ([], [1], [4], [0, 3], [2, 1, 0], [3, 3, 1, 2], [0, 1, 2, 3, 0, 1]):
        found = ngram(context)
        assert abs(found.sum() - 1) < 1e-12
        assert np.abs(found - expected(context)).max() < 1e-12, context
    small = NGram(tokens, 2000, 5)
    assert small.size <= 2000 < ngram.size
    assert small.least > 2


def test_keystrokes_are_counted_as_tab_or_characters(monkeypatch):
    monkeypatch.setattr(evaluate, "PASSAGE", 10)
    text = "ab" + "0123456789" + "more"
    offers = {2: [("012", 0.5), ("3", 0.5), ("X", 0.5)], 6: [("45", 0.9)], 8: [("6z", 0.9)]}
    counts = [evaluate.keystrokes(text, 2, lambda at: offers.get(at, []), s) for s in (0.1, 0.25, 0.5, 0.95)]
    # Wrong in the end: typed; four at once, then two; three at once, "3", two; nothing is sure enough
    assert counts == [9, 6, 7, 10]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("if x:\n    y", 7),  # the editor's four blanks are nobody's
        ("    a\n    b", 7),  # of which four come before
        ("    a\n\n    b", 12),  # after an empty line there are none to go on from
        ("    a\n  b", 8),  # two are taken back, once
        ("    a\nb", 8),
    ],
)
def test_the_editor_indents(text, count, monkeypatch):
    monkeypatch.setattr(evaluate, "PASSAGE", len(text))
    assert evaluate.keystrokes(text, 0, lambda at: (), 1) == count


def test_an_n_gram_completes_by_the_models_rules(tmp_path):
    write_tokenizer("bpe:300", [CODE], tmp_path)
    tokenizer = load_tokenizer(tmp_path, {})
    tokens = np.array(tokenizer.encode(CODE), np.uint16)
    model = Model(ModelArgs(8, 1, 300, 8, num_heads=1))
    completer = evaluate.NGramCompleter(NGram(tokens, 10**6, 300), model, tokenizer)
    for prefix, rest in (
        ("def add(first, second):\n    retu", "rn first + second"),
        ("def a", "dd(first, second):"),
    ):
        found = completer.complete(prefix, min_probability=0.2)
        assert found.text == rest
        assert 0.2 <= found.probability < 1
    with pytest.raises(ValueError, match="too few"):
        NGram(tokens, 100, 300)
    with pytest.raises(ValueError, match="too many"):
        NGram(tokens, 10**6, 5000)


@pytest.mark.large
def test_the_recipe_runs(tmp_path, capsys, monkeypatch):
    """A short training with the recipe's settings, and the evaluation's table."""
    folder = tmp_path / "python"
    folder.mkdir()
    texts = [path.read_text() for path in sorted((ROOT / "mlx_pararnn").glob("*.py"))]
    for name, chosen in (("train", texts[:8]), ("held-out", texts[8:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
    command = [sys.executable, "-m", "mlx_pararnn", "train", folder / "train.jsonl", "-o", tmp_path / "model"]
    command += ["--config", ROOT / "examples/completion/train.yaml", "--steps", "3", "--warmup", "1"]
    command += ["--tokenizer", "bpe:400", "--batch-size", "2", "--valid-share", "0.2"]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path / "model"), str(folder), "--passages", "4"])
    evaluate.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip().split()[0] for line in lines[2:]] == ["model", "n-gram"]
    assert all(0 <= float(line.split("|")[3].split()[0]) < 100 for line in lines[2:])
