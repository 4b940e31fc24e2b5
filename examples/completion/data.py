"""Python to learn from: packages with permissive licences, and others, held out, to measure with.

python -m examples.completion.data -o runs/python      fetches the packages with pip, runs nothing of them

OUT gets train.jsonl and held-out.jsonl, a file of a package a line, and NOTICE, which names them.
"""

import argparse
import email
import hashlib
import json
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE_BYTES, FILE_BYTES = 4_000_000, 100_000  # of one package; of one file: larger ones are tables
# Parts of packages that are not theirs, or hold lists of data.
LEFT_OUT = ("_vendor", "vendored", "extern", "externals", "locale", "locale_data", "data", "_mappings")

# name==version, SPDX name of the licence
TRAIN = """
aiohttp==3.14.5 Apache-2.0
alembic==1.20.1 MIT
apscheduler==3.11.3 MIT
arrow==1.4.0 Apache-2.0
babel==2.19.0 BSD-3-Clause
beautifulsoup4==4.15.0 MIT
bokeh==3.9.2 BSD-3-Clause
botocore==1.44.8 Apache-2.0
bottle==0.13.4 MIT
celery==5.7.0 BSD-3-Clause
cherrypy==18.10.0 BSD-3-Clause
click==8.5.1 BSD-3-Clause
dask==2026.8.0 BSD-3-Clause
dateparser==1.5.0 BSD-3-Clause
distributed==2026.8.0 BSD-3-Clause
django==5.2.19 BSD-3-Clause
elasticsearch==9.5.1 Apache-2.0
fabric==3.2.3 BSD-2-Clause
falcon==4.4.0 Apache-2.0
fastapi==0.165.0 MIT
gunicorn==27.0.1 MIT
hatchling==1.33.0 MIT
huggingface-hub==2.4.0 Apache-2.0
invoke==3.0.3 BSD-2-Clause
jax==0.10.2 Apache-2.0
jinja2==3.1.6 BSD-3-Clause
keras==3.15.1 Apache-2.0
kombu==5.7.0 BSD-3-Clause
luigi==3.8.1 Apache-2.0
mako==1.4.3 MIT
marshmallow==4.4.0 MIT
mlx-lm==0.32.2 MIT
mypy==2.4.1 MIT
networkx==3.6.1 BSD-3-Clause
nltk==3.10.4 Apache-2.0
nox==2026.10.20 Apache-2.0
numpy==2.4.6 BSD-3-Clause
optuna==5.0.0 MIT
pandas==3.1.1 BSD-3-Clause
peewee==4.5.3 MIT
pendulum==3.3.0 MIT
pika==1.4.4 BSD-3-Clause
plotly==7.1.0 MIT
poetry==2.5.1 MIT
prefect==3.9.1 Apache-2.0
pydantic==2.14.4 MIT
pygments==2.21.0 BSD-2-Clause
pymongo==4.20.1 Apache-2.0
pytest==9.2.0 MIT
redis==8.1.0 MIT
sanic==25.12.1 MIT
scikit-learn==1.9.1 BSD-3-Clause
scipy==1.17.1 BSD-3-Clause
scrapy==2.19.0 BSD-3-Clause
seaborn==0.13.2 BSD-3-Clause
sphinx==9.0.4 BSD-2-Clause
sqlalchemy==2.1.9 MIT
starlette==1.10.0 BSD-3-Clause
statsmodels==0.15.0 BSD-3-Clause
sympy==1.14.0 BSD-3-Clause
tokenizers==0.23.3 Apache-2.0
tox==4.67.15 MIT
transformers==5.24.0 Apache-2.0
twisted==26.10.0 MIT
typer==0.29.2 MIT
uvicorn==0.54.0 BSD-3-Clause
virtualenv==21.15.11 MIT
werkzeug==3.1.9 BSD-3-Clause
wtforms==3.3.2 BSD-3-Clause
xarray==2026.9.0 Apache-2.0
"""
HELD_OUT = """
black==26.10.1 MIT
flask==3.1.3 BSD-3-Clause
httpx==0.28.1 BSD-3-Clause
requests==2.34.2 Apache-2.0
rich==15.0.0 MIT
tornado==6.6.1 Apache-2.0
"""


def python_files(wheel: Path) -> Iterator[str]:
    """The texts of a package's own modules, in the order of their names."""
    with zipfile.ZipFile(wheel) as archive:
        for info in sorted(archive.infolist(), key=lambda info: info.filename):
            path = Path(info.filename)
            if path.suffix != ".py" or set(path.parts) & set(LEFT_OUT):
                continue
            if not 200 < info.file_size < FILE_BYTES:
                continue
            try:
                yield archive.read(info).decode().replace("\r\n", "\n").expandtabs(4)
            except UnicodeDecodeError:
                continue


def name_of(wheel: Path) -> str:
    """The package's name, and who holds the rights to it as far as the wheel says."""
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [
            n for n in archive.namelist() if n.count("/") == 1 and n.endswith(".dist-info/METADATA")
        ]
        fields = email.message_from_string(archive.read(metadata).decode())
    by = fields["Author"] or fields["Author-email"] or fields["Maintainer-email"] or "its authors"
    names = re.sub(r"\s*<[^>]*>", "", " ".join(str(by).split()))
    return f"{fields['Name']} {fields['Version']}, by {names}"


def collect(
    listed: str, wheels: Path, seen: set[bytes], chance: random.Random
) -> tuple[list[str], list[str]]:
    """The texts of packages, in a drawn order, each text once; and a line about each package."""
    texts, lines = [], []
    for line in listed.split("\n"):
        if not line:
            continue
        pinned, licence = line.split()
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--python-version", "3.11", "-d", wheels / pinned, pinned], check=True)
        [wheel] = (wheels / pinned).glob("*.whl")
        files = list(python_files(wheel))
        chance.shuffle(files)
        size = 0
        for text in files:
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen and size < PACKAGE_BYTES:
                seen.add(digest)
                texts.append(text)
                size += len(text)
        lines.append(f"{name_of(wheel)}: {licence}")
        print(f"{pinned}: {size / 1e6:.1f} MB", file=sys.stderr)
    chance.shuffle(texts)
    return texts, lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="keep what was fetched here")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    notice = []
    with tempfile.TemporaryDirectory() as fetched:
        wheels = args.wheels or Path(fetched)
        for name, listed in (("held-out", HELD_OUT), ("train", TRAIN)):  # what is held out is never learned
            texts, lines = collect(listed, wheels, seen, random.Random(0))
            with (args.output / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
            notice += [f"{name}:", *lines, ""]
            print(f"{name}: {len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} MB", file=sys.stderr)
    (args.output / "NOTICE").write_text("\n".join(notice), encoding="utf-8")


if __name__ == "__main__":
    main()
