"""What this package uses of other libraries that they do not promise to keep: each thing by its name.

A failure here says what changed, before anything else fails for a reason nobody can see.
"""

import subprocess
import sys

import pytest


def test_transformers_gives_a_plain_tokenizer_for_the_model_type_that_loading_names():
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    from mlx_pararnn.loading import PLAIN_TOKENIZER_TYPE

    assert TOKENIZER_MAPPING_NAMES.get(PLAIN_TOKENIZER_TYPE) == "TokenizersBackend", (
        "transformers' AutoTokenizer gives another class for loading.PLAIN_TOKENIZER_TYPE; "
        "choose a model type whose tokenizer is its tokenizer.json alone"
    )


def test_mlx_lm_calls_auto_tokenizer_by_that_name():
    import mlx_lm.tokenizer_utils
    import transformers

    assert mlx_lm.tokenizer_utils.AutoTokenizer is transformers.AutoTokenizer, (
        "mlx_lm.tokenizer_utils loads tokenizers another way: cli/lm.py would not refuse their Python"
    )


@pytest.mark.parametrize("name", ["load", "TokenizerWrapper", "StreamingDetokenizer"])
def test_mlx_lm_tokenizer_utils_has(name):
    import mlx_lm.tokenizer_utils

    assert hasattr(mlx_lm.tokenizer_utils, name), f"mlx_lm.tokenizer_utils.{name} is gone; see loading.py"


@pytest.mark.parametrize("command", ["convert", "fuse"])
def test_mlx_lm_commands_dequantize_by_that_name(command):
    from importlib import import_module

    import mlx_lm.utils

    assert import_module(f"mlx_lm.{command}").dequantize_model is mlx_lm.utils.dequantize_model, (
        f"mlx_lm.{command} dequantizes another way: cli/lm.py would not reach quantized MultiLinear"
    )


@pytest.mark.parametrize("name", ["weight", "scales", "group_size", "bits", "mode"])
def test_mlx_lm_quantized_multi_linear_has(name):
    from mlx_lm.models.mla import QuantizedMultiLinear

    assert name in QuantizedMultiLinear(64, 32, 2, 32, 4, "affine") or hasattr(
        QuantizedMultiLinear(64, 32, 2, 32, 4, "affine"), name
    ), f"mlx_lm's QuantizedMultiLinear.{name} is gone; see cli/lm.py"


def test_mlx_lms_tokenizer_wrapper_copies_its_detokenizer():
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    import mlx_pararnn
    from mlx_pararnn.detokenizer import Detokenizer

    _, tokenizer = mlx_pararnn.load()
    assert isinstance(tokenizer, TokenizerWrapper)
    first, second = tokenizer.detokenizer, tokenizer.detokenizer
    assert isinstance(first, Detokenizer), (
        "mlx_lm's TokenizerWrapper no longer takes its detokenizer from _detokenizer; see loading.py"
    )
    first.add_token(97)
    second.add_token(98)
    assert (first.text, second.text) == ("a", "b"), "two callers share the state of one detokenizer"


@pytest.mark.parametrize(
    "name", ["BatchGenerator", "TextStateMachine", "make_text_state_machine", "stream_generate"]
)
def test_mlx_lm_generate_has_what_the_server_stands_on(name):
    from importlib import import_module

    # A function of that name hides the module in the package.
    assert hasattr(import_module("mlx_lm.generate"), name), f"mlx_lm.generate.{name} is gone; see chat/server"


@pytest.mark.parametrize("name", ["insert_segments", "next", "extract_cache", "remove"])
def test_mlx_lms_batch_generator_has(name):
    from mlx_lm.generate import BatchGenerator

    assert hasattr(BatchGenerator, name), f"BatchGenerator.{name} is gone; see chat/server/engine.py"


def test_uvicorns_protocol_has_what_the_server_watches():
    import asyncio

    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
    from uvicorn.server import ServerState

    loop = asyncio.new_event_loop()
    try:
        protocol = H11Protocol(uvicorn.Config(None, log_config=None), ServerState(), {}, loop)
    finally:
        loop.close()
    for name in ("cycle", "connections", "transport", "loop", "pause_writing", "resume_writing"):
        assert hasattr(protocol, name), f"uvicorn's H11Protocol.{name} is gone; see chat/server/listen.py"
    assert "response_complete" in RequestResponseCycle.__init__.__code__.co_names, (
        "uvicorn's cycle no longer says response_complete; see chat/server/listen.py"
    )
    assert hasattr(uvicorn.Server, "capture_signals"), "see chat/server/listen.py"


def test_mlx_lm_is_imported_where_few_open_files_are_allowed():
    """Its utils raise the limit as they are imported; registration.py lets that fail."""
    code = (
        "import resource\n"
        "def refuse(kind, limits): raise ValueError('not allowed to raise maximum limit')\n"
        "resource.setrlimit = refuse\n"
        "import mlx_pararnn, mlx_lm.utils\n"
        "assert resource.setrlimit is refuse\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, (
        f"mlx_lm changes the limit of open files somewhere else now; see registration.py: {result.stderr}"
    )


def test_mlx_lms_lora_trains_by_the_names_that_the_command_line_replaces():
    import inspect
    from importlib import import_module

    from mlx_lm.tuner.callbacks import TrainingCallback

    lora = import_module("mlx_lm.lora")
    assert list(inspect.signature(lora.train_model).parameters) == [
        "args", "model", "train_set", "valid_set", "training_callback",
    ], "mlx_lm.lora.train_model takes other arguments; see cli/lm.py"  # fmt: skip
    assert "train_model" in lora.run.__code__.co_names, "mlx_lm.lora.run trains another way; see cli/lm.py"
    reports = {name for name in vars(TrainingCallback) if name.startswith("on_")}
    assert reports == {"on_train_loss_report", "on_val_loss_report"}, "see cli/lm.py's callback"


def test_mlx_lms_text_data_set_is_processed_by_that_name():
    from mlx_lm.tuner.datasets import TextDataset

    assert hasattr(TextDataset, "process"), "mlx_lm's TextDataset.process is gone; see cli/lm.py"


def test_a_decoder_of_tokenizers_says_what_it_is_made_of():
    import json

    from tokenizers import decoders

    state = json.loads(decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]).__getstate__())
    assert [part["type"] for part in state["decoders"]] == ["ByteFallback", "Fuse"], (
        "a decoder of the tokenizers library no longer pickles to its JSON; see detokenizer.py"
    )
    assert json.loads(decoders.ByteLevel().__getstate__())["type"] == "ByteLevel"
