"""A recorded turn of the protocol, for implementations in other languages: the loop here gives it too.

`python -m tests.pocket.test_turn_record` writes it again.
"""

import json
from pathlib import Path

from mlx_pararnn.pocket.functions import Functions
from mlx_pararnn.pocket.loop import Limits, run_turn
from mlx_pararnn.pocket.protocol import MARKS, SPECIAL_TOKENS
from tests.support.scripted import Script, as_recorded, tokens_of, tools_protocol, tools_tokenizer

FILE = Path(__file__).parents[1] / "data/tools/turn.json"
MESSAGE = "double 21, <|end|> é"
MADE = (
    "<|right1|><|read1|>t<|last2|><|read2|><|left3|><|left3|><|read3|>"
    '<|call|>{"name":"double","arguments":{"number":<|last1|><|left1|>21}}<|result|>'
    '<|call|>{"name":"halve","arguments":{}}<|result|>'
    "<|answer|>é: <|last4|><|read4|>42<|end|>"
)


def double(number: int) -> int:
    """Twice a number."""
    return 2 * number


def record():
    protocol = tools_protocol()
    source = Script(MADE)
    prefix = protocol.render_message(MESSAGE)
    events = list(run_turn(protocol, source, prefix, Functions([double]), Limits()))
    tokens = [*source.taken, protocol.end]
    return {
        "special_tokens": {name: tools_tokenizer().convert_tokens_to_ids(name) for name in SPECIAL_TOKENS},
        "message": MESSAGE,
        "functions": {"double": "twice the integer argument `number`; there is no other function"},
        "tokens": tokens,
        "made_by_the_model": protocol.loss_mask(tokens),
        "events": [as_recorded(event) for event in events],
    }


def test_the_loop_gives_the_recorded_turn():
    recorded = json.loads(FILE.read_text(encoding="utf-8"))
    assert record() == recorded
    made = [
        token for token, own in zip(recorded["tokens"], recorded["made_by_the_model"], strict=True) if own
    ]
    assert made == tokens_of(MADE)
    assert {f"<|{mark}|>" for mark in MARKS} <= set(recorded["special_tokens"])


if __name__ == "__main__":
    FILE.write_text(json.dumps(record(), ensure_ascii=False) + "\n", encoding="utf-8")
