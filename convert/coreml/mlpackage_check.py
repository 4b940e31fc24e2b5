"""Does a package give on this Mac what MLX gave when it was exported? `mlx-pararnn verify OUT`."""

import json
import os
import platform
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.files.model_files import open_regular
from mlx_pararnn.tools.verification import Check

from ..package.description import checked_description, prefills
from ..package.reference import Reference, checked_reference, relative_difference
from ..readers.forms import COREML, PACKAGE_FILE, check_package_files, read_json_object
from .compute_unit import UNITS, compiled, present_units, run_on
from .require_coremltools import quiet, require_coremltools

Array = npt.NDArray[Any]

# How many times as far from MLX in float32 as MLX's own float16 is a processor's may be: a runtime whose
# products add in float16 was found to be 5 times as far.
_TIMES = 8
_MOST = 0.1  # beyond it a package is of no use, whatever float16 costs MLX
TOLERANCE = 1e-2  # ||logits - MLX's|| / ||MLX's||, where a package does not have MLX's own in float16
# That a processor may take: so many, and one more for each so many bytes of the package.
_SECONDS, _BYTES_A_SECOND = 60, 2 << 20
_MODEL, _WEIGHTS = "com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"  # as the manifest names them
_BLOBS = f"{_WEIGHTS}/weight.bin"
_MOST_MODEL_BYTES = 128 << 20  # of a program, whose weights are beside it
# What stands before each weight in weight.bin: a mark, its type, its size and its place.
_BLOB, _BLOB_MARK = struct.Struct("<IIQQ"), 0xDEADBEEF


def verify_package(folder: Path) -> Iterator[Check]:
    """The reference text read by prefill and decode, on each kind of processor, against MLX's logits.

    Each processor that this machine has is asked in a process of its own; one that fails is a failed check.

    Raises:
        PararnnError: the folder is not whole, or this is not a Mac that can run it.
    """
    settings = _checked_settings(folder)
    package = folder / COREML.name
    reference = checked_reference(folder, package, settings)
    if not can_predict():
        raise PararnnError(
            f"{folder}: the package is whole and says what {PACKAGE_FILE} says, but Core ML runs on macOS 15 "
            "or newer only, so none of its numbers were compared; run this on a Mac"
        )
    nbytes = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
    seconds = _SECONDS + nbytes / _BYTES_A_SECOND
    with compiled(package) as made:
        units = present_units()
        if not units:
            raise PararnnError(
                f"{folder}: Core ML tells of no processor here, so none of its numbers were compared"
            )
        for unit in units:
            name = UNITS[unit]
            try:
                answers, places = run_on(unit, made, settings, reference.tokens, seconds)
            except PararnnError as error:
                yield Check(f"{name}: runs that failed", 1, 0, str(error), counted="run")
                continue
            counts = prefills(settings).values()
            for count, reading in zip(counts or [1], answers, strict=True):
                title = f"{name}, {count} at once," if len(counts) > 1 else name
                yield _check(title, settings, reading, reference, _told(places))


def unseen() -> str:
    """Which processors `verify_package` did not ask, since this machine has none; "" if it has all."""
    absent = [name for unit, name in UNITS.items() if unit not in present_units()]
    return f"Not asked, as this machine has none: {', '.join(absent)}." if absent else ""


def _check(name: str, settings: Mapping[str, Any], answers: Array, reference: Reference, note: str) -> Check:
    expected = reference.logits[-len(answers) :]
    if settings["output"] == "token":
        tokens = answers.reshape(-1)
    else:
        answers = answers.astype(np.float32)
        tokens = answers.argmax(-1)
    same = tokens == expected.argmax(-1)
    ties = ~same & _near(tokens, reference)
    told = f", {ties.sum()} as likely" if ties.any() else ""
    note = f"{same.sum()} of {len(answers)} likeliest tokens equal{told}{note}"
    if settings["output"] == "token":
        return Check(
            f"{name.rstrip(',')}: tokens that differ from MLX's", float((~same & ~ties).sum()), 0.0, note
        )
    tolerance = TOLERANCE if reference.yardstick is None else min(_TIMES * reference.yardstick, _MOST)
    difference = relative_difference(answers, expected)
    return Check(f"{name} against MLX in float32, relative", difference, tolerance, note)


def _near(tokens: Array, reference: Reference) -> Array:
    """For which `tokens`, one a call, float16 may make them the likeliest."""
    if reference.margins is None:
        return np.zeros(len(tokens), bool)
    expected, margins = reference.logits[-len(tokens) :], reference.margins[-len(tokens) :]
    inside = np.clip(tokens, 0, expected.shape[-1] - 1)
    below = expected.max(-1) - expected[np.arange(len(tokens)), inside]
    return np.asarray((below <= _TIMES * margins) & (inside == tokens))


def _told(places: Mapping[str, Mapping[str, int]]) -> str:
    """Where Core ML's plan has the operations of each function."""
    return "".join(
        f"; {function}: " + ", ".join(f"{count} operations on {name}" for name, count in counts.items())
        for function, counts in places.items()
        if counts
    )


def can_predict() -> bool:
    """Whether this machine runs Core ML models of iOS 18 and macOS 15."""
    return platform.system() == "Darwin" and int(platform.mac_ver()[0].split(".")[0]) >= 15


def _checked_settings(folder: Path) -> dict[str, Any]:
    """pararnn.json, once the package has been found to say the same of itself."""
    check_package_files(folder)
    settings = checked_description(folder, COREML)
    package = folder / COREML.name
    _check_manifest(package)
    require_coremltools()
    import coremltools as ct

    try:
        with quiet():
            spec = ct.utils.load_spec(str(package))
        description = spec.description
        whole = _holds_its_weights(package, spec)
        inside = json.loads(description.metadata.userDefined.get("pararnn", "{}"))
        functions = [function.name for function in description.functions]
    except Exception as error:  # coremltools has its own for each thing that may be missing
        raise _not_whole(package) from error
    if not whole:
        raise PararnnError(f"{package}: its weights are cut short; copy it again, or export the model again")
    if inside != settings or functions != settings["functions"]:
        raise PararnnError(f"{package}: is not the package that {PACKAGE_FILE} describes; export again")
    return settings


def _check_manifest(package: Path) -> None:
    """Raise a PararnnError for a manifest that names files elsewhere, or a program too large to be one.

    coremltools reads whatever file the manifest names, all of it: /dev/zero too.
    """
    manifest = read_json_object(package / "Manifest.json") or {}
    try:
        entries = manifest["itemInfoEntries"]
        model = entries[manifest["rootModelIdentifier"]]["path"]
        others = {str(entry["path"]) for entry in entries.values()}
        size = (package / "Data" / _MODEL).stat().st_size
    except (LookupError, TypeError, AttributeError, OSError) as error:  # as of a list in an object's place
        raise _not_whole(package) from error
    if model != _MODEL or not others <= {_MODEL, _WEIGHTS} or size > _MOST_MODEL_BYTES:
        raise _not_whole(package)


def _not_whole(package: Path) -> PararnnError:
    return PararnnError(f"{package}: is no whole Core ML package; export the model again")


def _holds_its_weights(package: Path, spec: Any) -> bool:
    """Whether every weight that the program names lies in its file from the first byte to the last."""
    places = {(value.fileName, value.offset) for value in file_values(spec.mlProgram)}
    if not places:
        return True
    if {name for name, _ in places} != {f"@model_path/weights/{Path(_BLOBS).name}"}:
        return False  # a file elsewhere may be a device
    with open_regular(package / "Data" / _BLOBS) as file:
        end = file.seek(0, os.SEEK_END)
        for _, offset in places:
            if offset > end:
                return False
            file.seek(offset)
            header = file.read(_BLOB.size)
            if len(header) < _BLOB.size:
                return False
            mark, _, nbytes, begin = _BLOB.unpack(header)
            if mark != _BLOB_MARK or begin + nbytes > end:
                return False
    return True


def file_values(message: Any) -> Iterator[Any]:
    """The references to a file of weights inside a message of the MIL program."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            parts = [part for part in value.values() if hasattr(part, "ListFields")]
        else:
            parts = value if field.is_repeated else [value]
        for part in parts:
            if field.name == "blobFileValue":
                yield part
            else:
                yield from file_values(part)
