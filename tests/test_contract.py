"""What this package uses of other libraries that they do not promise to keep: each thing by its name.

A failure here says what changed, before anything else fails for a reason nobody can see.
"""

import inspect
import subprocess
import sys

import pytest

from tests.support.demo import DEMO


def test_transformers_gives_a_plain_tokenizer_for_the_model_type_that_loading_names():
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    from mlx_pararnn.loading import PLAIN_TOKENIZER_TYPE

    assert TOKENIZER_MAPPING_NAMES.get(PLAIN_TOKENIZER_TYPE) == "TokenizersBackend", (
        "transformers' AutoTokenizer gives another class for loading.PLAIN_TOKENIZER_TYPE; "
        "choose a model type whose tokenizer is its tokenizer.json alone"
    )


def test_transformers_renders_chat_templates_with_the_arguments_that_chat_template_py_names():
    from inspect import signature

    from transformers import PreTrainedTokenizerBase

    names = set(signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    wanted = {"conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"}
    assert wanted | {"return_dict", "kwargs"} <= names, (
        f"transformers' apply_chat_template no longer takes {wanted - names}; see text/chat_template.py"
    )
    # What else it takes changes the text or its form, so that transformers itself has to be called.
    known = {"continue_final_message", "padding", "truncation", "max_length", "return_tensors"}
    assert known <= names, f"transformers' apply_chat_template no longer takes {known - names}"
    names = list(signature(PreTrainedTokenizerBase.get_chat_template).parameters)
    assert names[1:3] == ["chat_template", "tools"], "transformers' get_chat_template takes other arguments"
    assert isinstance(PreTrainedTokenizerBase.special_tokens_map, property), (
        "transformers' tokenizers no longer say their special tokens in special_tokens_map"
    )


def test_python_can_unload_a_library():
    if sys.platform == "linux":
        import _ctypes

        assert callable(_ctypes.dlclose), "Python's _ctypes has no dlclose any more; see compute/openblas.py"


def test_coremltools_shares_weights_between_functions_and_has_a_progress_bar_by_these_names():
    pytest.importorskip("coremltools", reason="coremltools has no wheel for this Python and machine")
    from coremltools.converters.mil.mil.passes import pass_pipeline
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    shared = PASS_REGISTRY["common::const_deduplication"]
    assert callable(getattr(shared, "_deduplicate_const_across_functions", None)), (
        "coremltools shares the weights of several functions by another name; see coreml/mlpackage.py"
    )
    assert callable(getattr(pass_pipeline, "tqdm", None)), (
        "coremltools' passes show their progress otherwise; see coreml/mlpackage.py"
    )


@pytest.mark.compiled
def test_mlx_calls_a_compiled_functions_python_again_only_for_new_shapes_and_where_an_input_is_traced():
    import mlx.core as mx

    called = []

    @mx.compile
    def note(*arrays):
        called.append(len(arrays))
        return arrays[0]

    def calls(*arrays):
        called.clear()
        note(*arrays)
        return len(called)

    x, other = mx.ones((1, 3)), mx.ones((1, 3))
    assert [calls(x, other) for _ in range(3)] == [1, 0, 0]
    made = []

    def function(x):
        made.append(calls(x, other) * calls(other, x))
        return (x * x).sum()

    for transformed in (mx.grad(function), mx.compile(function), mx.vmap(function)):
        transformed(x)
    mx.jvp(lambda x: [function(x)], [x], [x])
    assert made == [1] * 4, (
        "compute.choice cannot ask MLX so whether arrays are traced: leave `_untraced` out"
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

    from mlx_pararnn.adapters import unpack

    used = import_module(f"mlx_lm.{command}").dequantize_model
    assert used in (mlx_lm.utils.dequantize_model, unpack), (  # `lm` may have run here
        f"mlx_lm.{command} dequantizes another way: cli/lm.py would not reach quantized MultiLinear"
    )


@pytest.mark.parametrize("name", ["weight", "scales", "group_size", "bits", "mode"])
def test_mlx_lm_quantized_multi_linear_has(name):
    from mlx_lm.models.mla import QuantizedMultiLinear

    assert name in QuantizedMultiLinear(64, 32, 2, 32, 4, "affine") or hasattr(
        QuantizedMultiLinear(64, 32, 2, 32, 4, "affine"), name
    ), f"mlx_lm's QuantizedMultiLinear.{name} is gone; see cli/lm.py"


def test_mlx_lms_tokenizer_wrapper_calls_a_function_for_its_chat_template():
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    import mlx_pararnn
    from mlx_pararnn.mlx_lm_internals import plain_tokenizer, set_chat_template

    _, loaded = mlx_pararnn.load(DEMO)
    tokenizer = TokenizerWrapper(plain_tokenizer(loaded))
    set_chat_template(tokenizer, lambda messages, **options: messages[0]["content"])
    said = [{"role": "user", "content": "abc"}]
    assert tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True) == "abc", (
        "mlx_lm's TokenizerWrapper no longer calls _chat_template; see mlx_lm_internals.py"
    )
    assert tokenizer.apply_chat_template(said) == tokenizer.encode("abc", add_special_tokens=False)


def test_mlx_lms_tokenizer_wrapper_copies_its_detokenizer():
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    import mlx_pararnn
    from mlx_pararnn.text.detokenizer import Detokenizer

    _, tokenizer = mlx_pararnn.load(DEMO)
    assert isinstance(tokenizer, TokenizerWrapper)
    first, second = tokenizer.detokenizer, tokenizer.detokenizer
    assert isinstance(first, Detokenizer), (
        "mlx_lm's TokenizerWrapper no longer takes its detokenizer from _detokenizer; see mlx_lm_internals.py"
    )
    first.add_token(97)
    second.add_token(98)
    assert (first.text, second.text) == ("a", "b"), "two callers share the state of one detokenizer"


def test_mlx_lm_keeps_what_mlx_lm_internals_stands_on():
    """Each name, and that it does what the file says."""
    see = "see mlx_pararnn/mlx_lm_internals.py"
    from importlib import import_module

    # A function of that name hides the module in the package.
    generate = import_module("mlx_lm.generate")
    for name in ("BatchGenerator", "TextStateMachine", "make_text_state_machine", "stream_generate"):
        assert hasattr(generate, name), f"mlx_lm.generate.{name} is gone; {see}"
    for name in ("insert_segments", "next", "extract_cache", "remove"):
        assert hasattr(generate.BatchGenerator, name), f"BatchGenerator.{name} is gone; {see}"

    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from mlx_pararnn.mlx_lm_internals import MessageStates, calls_tools_in_json, plain_tokenizer

    words = {word: n for n, word in enumerate(["?", "<tool_call>", "</tool_call>", "<think>", "</think>"])}
    inner = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="?")))
    json_tools = import_module("mlx_lm.tool_parsers.json_tools")
    tokenizer = TokenizerWrapper(
        inner,
        tool_parser=json_tools.parse_tool_call,
        tool_call_start="<tool_call>",
        tool_call_end="</tool_call>",
    )
    assert plain_tokenizer(tokenizer) is inner, f"TokenizerWrapper._tokenizer is gone; {see}"
    assert plain_tokenizer(inner) is inner
    assert calls_tools_in_json(tokenizer), f"mlx_lm's tool parsers stand elsewhere; {see}"
    states = MessageStates(tokenizer, reasoning=True)
    parts = [*states.split("a</think>b<tool_call>c</tool_call>d<tool"), states.flush()]
    said: dict[str, str] = {}
    for state, text in parts:
        said[state] = said.get(state, "") + text
    assert said == {"reasoning": "a", "normal": "bd<tool", "tool": "c"}, f"TextStateMachine differs; {see}"


def test_no_other_file_names_private_parts_of_mlx_lm():
    import ast
    from pathlib import Path

    root = Path(__file__).parents[1]
    for path in [*root.glob("mlx_pararnn/**/*.py"), *root.glob("cli/*.py"), *root.glob("convert/**/*.py")]:
        if path.name == "mlx_lm_internals.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_lm"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                private += [part for part in (node.module or "").split(".") if part.startswith("_")]
                assert not private, f"{path} imports {private}"
            if isinstance(node, ast.Constant):
                assert node.value not in ("_tokenizer", "_detokenizer", "_chat_template"), path


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


@pytest.mark.large
def test_mlx_lm_is_imported_where_few_open_files_are_allowed():
    """Its utils raise the limit as they are imported; import_hook.py lets that fail."""
    code = (
        "import resource\n"
        "def refuse(kind, limits): raise ValueError('not allowed to raise maximum limit')\n"
        "resource.setrlimit = refuse\n"
        "import mlx_pararnn, mlx_lm.utils\n"
        "assert resource.setrlimit is refuse\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, (
        f"mlx_lm changes the limit of open files somewhere else now; see import_hook.py: {result.stderr}"
    )


@pytest.mark.large
def test_mlx_lm_is_imported_under_a_hard_limit_of_1024_open_files():
    pytest.importorskip("resource")
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))\n"
        "import mlx_pararnn, mlx_lm.utils\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1024, 1024)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_mlx_lms_lora_trains_by_the_names_that_the_command_line_replaces():
    from importlib import import_module

    from mlx_lm.tuner.callbacks import TrainingCallback

    lora = import_module("mlx_lm.lora")
    assert list(inspect.signature(lora.train_model).parameters) == [
        "args", "model", "train_set", "valid_set", "training_callback",
    ], "mlx_lm.lora.train_model takes other arguments; see cli/lm.py"  # fmt: skip
    assert "train_model" in lora.run.__code__.co_names, "mlx_lm.lora.run trains another way; see cli/lm.py"
    used = lora.train_model.__code__.co_names
    assert {"train", "print_trainable_parameters"} <= set(used), "see cli/lm_training.py"
    utils = import_module("mlx_lm.tuner.utils")
    converted = utils.linear_to_lora_layers.__wrapped__  # import_hook.py put ours around it
    assert list(inspect.signature(converted).parameters) == ["model", "num_layers", "config", "use_dora"]
    assert "linear_to_lora_layers" in utils.load_adapters.__code__.co_names, "see adapters.py"
    reports = {name for name in vars(TrainingCallback) if name.startswith("on_")}
    assert reports == {"on_train_loss_report", "on_val_loss_report"}, "see cli/lm.py's callback"


def test_mlx_lm_looks_a_saved_caches_class_up_in_its_cache_module(tmp_path):
    import mlx.core as mx
    from mlx_lm.models import cache as mlx_lm_cache

    from mlx_pararnn.cache import RecurrentCache

    cache = RecurrentCache()
    cache[0] = mx.ones((1, 2, 3))
    mlx_lm_cache.save_prompt_cache(f"{tmp_path}/state.safetensors", [cache])
    (read,) = mlx_lm_cache.load_prompt_cache(f"{tmp_path}/state.safetensors")
    assert type(read) is RecurrentCache, (
        "mlx_lm's load_prompt_cache looks classes up elsewhere than in mlx_lm.models.cache; see cache.py"
    )


def test_mlx_lm_imports_a_model_by_its_type():
    from mlx_lm.utils import load_model

    from mlx_pararnn.model import Model

    assert type(load_model(DEMO, lazy=True)[0]) is Model, (
        "mlx_lm no longer imports mlx_lm.models.pararnn for this model_type; see import_hook.py"
    )


def test_mlx_has_a_function_that_sums_gradients_over_processes():
    import mlx.core as mx
    from mlx.nn.layers.distributed import sum_gradients

    class Two:
        size = staticmethod(lambda: 2)

    x, see = mx.ones(3), "; see sharding.py"
    entered = sum_gradients(Two)(x)
    assert mx.array_equal(entered, x), f"mlx's sum_gradients changes what it is given{see}"
    summed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.distributed, "all_sum", lambda dx, group: summed.append(group) or 2 * dx)
        slope = mx.grad(lambda x: sum_gradients(Two)(x).sum())(x)
    assert (summed, slope.tolist()) == ([Two], [2, 2, 2]), f"mlx's sum_gradients sums otherwise{see}"


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


def test_coreai_core_takes_a_marked_argument_for_a_state(tmp_path):
    import asyncio
    from typing import Annotated

    import numpy as np

    core = pytest.importorskip("coreai.authoring", reason="coreai-core is not installed")
    from coreai._compiler.ir import ArrayAttr, DictAttr, StringAttr
    from coreai.runtime import NDArray

    from mlx_pararnn.convert.coreai.aimodel import STATE_ATTRIBUTE

    see = "see convert/coreai/aimodel.py"
    kinds = {name: core.TensorType((2,), np.float32, name=name) for name in ("x", "s", "s_out")}

    def add(x, s):
        return core.add(x, s)

    add.__annotations__ = {
        "x": Annotated[core.Value, kinds["x"]],
        "s": Annotated[core.Value, kinds["s"]],
        "return": Annotated[core.Value, kinds["s_out"]],
    }
    module = core.Module.create()
    with module:
        built = core.graph(add)._callable
        known = [{named.name: named.attr for named in attributes} for attributes in built.arg_attrs]
        known[1][STATE_ATTRIBUTE] = StringAttr.get("s_out")
        built.arg_attrs = ArrayAttr.get([DictAttr.get(attributes) for attributes in known])
    asset = core.AIProgram(module).save_asset(tmp_path / "add.aimodel")
    state = NDArray(np.zeros(2, np.float32))

    async def run():
        async with asset.executable() as model:
            function = model.load_function("add")
            assert function.desc.state_names == ["s"], f"an argument is marked as a state another way; {see}"
            for _ in range(3):
                await function(inputs={"x": NDArray(np.ones(2, np.float32))}, state={"s": state})

    asyncio.run(run())
    assert state.numpy().tolist() == [3.0, 3.0], f"a state is not written in place; {see}"


def test_coreai_core_writes_and_reads_integers_of_four_bits_differently(tmp_path):
    """So matrices in 4 bits are stored as pairs; see convert/coreai/graph_operations.py."""
    import numpy as np

    core = pytest.importorskip("coreai.authoring", reason="coreai-core is not installed")
    from tests.support.coreai import executed

    numbers = np.arange(-8, 8, dtype=np.int8)

    def body(ops, variable):
        four_bits = core.constant.constant(numbers, dtype=core.int4)
        return {"y": ops.add(variable, core.cast(four_bits, core.float32))}

    got = executed(body, np.zeros(16, np.float32), ["y"], tmp_path / "bits.aimodel")["y"]
    assert not np.array_equal(got, numbers), "4 bits work now: the pairs can go"
