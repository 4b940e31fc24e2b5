"""config.json: its fields, the paper's shapes, and how its weights are quantized."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.models.base import BaseModelArgs

from .cells import get_cell
from .errors import PararnnError
from .files.quantization_formats import BITS, GROUP_SIZES, MODES

# What the weights of other programs are called in `quantization_config` and MLX reads as they are.
_FORMATS = ("mxfp4", "mxfp8")
_MOST = 2**31 - 1  # of a size of an MLX array

# name -> hidden_size, num_hidden_layers, num_heads, intermediate_size
PRESETS = {
    "400m": (1024, 24, 4, 2816),
    "1b": (2048, 24, 4, 5632),
    "2.9b": (2560, 32, 2, 6912),
    "7b": (4096, 32, 4, 11008),
}


@dataclass
class ModelArgs(BaseModelArgs):
    """config.json's fields.

    Attributes:
        num_heads: blocks of the block-diagonal input projection; hidden_size is a multiple of it.
        mixer: "gated_conv" or "plain".
        norm: "rms" or "layer".
        mlp: "swiglu" or "gelu" (the exact one).
        mlp_residual: False only for ml-pararnn's training code, whose MLP replaces the stream.
        residual_scale: each layer scales the stream it adds to by a learned number.
        max_position_embeddings: how many learned positions there are; None for none.
        activations: the cell's activations where they are not its defaults.
    """

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    intermediate_size: int
    model_type: str = "pararnn"
    cell: str = "gru"
    num_heads: int = 1
    mixer: str = "gated_conv"
    conv_kernel: int = 4
    norm: str = "rms"
    norm_eps: float = 1e-6
    mlp: str = "swiglu"
    mlp_bias: bool = False
    mlp_residual: bool = True
    residual_scale: bool = False
    max_position_embeddings: int | None = None
    tie_word_embeddings: bool = False
    activations: dict[str, str] | None = None

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "vocab_size",
            "intermediate_size",
            "num_heads",
            "conv_kernel",
        ):
            _check_whole_number(name, getattr(self, name))
        for name, choices in (
            ("mixer", ("gated_conv", "plain")),
            ("norm", ("rms", "layer")),
            ("mlp", ("swiglu", "gelu")),
        ):
            if getattr(self, name) not in choices:
                raise PararnnError(
                    f"config.json: {name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}"
                )
        if self.max_position_embeddings is not None:
            _check_whole_number("max_position_embeddings", self.max_position_embeddings)
        for name in ("mlp_bias", "mlp_residual", "residual_scale", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise PararnnError(
                    f"config.json: {name} is {getattr(self, name)!r}; it must be true or false"
                )
        if (
            isinstance(self.norm_eps, bool)
            or not isinstance(self.norm_eps, (int, float))
            or not 0 <= self.norm_eps <= 1e38  # float32's largest is a little above
        ):
            raise PararnnError(
                f"config.json: norm_eps is {_short(self.norm_eps)}; it must be a number, not below 0"
            )
        if not isinstance(self.activations, dict | None) or not isinstance(self.cell, str):
            raise PararnnError("config.json: cell must be a name, and activations an object or null")
        get_cell(self.cell, self.activations)
        if self.hidden_size % self.num_heads:
            raise PararnnError(
                f"config.json: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelArgs":
        """Raises PararnnError for a missing field; fields it does not know are ignored."""
        try:
            return super().from_dict(params)  # type: ignore[no-any-return]
        except TypeError as error:
            raise PararnnError(f"config.json: {str(error).removeprefix('ModelArgs.__init__() ')}") from None

    @classmethod
    def preset(cls, name: str, cell: str = "gru") -> "ModelArgs":
        """The shapes of the paper's models (its Table 2): "400m", "1b", "2.9b" or "7b"; cell "gru" or "lstm".

        The paper's own language model was never released: what is not in its text (vocabulary, MLP width,
        heads) is inferred from its parameter counts.

        Raises:
            PararnnError: no such preset.
        """
        if name not in PRESETS:
            raise PararnnError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        hidden_size, layers, heads, intermediate_size = PRESETS[name]
        return cls(
            cell=cell,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_heads=heads,
            intermediate_size=intermediate_size,
            vocab_size=50432,
        )


def weight_bits(config: dict[str, Any], file: Path) -> dict[str, int]:
    """How many bits a quantized weight has: by the path of its module, and "" for those not named.

    Args:
        config: what `file` holds, config.json.

    Raises:
        PararnnError: `quantization` names a group size or a number of bits that MLX does not have; some of
            them end the process.
    """
    quantization = config.get("quantization")
    needed = quantization is not None
    if not needed:  # where other tools say it; MLX-LM looks there too
        quantization = config.get("quantization_config") or {}
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method is not None and method not in _FORMATS:
            raise PararnnError(
                f"{file}: the weights are packed as {_short(method)} does it, which is not read; convert the "
                "checkpoint that they were made of, with -q for packed weights"
            )
    settings: dict[str, Any] = {"": quantization}
    if isinstance(quantization, dict):
        settings |= {path: setting for path, setting in quantization.items() if isinstance(setting, dict)}
    for path, setting in settings.items():
        mode = setting.get("mode") if isinstance(setting, dict) else None
        own = MODES.get(mode, MODES["affine"]) if isinstance(mode, str) else MODES["affine"]
        sizes, bits = (GROUP_SIZES, BITS) if own == MODES["affine"] else ((own[0],), (own[1],))
        for name, choices in (("group_size", sizes), ("bits", bits)):
            value = setting.get(name) if isinstance(setting, dict) else setting
            if value is None and (path or not needed):
                continue
            if type(value) is not int or value not in choices:
                raise PararnnError(
                    f"{file}: quantization does not say how many bits a weight has, in groups of how many "
                    f"(quantization {name} is {_short(value)}; it must be one of {choices}); convert the "
                    "checkpoint again"
                )
    default = settings[""].get("bits") or 4
    return {path: setting.get("bits") or default for path, setting in settings.items()}


def _check_whole_number(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
        raise PararnnError(
            f"config.json: {name} is {_short(value)}; it must be a whole number of at least 1"
            + (f" and at most {_MOST}" if isinstance(value, int) and value > _MOST else "")
        )


def _short(value: Any) -> str:
    """A value as a message shows it, which it shall not fill."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def check_end_ids(config: Mapping[str, Any], file: Path) -> None:
    """Raise a PararnnError if `eos_token_id` in what `file` says is no token id, nor a list of them."""
    ends = config.get("eos_token_id")
    for end in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        if not isinstance(end, int) or isinstance(end, bool) or not 0 <= end < 2**31:
            raise PararnnError(f"{file}: eos_token_id holds {_short(end)}; it must be a token id, or several")


def check_layers(config: Mapping[str, Any], names: Iterable[str], path: Path) -> None:
    """Raise a PararnnError if the weights of these names, in `path`, have another number of layers."""
    prefix = "model.layers."
    layers, found = (
        config.get("num_hidden_layers"),
        len({n.split(".")[2] for n in names if n.startswith(prefix)}),
    )
    if isinstance(layers, int) and layers != found:
        raise PararnnError(
            f"the weights in {path} do not fit its config.json: num_hidden_layers is {layers}, and they have "
            f"{found} layers; convert the checkpoint again"
        )
