"""Microseconds of the processor that a token takes to become text, along one line: ours beside MLX-LM's.

python benchmarks/detokenizing.py [--quick] [--write]          about forty seconds

It is the processor's time, so it may be measured on a machine that has other work.
"""

import argparse
import time
from itertools import pairwise

from machine import table, write_results
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, NaiveStreamingDetokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mlx_pararnn.text.detokenizer import BYTES, Detokenizer

LENGTHS = (0, 1000, 4000, 16000)  # characters of the line at which a section starts


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short lines only")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    args = parser.parse_args()
    tokenizer = byte_level()
    kinds = {
        "mlx-pararnn": Detokenizer,
        "MLX-LM, byte level": BPEStreamingDetokenizer,
        "MLX-LM, any": NaiveStreamingDetokenizer,
    }
    lengths = LENGTHS[:2] if args.quick else LENGTHS
    header = ["detokenizer", *(f"at {length} characters" for length in lengths)]
    rows = [
        [name, *(f"{t:.1f}" for t in along_a_line(kind(tokenizer), lengths))] for name, kind in kinds.items()
    ]
    print(*table(header, rows), sep="\n")
    if args.write:
        caption = "Microseconds of the processor a token, over the 100 tokens from that place of the line on."
        write_results("detokenizing", caption, header, rows)


def byte_level():
    """A byte-level tokenizer of single bytes, as GPT-2's kind starts from."""
    vocabulary = dict(BYTES)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def along_a_line(detokenizer, lengths):
    """Microseconds a token, over the 100 tokens after each of `lengths`."""
    detokenizer.reset()
    for start, end in pairwise([*lengths, lengths[-1] + 100]):
        begin = time.process_time()
        for n in range(start, start + 100):
            add(detokenizer, n)
        yield (time.process_time() - begin) * 1e4
        for n in range(start + 100, end):
            add(detokenizer, n)


def add(detokenizer, n):
    detokenizer.add_token(ord("a") + n % 26)
    return detokenizer.last_segment


if __name__ == "__main__":
    main()
