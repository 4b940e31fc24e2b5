"""A language model with an image encoder and, where it draws, an image decoder; its folder.

The folder is a language model's, which every command reads, with the field `images` in config.json and the
weights of tokenizer and decoder in images.safetensors. The language model's last tokens are image tokens.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from safetensors import SafetensorError, safe_open

from ..distributed import Group
from ..errors import PararnnError, one_line
from ..files.hub import find_model
from ..files.model_files import check_safetensors
from ..loading import check_dtypes, load_model, load_tokenizer
from ..model import Model
from .config import RECIPE, ImageArgs
from .modules import ImageModules
from .use import draw, see

if TYPE_CHECKING:
    from PIL.Image import Image

WEIGHTS = "images.safetensors"


class ImageModel(ImageModules):
    """The language model, the image tokenizer, and the image decoder where there is one."""

    def draw(self, tokenizer: TokenizerWrapper, text: str, **options: Any) -> "Image":
        """A picture of what `text` says; `options` and errors are those of `mlx_pararnn.draw`."""
        return draw(self, tokenizer, text, **options)

    def see(
        self,
        tokenizer: TokenizerWrapper,
        image: "Path | str | bytes | Image",
        question: str,
        **options: Any,
    ) -> str:
        """What the model answers to a question about an image; as `mlx_pararnn.see`."""
        return see(self, tokenizer, image, question, **options)


def load_image_model(
    path_or_hf_repo: str | Path, *, adapter_path: str | Path | None = None, state: str | Path | None = None
) -> tuple[ImageModel, TokenizerWrapper]:
    """A model that sees, and its tokenizer; arguments as `mlx_pararnn.load` has them.

    Raises:
        PararnnError: there is no such model, it is not whole, or it is a language model alone.
    """
    _, tokenizer, model = load_with_images(path_or_hf_repo, adapter_path=adapter_path, state=state)
    if model is None:
        raise PararnnError(
            f"{find_model(path_or_hf_repo)}: this model neither sees nor draws images; {RECIPE}"
        )
    return model, tokenizer


def load_with_images(
    path_or_hf_repo: str | Path,
    *,
    adapter_path: str | Path | None = None,
    state: str | Path | None = None,
    group: Group | None = None,
) -> tuple[Model, TokenizerWrapper, ImageModel | None]:
    """Any model and its tokenizer, as `mlx_pararnn.load`; and if it sees, the model that it is part of.

    Raises:
        PararnnError: as `mlx_pararnn.load`; or a model that sees is to be divided among a group.
    """
    path = find_model(path_or_hf_repo)
    language_model, config = load_model(path, adapter_path=adapter_path, state=state, group=group)
    if "images" in config and group is not None:
        raise PararnnError("a model that sees images runs in one process; start it without mlx.launch")
    model = _with_images(path, config["images"], language_model) if "images" in config else None
    return language_model, load_tokenizer(path, config), model


def _with_images(path: Path, values: Any, language_model: Model) -> ImageModel:
    file = path / WEIGHTS
    shapes = _shapes(file)
    try:
        args = ImageArgs.from_dict(values)
        _check_layers(args, shapes)
        model = ImageModel(args, language_model)
        if args.quantization is not None:
            model.quantize(**_quantization(args.quantization))
    except PararnnError as error:
        raise PararnnError(f"{path}: {error}") from None
    _check_weights(model, shapes, file)
    try:
        model.load_weights(str(file), strict=False)
        check_dtypes(path, model)
        mx.eval(model.parameters())
    except (RuntimeError, OSError) as error:
        raise _unreadable(file, error) from error
    return model


def _quantization(values: dict[str, int]) -> dict[str, int]:
    if not isinstance(values, dict) or values.keys() != {"bits", "group_size"}:
        raise PararnnError(f"config.json: images.quantization is {values!r}; it must say bits and group_size")
    return values


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """What the header of a file of weights says."""
    try:
        check_safetensors(file)
        with safe_open(file, "numpy") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise PararnnError(f"no {WEIGHTS} in {file.parent}; copy or train the model again") from None
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def _check_layers(args: ImageArgs, shapes: dict[str, tuple[int, ...]]) -> None:
    """Before any is made: a config may name millions."""
    for name, prefix in (
        ("encoder", "image_tokenizer.encoder.layers."),
        ("decoder", "image_decoder.layers."),
    ):
        part = getattr(args, name)
        count = len({key.removeprefix(prefix).partition(".")[0] for key in shapes if key.startswith(prefix)})
        if part is not None and part.layers != count:
            raise PararnnError(
                f"config.json: images.{name}.layers is {part.layers}, and {WEIGHTS} has {count}; copy or "
                "train the model again"
            )


def _check_weights(model: ImageModel, shapes: dict[str, tuple[int, ...]], file: Path) -> None:
    """Names and shapes, before anything is read."""
    wanted = model.image_weights()
    for name in sorted(wanted.keys() | shapes.keys()):
        there, needed = shapes.get(name), wanted[name].shape if name in wanted else None
        if there != needed:
            raise PararnnError(
                f"{file}: does not fit config.json: {name} is {there or 'missing'} and should be "
                f"{needed or 'absent'}; copy or train the model again"
            )


def _unreadable(file: Path, error: Exception) -> PararnnError:
    return PararnnError(f"{file} cannot be read ({one_line(error)}); copy or train the model again")
