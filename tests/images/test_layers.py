"""Encoder, adapters, FSQ and decoder against the oracle in NumPy, at random weights."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_pararnn import Model, ModelArgs, PararnnError
from mlx_pararnn.images import layers
from mlx_pararnn.images.config import PRESETS, ImageArgs
from mlx_pararnn.images.decoder import ImageDecoder, flow_losses
from mlx_pararnn.images.image_model import ImageModel
from mlx_pararnn.images.image_tokenizer import FiniteScalarQuantizer, HybridTokenizer
from tests.support import image_oracle as oracle
from tests.support.image_models import TRANSFORMER, image_args, random_weights, weights_of
from tests.support.memory import active_memory

SHARED = {**TRANSFORMER, "share_attention": True}
SIZES = {"patch": 2, "heads": 2, "layers": 2}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(found, expected):
    """To 5e-5 of the largest number: an angle of 1,000 in float32 is as far off."""
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=5e-5 * max(1, np.abs(expected).max()))


def random_decoder(part=TRANSFORMER):
    decoder = ImageDecoder(image_args(decoder=part), 16)
    random_weights(decoder)
    return decoder, weights_of(decoder)


def test_patches_and_back():
    pixels = numbers(2, 8, 8, 3)
    cut = layers.patches(mx.array(pixels), 2)
    close(cut, [oracle.patches(image, 2) for image in pixels])
    assert (np.array(layers.pixels_of(cut, 2, 8)) == pixels).all()


@pytest.mark.parametrize(("N", "stride"), [(16, 2), (81, 3)])
def test_space_to_channel(N, stride):
    x = numbers(2, N, 5)
    found = layers.space_to_channel(mx.array(x), stride)
    assert found.shape == (2, N // stride**2, 5 * stride**2)
    close(found, [oracle.space_to_channel(row, stride) for row in x])


@pytest.mark.parametrize("part", [TRANSFORMER, SHARED])
def test_the_tokenizer(part):
    """Encoder, space-to-channel and both adapters."""
    args = image_args(encoder=part)
    tokenizer = HybridTokenizer(args, 12)
    random_weights(tokenizer)
    weights, pixels = weights_of(tokenizer), numbers(2, 8, 8, 3)
    encoded = tokenizer.encoder(mx.array(pixels))
    own = oracle.part(weights, "encoder.")
    close(encoded, [oracle.encoder(own, image, **SIZES) for image in pixels])
    features = tokenizer.features(mx.array(pixels))
    close(features, [oracle.space_to_channel(row, 2) for row in np.array(encoded)])
    exact = np.array(features, np.float64)
    read = [oracle.adapter(oracle.part(weights, "continuous."), row) for row in exact]
    close(tokenizer.read(features), read)
    found = [oracle.fsq(oracle.linear(weights, "code_proj", row), args.levels) for row in exact]
    close(tokenizer.encode(features), [codes for codes, _ in found])
    tokens = tokenizer.tokens(mx.array(pixels))
    assert tokens.tolist() == [tokens.tolist() for _, tokens in found]
    embedded = [oracle.adapter(oracle.part(weights, "discrete."), codes) for codes, _ in found]
    close(tokenizer.embed(tokens), embedded)


@pytest.mark.large
def test_large_images_take_the_cpus_vector_unit(cpu_backend):
    """The same numbers as MLX's operations give, forward and backward."""
    args = image_args(size=64)
    tokenizer = HybridTokenizer(args, 12)
    random_weights(tokenizer)
    pixels = mx.array(numbers(6, 64, 64, 3))

    def loss(tokenizer):
        return (tokenizer.read(tokenizer.features(pixels)) ** 2).mean()

    values = []
    for backend in ("cpu", "ops"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLX_PARARNN_BACKEND", backend)
            value, gradient = nn.value_and_grad(tokenizer, loss)(tokenizer)
            values.append([value, *(g for name, g in tree_flatten(gradient) if "code" not in name)])
    for found, expected in zip(*values, strict=True):
        close(found, np.array(expected))


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (4, 3, 2), (2, 2), (7,)])
def test_finite_scalar_quantization(levels):
    z = 3 * numbers(200, len(levels))
    codes, tokens = oracle.fsq(z, levels)
    quantizer = FiniteScalarQuantizer(levels)
    found = quantizer(mx.array(z))
    close(found, codes)
    assert quantizer.tokens(found).tolist() == tokens.tolist()
    assert (np.array(quantizer.codes(mx.array(tokens))) == np.array(found)).all()
    every = mx.arange(int(np.prod(levels)))
    assert quantizer.tokens(quantizer.codes(every)).tolist() == every.tolist()


def test_the_gradient_passes_the_rounding():
    """It is that of the bounded numbers (FSQ's straight-through estimator)."""
    quantizer, z = FiniteScalarQuantizer((8, 5)), mx.array(numbers(3, 2))
    gradient = mx.grad(lambda z: quantizer(z).sum())(z)
    half, shift = np.array([7 * 1.001 / 2, 4 * 1.001 / 2]), np.array([np.arctanh(0.5 / (7 * 1.001 / 2)), 0])
    close(gradient, (1 - np.tanh(np.array(z) + shift) ** 2) * half / [4, 2])
    assert np.abs(np.array(gradient)).min() > 0


@pytest.mark.parametrize("part", [TRANSFORMER, SHARED])
def test_the_decoder(part):
    decoder, weights = random_decoder(part)
    pixels, condition, time = numbers(3, 8, 8, 3), numbers(3, 4, 16, seed=1), [0.0, 0.3, 1.0]
    kept = mx.array([True, False, True])
    found = decoder(mx.array(pixels), mx.array(time), mx.array(condition), kept)
    told = [condition[0], None, condition[2]]
    close(
        found,
        [oracle.velocity(weights, *row, **SIZES, tokens=4) for row in zip(pixels, time, told, strict=True)],
    )


def test_a_new_decoder_says_nothing():
    decoder = ImageDecoder(image_args(), 16)
    velocity = decoder(mx.array(numbers(1, 8, 8, 3)), mx.array([0.5]), mx.array(numbers(1, 4, 16)))
    assert (np.array(velocity) == 0).all()


def test_the_loss_of_the_flow():
    decoder, weights = random_decoder()
    pixels, noise, condition = numbers(2, 8, 8, 3), numbers(2, 8, 8, 3, seed=1), numbers(2, 4, 16, seed=2)
    time = [0.25, 0.8]
    found = flow_losses(decoder, *map(mx.array, (pixels, condition, noise, time)))
    expected = []
    for x, e, c, t in zip(pixels, noise, condition, time, strict=True):
        v = oracle.velocity(weights, (1 - t) * e + t * x, t, c, **SIZES, tokens=4)
        expected.append(((v - (x - e)) ** 2).mean())
    close(found, expected)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_is_eulers_method(guidance):
    decoder, weights = random_decoder()
    noise, condition = numbers(1, 8, 8, 3), numbers(1, 4, 16, seed=2)
    said, steps = [], []

    def progress(done, total, pixels):
        said.append((done, total))
        steps.append(np.array(pixels[0]))

    found = decoder.sample(mx.array(condition), mx.array(noise), 3, guidance, progress)
    x = noise[0].astype(np.float64)
    for step in range(3):
        told, untold = (
            oracle.velocity(weights, x, step / 3, c, **SIZES, tokens=4) for c in (condition[0], None)
        )
        x = x + (untold + guidance * (told - untold)) / 3
        close(steps[step], x)
    close(found[0], x)
    assert said == [(1, 3), (2, 3), (3, 3)]


def count(module):
    return sum(w.size for _, w in tree_flatten(module.parameters()))


def test_the_papers_sizes_without_allocating():
    """Its 3B model, counted; the language model is the ParaRNN paper's of 2.9B with image tokens."""
    before = active_memory()
    language = ModelArgs.preset("2.9b")
    args = ImageArgs.preset("3b", 2, 3, language.vocab_size)
    assert args.codes == 64_000
    assert args.tokens == 14 * 14
    language.vocab_size += args.codes
    model = ImageModel(args, Model(language))
    assert model.image_tokenizer.continuous.layers[0].weight.shape[1] == 9216
    counts = {name: count(part) for name, part in model.image_parts().items()}
    assert 0.25e9 < counts["image_tokenizer"] < 0.45e9
    assert 1.5e9 < counts["image_decoder"] < 3.6e9
    assert 2.9e9 < count(model.language_model) < 3.4e9
    assert active_memory() - before < 1 << 20


def test_the_recipes_size():
    args = ImageArgs.preset("32px", 257, 258, 512)
    assert (args.codes, args.tokens) == (1000, 16)
    parts = ImageModel(args, Model(ModelArgs(256, 4, 1512, 704))).image_parts()
    assert sum(map(count, parts.values())) < 5e6
    assert set(PRESETS) == {"32px", "3b"}
    with pytest.raises(PararnnError, match="unknown preset '4b'; choose one of 32px, 3b"):
        ImageArgs.preset("4b", 1, 2, 3)
