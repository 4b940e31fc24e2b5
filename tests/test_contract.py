"""What this package uses of other libraries that they do not promise to keep: each thing by its name.

A failure here says what changed, before anything else fails for a reason nobody can see.
"""

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
