"""A trace of the pocket model's training data, followed as the tool loop would."""

import re

from mlx_pararnn.pocket.pointer import PointerMemory


def follow(trace):
    """The answer that the trace's own tokens give; each observation is what the memory shows."""
    start = trace.learned.index(True)
    memory, answer = PointerMemory(trace.tokens[:start], "<|edge|>"), None  # type: ignore[arg-type]
    shown = None
    for token, learned in zip(trace.tokens[start:], trace.learned[start:], strict=True):
        command = re.fullmatch(r"<\|(read|right|left|last)([1-4])\|>", token)
        if shown is not None:
            assert (token, learned) == (shown, False)
            shown = None
        elif command is None:
            memory.append(token)
            if token == "<|answer|>":
                answer = ""
            elif answer is not None and token != "<|end|>":
                answer += token
        elif command[1] == "read":
            shown = memory.read(int(command[2]))
        elif command[1] == "last":
            memory.jump_to_last(int(command[2]))
        else:
            memory.move(int(command[2]), 1 if command[1] == "right" else -1)
    assert (trace.tokens[-1], trace.learned[-1]) == ("<|end|>", True)
    return answer
