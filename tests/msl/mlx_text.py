"""A kernel's whole text as MLX itself prints it."""

import re

import mlx.core as mx

from ..support.msl.wrap import Input, KernelCall, template_of, wrap

PRINTED = re.compile(r"Generated source code for `.*?`:\n```\n(.*)\n```\n", re.DOTALL)


def mlx_text(call: KernelCall, inputs: list[Input], folder, capfd) -> str:
    kernel = mx.fast.metal_kernel(
        name=call.name,
        input_names=list(call.input_names),
        output_names=list(call.output_names),
        source=call.source,
        header=call.header,
        ensure_row_contiguous=call.contiguous,
    )

    def function(*arrays):
        return kernel(
            inputs=list(arrays),
            template=list(template_of(call)),
            grid=call.grid,
            threadgroup=call.threadgroup,
            output_shapes=list(call.output_shapes),
            output_dtypes=list(call.output_dtypes),
            verbose=True,
        )

    arrays = [mx.zeros(i.shape, getattr(mx, i.dtype if i.dtype != "bool" else "bool_")) for i in inputs]
    capfd.readouterr()
    mx.export_function(str(folder / "kernel.mlxfn"), function, *arrays)
    printed = PRINTED.search(capfd.readouterr().out)
    assert printed, "MLX printed no kernel"
    return printed[1]


def assert_same(call, inputs, tmp_path, capfd) -> None:
    assert wrap(call, inputs).text == mlx_text(call, inputs, tmp_path, capfd)
