"""LoRA and DoRA for the recurrence's projection."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_pararnn.adapters import DoRAMultiLinear, LoRAMultiLinear
from tests.support.training_runs import small_model

X = mx.random.normal((2, 7, 64), key=mx.random.key(1))


@pytest.mark.parametrize("kind", [LoRAMultiLinear, DoRAMultiLinear])
@pytest.mark.parametrize("bits", [None, 8])
def test_an_adapter_changes_nothing_at_first_and_is_fused_as_it_computes(kind, bits):
    mx.random.seed(0)
    linear = MultiLinear(64, 24, 2)
    base = linear if bits is None else linear.to_quantized(64, bits)
    adapter = kind(base, 4, 3.0, 0.0)
    assert mx.allclose(adapter(X), base(X), atol=1e-5)
    adapter.lora_b = mx.random.normal(adapter.lora_b.shape)
    if kind is DoRAMultiLinear:
        adapter.m = adapter.m * 1.5
    given = adapter(X)
    assert not mx.allclose(given, base(X), atol=0.1)
    fused = adapter.fuse(dequantize=True)
    assert type(fused) is MultiLinear
    assert mx.allclose(fused(X), given, atol=1e-3)
    again = adapter.fuse()
    assert type(again) is (MultiLinear if bits is None else QuantizedMultiLinear)
    assert mx.abs(again(X) - given).max() < (1e-3 if bits is None else 0.05 * mx.abs(given).max())


@pytest.mark.parametrize("keys", [None, ["mixer.cell.input_proj"], ["mlp.up_proj"]])
@pytest.mark.parametrize("use_dora", [False, True])
def test_which_layers_have_adapters(keys, use_dora):
    """Of the last `num_layers` layers, and where `keys` names some, these alone."""
    model = small_model()
    model.freeze()
    config = {"rank": 2, "scale": 1.0, "dropout": 0.0} | ({} if keys is None else {"keys": keys})
    linear_to_lora_layers(model, 1, config, use_dora)
    first, last = model.layers
    wanted = keys is None or keys[0].endswith("input_proj")
    assert type(first.mixer.cell.input_proj) is MultiLinear
    assert isinstance(last.mixer.cell.input_proj, LoRAMultiLinear) is wanted
    assert ("lora_a" in last.mlp.up_proj) is (keys is None or "mlp.up_proj" in keys)
    learned = {name for name, _ in tree_flatten(last.mixer.cell.trainable_parameters())}
    parts = ["lora_a", "lora_b", "m"][: 3 if use_dora else 2]
    assert learned == ({f"input_proj.{part}" for part in parts} if wanted else set())
