"""README and docs: their code runs, and every path, module and link in them exists."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.support.transcripts import given, steady, transcripts

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in (
        "*.md",
        "docs/*.md",
        "metal/*.md",
        "benchmarks/*.md",
        "tests/data/*.md",
        "examples/*/README.md",
        "mlx_pararnn/pocket-model/README.md",
        "mlx_pararnn/completion-model/README.md",
        ".github/**/*.md",
    )
    for path in ROOT.glob(pattern)
)
URL = "https://github.com/owner/name"


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_python_blocks(page, converted, tmp_path, monkeypatch, capsys):
    """They run, in the order in which they stand."""
    model = converted("trained/paragru/final.pt", tokenizer="bytes")
    (tmp_path / "my-model").symlink_to(model)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    names = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    said = capsys.readouterr().out
    assert "self, other" in said
    if page == "docs/python.md":
        assert said.endswith(" True\n")  # a table of one's own reads what the built-in family reads


@pytest.mark.large
def test_readmes_transcript():
    """`python -m tests.support.transcripts README.md` writes it anew."""
    text = (ROOT / "README.md").read_text()
    found = transcripts(text)
    assert f'pip install ".[cpu]" && {found[0][0]}\n' in text  # the first command of all
    assert [steady(given(command)) for command, _ in found] == [steady(said) for _, said in found]


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_modules(page):
    assert list(missing((ROOT / page).read_text())) == []


def missing(text):
    """The files and modules that `text` names in code marks and that do not exist."""
    for name in re.findall(r"`([^`\n]+)`", text):
        if "NAME" in name or "*" in name:
            continue
        top = name.partition("/")[0]
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", name) and (ROOT / top).is_dir():
            if not (ROOT / name).exists():
                yield name
        elif (
            re.fullmatch(r"(?!mlx_pararnn\.)\w+\.(py|h|cpp|metal|swift|md)", name)
            and name not in MADE_BY_USERS
            and not any(name in files for files in FILES)
        ):
            yield name
    for name in re.findall(r"(?<![\w.-])mlx_pararnn(?:\.\w+)+", text):
        if not importable(name):
            yield name


# Files that a user has or a command writes.
MADE_BY_USERS = {"my_cell.py", "pararnn.py"}
FILES = [
    {file.name for file in (ROOT / top).rglob("*")}
    for top in ("mlx_pararnn", "convert", "cli", "metal", "benchmarks", "docs", "tests", "swift", "examples")
] + [{file.name for file in ROOT.iterdir()}]


def importable(name):
    """Whether `name` is a module, or something that one holds; entry point groups are names of their own."""
    if name in ("mlx_pararnn.cells", "mlx_pararnn.families"):
        return True
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            continue
        if found:
            value = importlib.import_module(module)
            for attribute in parts[count:]:
                if not hasattr(value, attribute):
                    return False
                value = getattr(value, attribute)
            return True
    return False


@pytest.mark.parametrize("page", PAGES)
def test_what_a_reader_makes_is_not_there_yet(page):
    """A folder that exists is refused: who comes from README and follows a page from its beginning."""
    made = outputs("README.md") if page != "README.md" else []
    for name in outputs(page):
        assert name not in made, name
        made.append(name)


def outputs(page):
    """The folders that the commands of a page write; one in capitals is the reader's to name."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if "--resume" not in line]
    found = [
        match[1]
        for line in lines
        if (match := re.search(r"mlx-pararnn (?:convert|train|lm) .*?(?:-o|--mlx-path) (\S+)", line))
    ]
    return [name for name in found if not name.isupper()]


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """Relative ones lead to a file, and to a heading of it."""
    broken = []
    for link in relative_links((ROOT / page).read_text()):
        path, _, heading = unquote(link).partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (heading and heading not in headings(target.read_text())):
            broken.append(link)
    assert broken == []


def relative_links(text):
    return re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text)


def headings(text):
    """GitHub's names of a page's headings."""
    for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-")


def test_readme_on_pypi():
    """What the release makes of README: no relative link is left, and each leads to a file at the tag."""
    spec = importlib.util.spec_from_file_location("release_links", ROOT / ".ci" / "release_links.py")
    release_links = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(release_links)
    text = (ROOT / "README.md").read_text()
    made = release_links.absolute(text, URL, "v1.0")
    assert [link for link in relative_links(made) if not link.startswith("#")] == []
    paths = re.findall(rf"\({URL}/(?:blob|raw)/v1\.0/([^)#]+)", made)
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", made)
    assert images
    assert all(image.startswith((f"{URL}/raw/v1.0/", "https://")) for image in images)
    assert f'Homepage = "{URL}"' in release_links.project_urls(URL, "v1.0")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("in `mlx_pararnn/kernels.py`", ["mlx_pararnn/kernels.py"]),
        ("in `kernels.py`", ["kernels.py"]),
        ("import mlx_pararnn.host now", ["mlx_pararnn.host"]),
        ("`mlx_pararnn.loading.nothing`", ["mlx_pararnn.loading.nothing"]),
        ("`mlx_pararnn/model.py`, `mlx_pararnn.load` and `docs/`", []),
    ],
)
def test_what_is_missing_is_found(text, found):
    assert list(missing(text)) == found
