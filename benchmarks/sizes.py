"""Every size of `mlx-pararnn bench --full`: the recurrence alone, and the model of must.py.

python benchmarks/sizes.py [--quick]          about five minutes

Writes benchmarks/results/recurrence-sizes-*.md and model-sizes-*.md (not with --quick).
"""

import argparse
from dataclasses import replace

import models
from machine import table, write_results

from mlx_pararnn.tools.benchmark import FULL, SHORT, cases


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few and small sizes; writes nothing")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    sizes = replace(SHORT, prompts=(16,), generated=4) if args.quick else replace(FULL, generated=32)
    model = models.pararnn()
    found = {}
    for case in cases(model, sizes):
        found.setdefault(case.section, []).append(case.measure(args.repeats))
        print(case.section, case.settings, found[case.section][-1].values, flush=True)
    write = (lambda *_: None) if args.quick else write_results
    header, rows = _recurrence(found.pop("recurrence"))
    print(*table(header, rows), sep="\n")
    write(
        "recurrence-sizes",
        f"Milliseconds, GRU, one sequence, float32, weights of initialisation size; medians of up to "
        f"{args.repeats} runs, fewer where they take over 8 seconds. The copy moves as many bytes as the "
        "recurrence, by one MLX addition, which is one thread's work on a CPU.",
        header,
        rows,
    )
    rows = [
        (
            result.section,
            ", ".join(f"{name} {value:,}" for name, value in result.settings.items()),
            ", ".join(_value(name, value) for name, value in result.values.items()),
        )
        for results in found.values()
        for result in results
    ]
    print(*table(["what", "size", "measured"], rows), sep="\n")
    write(
        "model-sizes",
        "d = 1024, 4 layers, vocabulary 32000, float32, GRU, through mlx_lm's generate_step (batches: "
        f"BatchGenerator, tokens of all sequences together); medians of up to {args.repeats} runs.",
        ["what", "size", "measured"],
        rows,
    )


def _value(name, value):
    return f"{value:,.{0 if name.endswith('bytes') else 1}f} {name.replace('_', ' ')}"


def _recurrence(results):
    """One row a D and T, one column a way."""
    ways = list(dict.fromkeys(_way(result) for result in results))
    by_size = {}
    for result in results:
        size = result.settings["D"], result.settings["T"]
        by_size.setdefault(size, {})[_way(result)] = f"{result.values['milliseconds']:.2f}"
    rows = [(*size, *(times[way] for way in ways)) for size, times in by_size.items()]
    return ["D", "T", *ways], rows


def _way(result):
    method, backend = result.settings["method"], result.settings["backend"]
    return method if backend == "-" else f"{backend}, {method}"


if __name__ == "__main__":
    main()
