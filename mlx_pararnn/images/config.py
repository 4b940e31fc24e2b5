"""The field `images` of config.json: what a model that sees and draws has beside its language model."""

import math
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from ..errors import PararnnError

RECIPE = "examples/manzano in the repository is the recipe that makes one"
NONE_BUNDLED = f"no model that sees or draws comes with the package; give one: {RECIPE}"

# name -> the fields of ImageArgs but for the ids of tokens
PRESETS: dict[str, dict[str, Any]] = {
    "32px": {
        "size": 32,
        "stride": 2,
        "levels": [8, 5, 5, 5],
        "encoder": {"patch": 4, "hidden_size": 128, "layers": 4, "heads": 4, "intermediate_size": 256},
        "decoder": {"patch": 4, "hidden_size": 192, "layers": 6, "heads": 6, "intermediate_size": 512},
    },
    # The paper gives 42 x 42 x 1024 features, 3 x 3 of them a token, and 64K codes; the rest is inferred.
    "3b": {
        "size": 588,
        "stride": 3,
        "levels": [8, 8, 8, 5, 5, 5],
        "encoder": {"patch": 14, "hidden_size": 1024, "layers": 24, "heads": 16, "intermediate_size": 2816},
        "decoder": {"patch": 14, "hidden_size": 2048, "layers": 32, "heads": 32, "intermediate_size": 8192},
    },
}
# So that nothing that a file says becomes an array beyond what MLX can describe.
_LARGEST_SIZE, _LARGEST_WIDTH, _MOST_FEATURES = 1 << 12, 1 << 16, 1 << 24
_MOST_NUMBERS, _MOST_LEVELS, _MOST_CODES = 16, 1 << 16, 1 << 24


@dataclass(frozen=True)
class TransformerArgs:
    """A stack of layers over the patches of an image.

    Attributes:
        patch: the side of a patch, in pixels.
        share_attention: all layers have one attention's weights, as DiT-Air-Lite's (arXiv 2503.10618).
    """

    patch: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    share_attention: bool = False


@dataclass(frozen=True)
class ImageArgs:
    """What `images` in config.json says.

    Attributes:
        size: the side of the square images, in pixels.
        stride: so many patches in each direction become one token (space-to-channel).
        levels: values that each number of a discrete code can have (FSQ); their product is the number of
            image tokens.
        encoder: the vision encoder.
        decoder: the image decoder; None for a model that sees and does not draw.
        begin_token, end_token: ids of the text tokens around an image.
        first_token: id of the first image token; the others follow it to the end of the vocabulary.
        quantization: group_size and bits of the encoder's, adapters' and decoder's matrices; None for floats.
    """

    size: int
    stride: int
    levels: tuple[int, ...]
    encoder: TransformerArgs
    decoder: TransformerArgs | None
    begin_token: int
    end_token: int
    first_token: int
    quantization: dict[str, int] | None = None

    def __post_init__(self) -> None:
        for name in ("size", "stride"):
            _check_number(name, getattr(self, name), 1, _LARGEST_SIZE)
        for name in ("begin_token", "end_token", "first_token"):
            _check_number(name, getattr(self, name), 0, 2**31 - 1)
        levels = list(self.levels)
        if not 1 <= len(levels) <= _MOST_NUMBERS:
            raise PararnnError(f"config.json: images.levels must hold 1 to {_MOST_NUMBERS} numbers")
        if not all(type(n) is int and 2 <= n <= _MOST_LEVELS for n in levels):
            raise _wrong("levels", levels, "whole numbers of at least 2")
        if self.codes > _MOST_CODES:
            raise _wrong("levels", levels, f"numbers whose product is at most {_MOST_CODES:,}")
        for name in ("encoder", "decoder"):
            part: TransformerArgs | None = getattr(self, name)
            if part is None:
                continue
            for field in fields(part):
                if field.name != "share_attention":
                    _check_number(f"{name}.{field.name}", getattr(part, field.name), 1, _LARGEST_WIDTH)
            if type(part.share_attention) is not bool:
                raise _wrong(f"{name}.share_attention", part.share_attention, "true or false")
            if part.hidden_size % part.heads:
                raise _wrong(f"{name}.hidden_size", part.hidden_size, f"a multiple of heads {part.heads}")
            if self.size % part.patch:
                raise _wrong("size", self.size, f"a multiple of {name}.patch {part.patch}")
        if (self.size // self.encoder.patch) % self.stride:
            raise _wrong("stride", self.stride, f"a divisor of {self.size // self.encoder.patch} patches")
        if self.encoder.hidden_size * self.stride**2 > _MOST_FEATURES:
            raise _wrong("stride", self.stride, f"small enough for {_MOST_FEATURES:,} features of a token")

    @property
    def codes(self) -> int:
        """How many image tokens there are."""
        return math.prod(self.levels)

    @property
    def tokens(self) -> int:
        """How many tokens an image is."""
        return (self.size // self.encoder.patch // self.stride) ** 2

    @classmethod
    def preset(cls, name: str, begin_token: int, end_token: int, first_token: int) -> "ImageArgs":
        """The recipe's model for pictures of 32 pixels ("32px"), or the paper's 3B model ("3b").

        Raises:
            PararnnError: no such preset.
        """
        if name not in PRESETS:
            raise PararnnError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        ids = {"begin_token": begin_token, "end_token": end_token, "first_token": first_token}
        return cls.from_dict({**PRESETS[name], **ids})

    @classmethod
    def from_dict(cls, values: Any) -> "ImageArgs":
        """What stands in config.json; raises PararnnError for a missing, unknown or wrong field."""
        known = _checked(cls, "images", values)
        for name in ("encoder", "decoder"):
            if known.get(name) is not None or name == "encoder":
                known[name] = TransformerArgs(**_checked(TransformerArgs, f"images.{name}", known[name]))
        if not isinstance(known["levels"], list | tuple):
            raise _wrong("levels", known["levels"], "a list of whole numbers")
        known["levels"] = tuple(known["levels"])
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        values = asdict(self) | {"levels": list(self.levels)}
        return {name: value for name, value in values.items() if name != "quantization" or value}


def _checked(kind: Any, what: str, values: Any) -> dict[str, Any]:
    """`values` if they are the fields of the dataclass `kind`."""
    if not isinstance(values, dict):
        raise PararnnError(f"config.json: {what} is {_short(values)}; it must be an object")
    names = {field.name: field.default is MISSING for field in fields(kind)}
    for name in values:
        if name not in names:
            raise PararnnError(f"config.json: {what} has a field {_short(name)}, which is unknown")
    for name, needed in names.items():
        if needed and name not in values:
            raise PararnnError(f"config.json: {what} lacks the field {name!r}")
    return dict(values)


def _check_number(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise _wrong(name, value, f"a whole number from {least} to {most}")


def _short(value: Any) -> str:
    return repr(value)[:100]


def _wrong(name: str, value: Any, wanted: str) -> PararnnError:
    return PararnnError(f"config.json: images.{name} is {_short(value)}; it must be {wanted}")
