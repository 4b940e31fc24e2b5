"""A stand-in for the project's Launch, for kernels written only to test the tests."""

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Sample:
    source: str
    input_names: tuple[str, ...] = ("x",)
    output_names: tuple[str, ...] = ("y",)
    output_shapes: tuple[tuple[int, ...], ...] = ((64,),)
    output_dtypes: tuple[mx.Dtype, ...] = (mx.float32,)
    grid: tuple[int, int, int] = (64, 1, 1)
    threadgroup: tuple[int, int, int] = (64, 1, 1)
    template: tuple[tuple[str, int | bool | mx.Dtype], ...] = ()
    header: str = ""
    name: str = "sample"
    contiguous: bool = True
