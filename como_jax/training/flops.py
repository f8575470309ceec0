"""FLOPs of one training sample: the matrix products and convolutions of the loss and its gradient, counted.

A product of `[m, k]` and `[k, n]` has 2 m n k, a convolution 2 for each product of a weight with a number of its input,
padding and the holes of a dilated input left out. They are counted in the program that JAX traces, before any compiler
sees it, so that the figure depends on the model alone. Rematerialisation, element-wise work and the optimiser do not
count; FLOPs over time and peak are therefore the share of the peak that goes into the model (MFU; PaLM, arXiv
2204.02311, appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters import partial_eval
from ml_collections import ConfigDict

from como_jax.nn.model_def import Params, merge_params
from como_jax.training import sharding
from como_jax.training.batches import abstract_batch
from como_jax.training.models import make_model

_BATCH = 8


def train_flops(config: ConfigDict) -> float:
    """FLOPs of one sample (a clip, or an observation with what follows) in one step, forward and backward.

    What does not grow with the batch is no work of a sample.

    Args:
      config: of any recipe, after `resolve`.
    """
    config = config.copy_and_resolve_references()
    config.train.remat = "none"
    model, mesh = make_model(config), sharding.make_mesh(devices=jax.devices()[:1])
    trained, frozen = model.partition(jax.eval_shape(model.init, jax.random.key(0)))

    def loss(trained: Params, frozen: Params, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        output = model.bind(merge_params(trained, frozen)).loss(batch, jax.random.key(0))
        return output.total, output.terms

    def of_batch(size: int) -> float:
        config.data.batch_size = size
        return count_flops(jax.value_and_grad(loss, has_aux=True), trained, frozen, abstract_batch(config, mesh))

    return (of_batch(2 * _BATCH) - of_batch(_BATCH)) / _BATCH


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """FLOPs of all matrix products and convolutions of a function.

    Args:
      function: what is traced; nothing is computed.
      arguments: arrays, or `jax.ShapeDtypeStruct`s.
    """
    program = jax.make_jaxpr(function)(*arguments).jaxpr
    # Without what nobody reads, as compilers leave it out.
    program, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    return _of_program(program)


def _of_program(program: Jaxpr) -> float:
    return sum(_of_equation(equation) for equation in program.eqns)


def _of_equation(equation: JaxprEqn) -> float:
    """FLOPs of one operation, or of the programs that it runs: a scan as often as it is long."""
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        return _of_product(equation)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    found = [_of_program(program) for program in _programs(parameters.values())]
    if name == "cond":
        return max(found)
    return sum(found) * parameters.get("length", 1)


def _programs(values: Any) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _programs(value)


def _of_product(equation: JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _of_convolution(equation: JaxprEqn) -> float:
    parameters, numbers = equation.params, equation.params["dimension_numbers"]
    image, kernel = (variable.aval.shape for variable in equation.invars)
    out = equation.outvars[0].aval.shape
    batch, channels = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    touched = [
        _touched(out[o], kernel[k], image[i], stride, padding[0], dilation, holes)
        for o, k, i, stride, padding, dilation, holes in zip(
            numbers.out_spec[2:],
            numbers.rhs_spec[2:],
            numbers.lhs_spec[2:],
            parameters["window_strides"],
            parameters["padding"],
            parameters["rhs_dilation"],
            parameters["lhs_dilation"],
            strict=True,
        )
    ]
    return 2.0 * batch * channels * kernel[numbers.rhs_spec[1]] * math.prod(touched)


def _touched(out: int, kernel: int, image: int, stride: int, padding: int, dilation: int, holes: int) -> int:
    """Pairs of a place of the output and of the kernel, along one axis, that meet a number of the input."""
    places = np.arange(out)[:, None] * stride + np.arange(kernel) * dilation - padding
    return int(np.sum((places >= 0) & (places <= (image - 1) * holes) & (places % holes == 0)))
