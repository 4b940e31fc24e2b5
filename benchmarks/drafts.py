"""When a draft pays: what a round of speculative decoding costs in a batch, against plain tokens.

python benchmarks/drafts.py [--write]      about a minute

How many guesses are right is a matter of the two models. Here it is put the other way: so many must be right
in each round, or the draft costs time.
"""

import argparse
import os
import time

os.environ["OMP_NUM_THREADS"] = "1"  # before it is read; the time of the processor is then that of the work

from machine import table, write_results
from models import LARGE, Sizes, parameters, pararnn
from timing import alternating

# isort: split
import mlx.core as mx

from mlx_pararnn.cache import held_arrays

DRAFT = Sizes(384, 2, LARGE.vocabulary, 1056, 4)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    args = parser.parse_args()
    model, draft = pararnn(), pararnn(sizes=DRAFT)
    rows = []
    for batch in (1, 4, 16):
        for guesses in (2, 4, 8):
            rows.append([batch, guesses, *measured(model, draft, batch, guesses, args.repeats)])
    header = [
        "rows", "guesses", "a token without a draft", "a round: guesses", "check", "rewind",
        "right guesses a round that it takes", "at best, times as fast",
    ]  # fmt: skip
    caption = (
        f"ParaGRU, d = 1024, 4 layers, {parameters(model) / 1e6:.1f}M parameters; draft d = {DRAFT.d}, "
        f"{DRAFT.layers} layers, {parameters(draft) / 1e6:.1f}M; float32; one thread, time of the "
        f"processor; medians of {args.repeats} rounds in which all take turns."
    )
    print(*table(header, rows), sep="\n")
    if args.write:
        write_results("drafts", caption, header, rows)


def measured(model, draft, batch, guesses, repeats):
    mx.random.seed(0)
    start = mx.random.randint(0, LARGE.vocabulary, (batch, 16))
    caches = {}
    for name, each in (("plain", model), ("model", model), ("draft", draft)):
        caches[name] = each.make_cache()
        mx.eval(each(start, cache=caches[name]))
        if name != "plain":
            for layer in caches[name]:
                layer.remember(guesses)
    one, several = start[:, :1], start[:, : guesses + 1]

    def timed(run):
        def took():
            begin = time.process_time()
            run()
            return time.process_time() - begin

        return took

    def plain():
        mx.eval(mx.argmax(model(one, cache=caches["plain"]), axis=-1))

    def guess():
        token = one
        for _ in range(guesses):
            token = mx.argmax(draft(token, cache=caches["draft"]), axis=-1)
            mx.async_eval(token)
        mx.eval(token, draft(token, cache=caches["draft"]))

    def check():
        mx.eval(mx.argmax(model(several, cache=caches["model"]), axis=-1))

    def back():
        steps = [row % (guesses + 1) for row in range(batch)]
        layers = (*caches["model"], *caches["draft"])
        for layer in layers:
            layer.rewind(steps)
        mx.eval(held_arrays(layers))

    parts = {"plain": plain, "guess": guess, "check": check, "back": back}
    seconds = alternating({name: timed(run) for name, run in parts.items()}, repeats)
    token, *costs = seconds.values()
    needed = sum(costs) / token - 1
    ms = [f"{value * 1e3:.1f} ms" for value in (token, *costs)]
    best = (guesses + 1) * token / sum(costs)
    return [*ms, f"{max(needed, 0):.1f}" if needed < guesses else "more than there are", f"{best:.2f}"]


if __name__ == "__main__":
    main()
