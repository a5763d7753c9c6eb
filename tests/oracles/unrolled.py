"""Executes a program equation by equation in NumPy, loops trip by trip, and tallies the arithmetic as it is done.

Multiply-adds and additions are not computed from shapes: the operation is done on ones, and the result says how many
terms met in it. Nothing of ctx_jax is used.
"""

import string
from collections import Counter

import jax
import numpy as np
from jax.extend import core

UNARY = {
    "neg": np.negative, "exp": np.exp, "log": np.log, "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "sqrt": np.sqrt,
    "abs": np.abs, "sign": np.sign, "square": np.square, "rsqrt": lambda x: 1 / np.sqrt(x),
    "logistic": lambda x: 1 / (1 + np.exp(-x)), "stop_gradient": lambda x: x, "copy": lambda x: x, "name": lambda x: x,
    "copy_p": lambda x: x, "not": np.logical_not, "optimization_barrier": lambda x: x, "reduce_precision": lambda x: x,
}  # fmt: skip
BINARY = {
    "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
    "div": lambda x, y: x / y if np.issubdtype(x.dtype, np.floating) else x // y, "pow": np.power,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "and": np.logical_and, "or": np.logical_or,
}  # fmt: skip
TRANSCENDENTAL = {"exp", "log", "tanh", "sin", "cos", "sqrt", "rsqrt", "logistic", "pow"}
COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not"}
FREE = {"stop_gradient", "copy", "copy_p", "name", "optimization_barrier", "reduce_precision"}
MOVES = {
    "convert_element_type", "iota", "slice", "concatenate", "pad", "dynamic_slice", "dynamic_update_slice", "gather",
    "rev", "select_n", "split", "pvary", "unstack", "stack",
}  # fmt: skip


def execute(jaxpr, *args):
    """Results and tally of a closed jaxpr."""
    tally = Counter()
    with np.errstate(all="ignore"):
        results = _run(jaxpr, [np.asarray(arg) for arg in args], tally)
    return results, {name: n for name, n in tally.items() if n}


def _run(jaxpr, args, tally):
    consts = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    env = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    env |= dict(zip(jaxpr.invars, args, strict=True))
    read = lambda atom: np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, core.Literal) else env[atom]
    for equation in jaxpr.eqns:
        results = _equation(equation, [read(atom) for atom in equation.invars], tally)
        for variable, value in zip(equation.outvars, results, strict=True):
            value = np.asarray(value).astype(variable.aval.dtype)
            assert value.shape == variable.aval.shape, equation
            env[variable] = value
    return [read(atom) for atom in jaxpr.outvars]


def _equation(equation, values, tally):
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _scan(equation, values, tally)
    if name == "while":
        conds, consts = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        carry = values[consts:]
        while _run(params["cond_jaxpr"], [*values[:conds], *carry], tally)[0]:
            carry = _run(params["body_jaxpr"], [*values[conds:consts], *carry], tally)
        return carry
    if name == "cond":
        outcomes = []
        for branch in params["branches"]:
            own = Counter()
            outcomes.append((_run(branch, values[1:], own), own))
        # The convention: the dearer branch, whichever is taken.
        tally.update(max((own for _, own in outcomes), key=lambda own: (_flops(own), own["integer"])))
        return outcomes[int(np.clip(values[0], 0, len(outcomes) - 1))][0]
    inner = [value for value in params.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
    if inner and not name.startswith("scatter"):
        return _run(inner[0], values, tally)
    results, bucket, amount = _leaf(name, params, values, equation)
    inexact = any(jax.numpy.issubdtype(value.dtype, np.inexact) for value in values[:2])
    tally[bucket if inexact else "integer"] += amount
    return results


def _flops(tally):
    return sum(n for bucket, n in tally.items() if bucket != "integer")


def _scan(equation, values, tally):
    params = equation.params
    body = getattr(params["jaxpr"], "jaxpr", params["jaxpr"])
    sliced = [value.ndim > len(variable.aval.shape) for value, variable in zip(values, body.invars, strict=True)]
    stacked = [len(a.aval.shape) > len(b.aval.shape) for a, b in zip(equation.outvars, body.outvars, strict=True)]
    num_carry = len(stacked) - sum(stacked)
    first = len(values) - sum(sliced)
    consts, carry, xs = values[: first - num_carry], values[first - num_carry : first], values[first:]
    trips = range(params["length"])
    ys = [np.zeros(variable.aval.shape, variable.aval.dtype) for variable in equation.outvars[num_carry:]]
    for trip in reversed(trips) if params["reverse"] else trips:
        results = _run(params["jaxpr"], [*consts, *carry, *(x[trip] for x in xs)], tally)
        carry = results[:num_carry]
        for y, result in zip(ys, results[num_carry:], strict=True):
            y[trip] = result
    return [*carry, *ys]


def _einsum(params, a, b):
    (contract_a, contract_b), (batch_a, batch_b) = params["dimension_numbers"]
    letters = iter(string.ascii_letters)
    names_a = [next(letters) for _ in range(a.ndim)]
    names_b = [next(letters) for _ in range(b.ndim)]
    for i, j in zip([*contract_a, *batch_a], [*contract_b, *batch_b], strict=True):
        names_b[j] = names_a[i]
    out = [names_a[i] for i in batch_a]
    out += [n for i, n in enumerate(names_a) if i not in (*contract_a, *batch_a)]
    out += [n for j, n in enumerate(names_b) if j not in (*contract_b, *batch_b)]
    return np.einsum(f"{''.join(names_a)},{''.join(names_b)}->{''.join(out)}", a, b)


def _leaf(name, params, values, equation):
    """Results, bucket and amount of floating-point operations."""
    x, ones = values[0] if values else None, [np.ones(value.shape) for value in values]
    if name == "dot_general":
        terms = _einsum(params, *ones)
        return [_einsum(params, *(v.astype(np.float64) for v in values))], "matrix", 2 * int(terms.sum())
    if name in ("reduce_sum", "reduce_max", "reduce_min", "argmax"):
        axes = tuple(params["axes"])
        met = np.sum(ones[0], axes)
        if name == "argmax":
            return [np.argmax(x, axes[0])], "reduction", int(np.maximum(met - 1, 0).sum())
        join = {"reduce_sum": np.sum, "reduce_max": np.max, "reduce_min": np.min}[name]
        return [join(x, axes)], "reduction", int(np.maximum(met - 1, 0).sum())
    if name == "cumsum":
        axis, way = params["axis"], (lambda x: np.flip(x, params["axis"])) if params["reverse"] else (lambda x: x)
        met = np.cumsum(ones[0], axis)
        return [way(np.cumsum(way(x), axis))], "elementwise", int((met > 1).sum())
    if name == "integer_pow":
        power, inverse = abs(params["y"]), params["y"] < 0
        assert power
        products, reached = 0, 1  # left to right over the power's bits: square, then perhaps multiply
        for bit in bin(power)[3:]:
            products, reached = products + 1 + (bit == "1"), 2 * reached + (bit == "1")
        assert reached == power
        return [1 / x**power if inverse else x**power], "elementwise", (products + inverse) * x.size
    if name in UNARY or name in BINARY:
        result = np.asarray((UNARY.get(name) or BINARY[name])(*values))
        if name in FREE:
            return [result], "elementwise", 0
        bucket = "integer" if name in COMPARISONS else "transcendental" if name in TRANSCENDENTAL else "elementwise"
        return [result], bucket, result.size
    if name == "one_minus_square":
        return [1 - x * x], "elementwise", 2 * x.size
    if name == "clamp":
        result = np.minimum(np.maximum(values[1], values[0]), values[2])
        return [result], "elementwise", 2 * result.size
    if name in ("empty", "empty2"):
        return [np.zeros(equation.outvars[0].aval.shape)], "integer", 0
    if name == "broadcast_in_dim":
        shape = [1] * len(params["shape"])
        for axis, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
            shape[axis] = size
        return [np.broadcast_to(x.reshape(shape), params["shape"])], "elementwise", 0
    if name in ("reshape", "squeeze"):
        return [x.reshape(equation.outvars[0].aval.shape)], "elementwise", 0
    if name == "transpose":
        return [x.transpose(params["permutation"])], "elementwise", 0
    if name == "convert_element_type":
        return [x.astype(params["new_dtype"])], "elementwise", 0
    assert name in MOVES or name == "scatter-add", name
    results = equation.primitive.bind(*map(jax.numpy.asarray, values), **params)
    amount = values[2].size if name == "scatter-add" else 0
    return results if equation.primitive.multiple_results else [results], "elementwise", amount
