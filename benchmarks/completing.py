"""Milliseconds a keystroke takes to be completed, beside reading the whole text again.

python benchmarks/completing.py [--model FOLDER] [--quick] [--write]      about a minute

Each keystroke is answered with eight tokens, or those up to the end of the line, however likely they are.
Without a model it is one of random weights, of 1m's sizes, with a BPE of 2,048 tokens of this package's code.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import mlx_pararnn  # before mlx.core: it loads OpenBLAS

# isort: split
from machine import table, write_results
from models import Sizes, pararnn

from mlx_pararnn.completion import Completer
from mlx_pararnn.loading import load_tokenizer, warm_up
from mlx_pararnn.training.tokenizers import write_tokenizer

LENGTHS = (100, 1000, 10000)  # characters before the cursor
CODE = "".join(
    file.read_text(encoding="utf-8") for file in sorted(Path(mlx_pararnn.__file__).parent.glob("*.py"))
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or a name on the Hugging Face hub")
    parser.add_argument("--repeats", type=int, default=20, help="keystrokes of each kind")
    parser.add_argument("--quick", action="store_true", help="2 keystrokes, short texts only")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    args = parser.parse_args()
    lengths, repeats = (LENGTHS[:2], 2) if args.quick else (LENGTHS, args.repeats)
    model, tokenizer = mlx_pararnn.load(args.model) if args.model else untrained()
    warm_up(model)
    columns = [measured(model, tokenizer, length, repeats) for length in lengths]
    header = ["ms a keystroke (tokens read)", *(f"{length:,} characters before" for length in lengths)]
    rows = [
        [name, *(f"{1e3 * column[name][0]:.2f} ({column[name][1]:g})" for column in columns)]
        for name in columns[0]
    ]
    caption = (
        f"{args.model or 'Random weights, sizes of 1m'}; up to eight tokens are suggested each time; "
        f"medians of {repeats} keystrokes."
    )
    print(*table(header, rows), sep="\n")
    if args.write:
        write_results("completing", caption, header, rows)


def untrained():
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer("bpe:2048", [CODE], Path(folder))
        tokenizer = load_tokenizer(Path(folder), {})
    return pararnn(sizes=Sizes(128, 5, 2048, 352, 4)), tokenizer


def measured(model, tokenizer, length, repeats):
    """Of each kind of keystroke the median seconds and tokens read."""
    found = {"typing": [], "backspace": [], "accept": [], "the whole text again": []}

    def press(kind, completer, text):
        begin = time.perf_counter()
        completion = completer.complete(text, max_tokens=8, min_probability=0)
        found[kind].append((time.perf_counter() - begin, completion.read))
        return text + completion.text

    completer = Completer(model, tokenizer)
    completer.complete(CODE[:length])
    for more in range(1, repeats + 1):
        press("typing", completer, CODE[: length + more])
        fresh = Completer(model, tokenizer, window=len(CODE))
        press("the whole text again", fresh, CODE[: length + more])
    for less in range(1, repeats + 1):
        press("backspace", completer, CODE[: length + repeats - less])
    text = CODE[:length]
    for _ in range(repeats):
        accepted = press("accept", completer, text)
        text = text + "\n" if accepted == text else accepted
    return {
        name: [statistics.median(values) for values in zip(*of, strict=True)] for name, of in found.items()
    }


if __name__ == "__main__":
    main()
