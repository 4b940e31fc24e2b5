"""What OpenAI's clients expect of an answer and MLX-LM does not give: stop strings, log probabilities."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mlx_lm.generate import TextStateMachine
from mlx_lm.tokenizer_utils import TokenizerWrapper


class Answer:
    """A generator's answer to one request, cut at stop strings wherever they lie in its tokens.

    It stands where the handler looks for its generator.

    Attributes:
        pending: the tokens, as MLX-LM's responses, that were generated and not yet sent.
    """

    def __init__(self, generator: Any, stop: list[str]) -> None:
        self._generator = generator
        self._stop = TextStateMachine({"text": [(word, None) for word in stop]})
        self._eos = generator.model_provider.tokenizer.eos_token_ids
        self.pending: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def generate(self, *args: Any, **kwargs: Any) -> tuple[Any, Iterator[Any]]:
        context, responses = self._generator.generate(*args, **kwargs)
        return context, self._until_stop(responses)

    def _until_stop(self, responses: Iterator[Any]) -> Iterator[Any]:
        state = self._stop.make_state("text")
        for response in responses:
            self.pending.append(response)
            state, segments = self._stop.split(state, response.text)
            text = "".join(part for _, part in segments)
            stopped = state[0] is None or response.finish_reason == "stop"
            if response.finish_reason == "length" or response.token in self._eos:
                state, held_back, _ = self._stop.flush(state)
                text += held_back
            # APIHandler drops the text of a response that says "stop", and takes that for the end of all.
            yield replace(response, text=text, finish_reason=None if stopped else response.finish_reason)
            if stopped:
                return


def chat_logprobs(tokenizer: TokenizerWrapper, responses: list[Any]) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            {
                **entry(r.token, r.logprob),
                "top_logprobs": [entry(t["id"], t["logprob"]) for t in _likeliest(r.top_tokens)],
            }
            for r in responses
        ]
    }


def completion_logprobs(tokenizer: TokenizerWrapper, responses: list[Any]) -> dict[str, Any]:
    return {
        "tokens": [tokenizer.decode([r.token]) for r in responses],
        "token_logprobs": [r.logprob for r in responses],
        "top_logprobs": [
            {tokenizer.decode([t["id"]]): t["logprob"] for t in _likeliest(r.top_tokens)} for r in responses
        ],
    }


def _likeliest(top_tokens: Any) -> list[dict[str, Any]]:
    return sorted(top_tokens, key=lambda t: t["logprob"], reverse=True)
