"""FLOPs of any JAX function, from its jaxpr: nothing is compiled, nothing is allocated, every trip of a loop counts.

XLA's `cost_analysis` counts a scanned body once (jax issues 13956, 18672, 22249). Here a program is walked as written:

    scan                  length × body                    while      trips × body + (trips + 1) × condition
    cond                  the dearer branch, by FLOPs (*)  shard_map  one device's body × devices of its manual axes
    jit, custom_vjp, …    the jaxpr inside                 remat      the jaxpr inside: recomputing counts again

A while loop's trips are proved where its condition compares integers that begin and step by constants; else it must be
told them. (A `fori_loop` whose bounds are Python integers is a scan.) (*) Of `platform_dependent` the default's.

Conventions. 1 multiply-add = 2 FLOP; of complex numbers an add costs 2, a product 6, a quotient 11, a multiply-add 8.
- Products: 2·M·N·K for matrices. A convolution counts the taps that fall on real input, not those on padding or on the
  holes of a dilated input, so it and each of its two gradients cost the same, as with matrices. `ragged_dot`
  multiplies every row once, whether or not a group claims it.
- Element-wise: 1 per element of the result; clamp 2, integer_pow its products when squaring repeatedly, polynomial 2 a
  degree, scatter-add and its kin 1 per update, cumulative sums n - 1 a line. A transcendental is 1 however many terms
  its series has. An FFT of N points is 5·N·log2 N (half for real input or output); Cholesky, LU and triangular solves
  have their exact textbook counts. These are listed as element-wise too.
- Reductions: inputs - outputs, over devices too: a psum over n is n - 1 additions. Windows count with their padding.
- No FLOP but listed under `integer`: arithmetic on integers and booleans; comparisons, of floats too; random bits, 1
  per element drawn; sort and top_k, n·ceil(log2 n) comparisons a line whatever the type of the keys.
- Nothing at all: copies, gathers, select, conversions, collectives that only move, debug prints.

Left out is what the compiler does: dead code and common subexpressions count as they stand in the jaxpr. So count
`jax.value_and_grad`: a gradient whose loss nobody reads still holds the loss's own arithmetic. What cannot be known
is an error, never a silent 0: unbounded loops, callbacks, foreign kernels, unknown primitives, most factorisations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core, source_info_util

from ctx_jax.errors import InputError

BUCKETS = ("matrix", "elementwise", "reduction", "transcendental", "integer")


@dataclass(frozen=True)
class Count:
    """What a program computes; counts add, and multiply with integers.

    Attributes:
      matrix: FLOPs of floating-point products and convolutions, and what kernels and `custom_calls` declare.
      elementwise: FLOPs of other floating-point arithmetic.
      reduction: FLOPs of floating-point reductions.
      transcendental: exp, tanh, rsqrt, …; kept apart because devices have other units for them.
      integer: operations that are no FLOPs.
      by_primitive: FLOPs (all but `integer`) by primitive.
    """

    matrix: int = 0
    elementwise: int = 0
    reduction: int = 0
    transcendental: int = 0
    integer: int = 0
    by_primitive: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def flops(self) -> int:
        """All but `integer`."""
        return self.matrix + self.elementwise + self.reduction + self.transcendental

    def __add__(self, other: Count) -> Count:
        by_primitive = dict(Counter(self.by_primitive) + Counter(other.by_primitive))
        return Count(*(getattr(self, name) + getattr(other, name) for name in BUCKETS), by_primitive)

    def __mul__(self, times: int) -> Count:
        by_primitive = {name: flops * times for name, flops in self.by_primitive.items() if times}
        return Count(*(getattr(self, name) * times for name in BUCKETS), by_primitive)

    __rmul__ = __mul__


CustomCalls = Mapping[str, Callable[[core.JaxprEqn], int] | int]


def count(
    fn: Callable, *args: Any, while_trips: int | None = None, custom_calls: CustomCalls | None = None, **kwargs: Any
) -> Count:
    """Counts one call of a function.

    Args:
      fn: anything that `jax.make_jaxpr` traces.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`, keys too; Python scalars are traced.
      while_trips: trips of every while loop whose trips cannot be proved.
      custom_calls: FLOPs by the name of a primitive, kernel or foreign function, or a function of its equation that
        gives them; counted as `matrix`. They go before what is known of the name.
      **kwargs: of fn; arrays too.

    Raises:
      InputError: for a loop without a provable bound, a foreign call or an unknown primitive; says where it stands.
    """
    return count_jaxpr(jax.make_jaxpr(fn)(*args, **kwargs), while_trips=while_trips, custom_calls=custom_calls)


def count_jaxpr(
    jaxpr: core.ClosedJaxpr | core.Jaxpr, *, while_trips: int | None = None, custom_calls: CustomCalls | None = None
) -> Count:
    """Counts a jaxpr that is traced already; see `count`."""
    if while_trips is not None and while_trips < 0:
        raise InputError(f"while_trips is {while_trips}, expected 0 or more")
    return _Walk(while_trips, custom_calls or {}).jaxpr(jaxpr, ())


_size = lambda atom: math.prod(getattr(atom.aval, "shape", ()))
_dims = lambda atom, axes: math.prod(atom.aval.shape[axis] for axis in axes)
# A jaxpr without its constants: up to JAX 0.10 these are two classes, and equations hold either.
_open = lambda jaxpr: getattr(jaxpr, "jaxpr", jaxpr)
_named = lambda e, count: replace(count, by_primitive={e.primitive.name: count.flops} if count.flops else {})
_is_a = lambda atom, kind: jnp.issubdtype(getattr(atom.aval, "dtype", np.bool_), kind)
# Operations of an equation.
_results = lambda e: sum(map(_size, e.outvars))
_reduced = lambda e: max(_size(e.invars[0]) - _size(e.outvars[0]), 0)
_window = lambda e: math.prod(e.params["window_dimensions"])
_windows = lambda e: _results(e) * max(_window(e) - 1, 0)
_cumulative = lambda e: _results(e) - _results(e) // max(e.invars[0].aval.shape[e.params["axis"]], 1)
_dot = lambda e: _results(e) * _dims(e.invars[0], e.params["dimension_numbers"][0][0])


def _integer_pow(equation: core.JaxprEqn) -> int:
    power = equation.params["y"]
    products = abs(power).bit_length() + abs(power).bit_count() - 2 if power else 0
    return _results(equation) * (products + (power < 0))


def _sort(equation: core.JaxprEqn) -> int:
    keys, params = equation.invars[0], equation.params
    axis = params.get("dimension", params.get("reduction_dimension", params.get("axis", -1)))
    return _size(keys) * max(keys.aval.shape[axis] - 1, 0).bit_length()


def _ragged_dot(equation: core.JaxprEqn) -> int:
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    rhs = equation.invars[1]
    shared = {*contracted, *batch, *numbers.rhs_group_dimensions}
    return _size(equation.invars[0]) * _dims(rhs, {*range(len(rhs.aval.shape))} - shared)


def _hits(outputs: int, stride: int, taps: int, dilation: int, inputs: int, holes: int, padding: int) -> int:
    """Pairs (output o, tap k) of one dimension that meet a real input i: o·stride + k·dilation = i·holes + padding."""
    if outputs < taps:
        outputs, stride, taps, dilation = taps, dilation, outputs, stride
    offset = padding - np.arange(taps, dtype=np.int64) * dilation
    first = np.maximum(-(-offset // stride), 0)
    last = np.minimum((offset + (inputs - 1) * holes) // stride, outputs - 1)
    # o·stride ≡ offset (mod holes) has one solution modulo `period`, or none.
    common = math.gcd(stride, holes)
    period = holes // common
    residue = (offset // common) * pow(stride // common, -1, period) % period
    hits = (last - residue) // period - (first - 1 - residue) // period
    return int(np.where((offset % common == 0) & (last >= first), hits, 0).sum()) if inputs else 0


def _convolution(equation: core.JaxprEqn) -> int:
    params, atoms = equation.params, (*equation.invars, *equation.outvars)
    specs = zip(atoms, params["dimension_numbers"], strict=True)
    inputs, taps, outputs = ([atom.aval.shape[axis] for axis in spec] for atom, spec in specs)
    steps = zip(*(params[key] for key in ("window_strides", "rhs_dilation", "lhs_dilation", "padding")), strict=True)
    hits = (_hits(outputs[d], s, taps[d], t, inputs[d], h, low) for d, (s, t, h, (low, _)) in enumerate(steps, 2))
    return outputs[0] * outputs[1] * taps[1] * math.prod(hits)


def _fft(equation: core.JaxprEqn) -> int:
    points = max(math.prod(equation.params["fft_lengths"]), 1)
    x, y = *equation.invars, *equation.outvars
    per_point = 5 if _is_a(x, np.complexfloating) and _is_a(y, np.complexfloating) else 2.5
    return round(max(_size(x), _size(y)) // points * per_point * points * math.log2(points))


def _solver(equation: core.JaxprEqn) -> int:
    """Square roots and divisions among them (LAPACK Working Note 41, appendix C)."""
    *batch, rows, columns = equation.invars[0].aval.shape
    if equation.primitive.name == "triangular_solve":
        return _size(equation.invars[1]) * (rows - bool(equation.params["unit_diagonal"]))
    if equation.primitive.name == "cholesky":
        return math.prod(batch) * (rows * (rows + 1) * (2 * rows + 1) // 6)
    return math.prod(batch) * sum((rows - k) * (1 + 2 * (columns - k)) for k in range(1, min(rows, columns) + 1))


_names = lambda text: frozenset(text.split())
_each = lambda names, value: dict.fromkeys(names.split(), value)
_rules = lambda bucket, operations, names, *costs: _each(names, (bucket, operations, costs or (1, 1)))

ARITHMETIC = {
    **_rules("matrix", _dot, "dot_general scaled_dot", 2, 8),
    **_rules("matrix", _ragged_dot, "ragged_dot_general", 2, 8),
    **_rules("matrix", _convolution, "conv_general_dilated", 2, 8),
    **_rules("elementwise", _results, "add sub neg add_any", 1, 2),
    **_rules("elementwise", _results, "max min floor ceil round rem nextafter conj"),
    **_rules("elementwise", _results, "mul square sign", 1, 6),
    **_rules("elementwise", _results, "div", 1, 11),
    **_rules("elementwise", _results, "clamp one_minus_square", 2, 8),
    **_rules("elementwise", _results, "abs", 1, 4),  # of complex numbers with a root, not told apart
    **_rules("elementwise", _integer_pow, "integer_pow", 1, 6),
    **_rules("elementwise", lambda e: _results(e) * (len(e.invars) - 2), "polynomial", 2, 8),
    **_rules("elementwise", lambda e: _size(e.invars[1]), "addupdate accum_grad_in_ref", 1, 2),
    **_rules("elementwise", _cumulative, "cumsum", 1, 2),
    **_rules("elementwise", _cumulative, "cumprod", 1, 6),
    **_rules("elementwise", _cumulative, "cummax cummin"),
    **_rules("elementwise", _fft, "fft"),
    **_rules("elementwise", _solver, "cholesky lu triangular_solve", 1, 4),
    **_rules("reduction", _reduced, "reduce_sum", 1, 2),
    **_rules("reduction", _reduced, "reduce_prod", 1, 6),
    **_rules("reduction", _reduced, "reduce_max reduce_min argmax argmin reduce_and reduce_or reduce_xor"),
    **_rules("reduction", _windows, "reduce_window_sum", 1, 2),
    **_rules("reduction", _windows, "reduce_window_max reduce_window_min select_and_gather_add"),
    **_rules("reduction", lambda e: _size(e.invars[0]) * _window(e), "select_and_scatter_add"),
    **_rules("transcendental", _results, "exp exp2 expm1 log log2 log1p sqrt rsqrt cbrt pow logistic tanh sinh cosh"),
    **_rules("transcendental", _results, "asinh acosh atanh sin cos tan asin acos atan atan2 erf erfc erf_inv lgamma"),
    **_rules("transcendental", _results, "digamma polygamma zeta igamma igammac igamma_grad_a random_gamma_grad"),
    **_rules("transcendental", _results, "bessel_i0e bessel_i1e regularized_incomplete_beta"),
    **_rules("transcendental", lambda e: 2 * _cumulative(e), "cumlogsumexp"),
    **_rules("integer", _results, "eq ne lt le gt ge eq_to lt_to le_to is_finite and or xor not clz mulhi shift_left"),
    **_rules(
        "integer", _results, "shift_right_arithmetic shift_right_logical population_count rng_uniform random_bits"
    ),
    **_rules("integer", _results, "random_seed random_split random_fold_in threefry2x32 rng_bit_generator"),
    **_rules("integer", _sort, "sort top_k approx_top_k"),
}
"""By primitive: bucket, operations, and what one of them costs of real and of complex numbers."""

JOINING = {"reduce": ("reduction", _reduced), "reduce_window": ("reduction", _windows)} | _each(
    "scatter scatter-add scatter-sub scatter-mul scatter-min scatter-max", ("elementwise", lambda e: _size(e.invars[2]))
)
"""Primitives that join values two by two, by a jaxpr of their own: bucket, and how often."""

ALL_REDUCE = {
    **_each("psum psum_invariant unreduced_psum reduce_scatter unreduced_reduce_scatter", (1, 2)),
    **_each("pmax pmin unreduced_pmax unreduced_pmin", (1, 1)),
}
MOVEMENT = _names(
    """after_all all_gather all_gather_invariant all_gather_reduced all_to_all axis_index bitcast_convert_type
    broadcast_in_dim broadcast_to complex concatenate convert_element_type copy copy_p create_token dce_sink
    debug_callback debug_print device_put dynamic_slice dynamic_update_slice empty empty2 empty_ref free_ref freeze
    from_edtype gather get imag inspect_sharding iota layout_constraint lu_pivots_to_permutation mesh_cast name new_ref
    optimization_barrier pad pbroadcast pbroadcast_dynamic pcast pin platform_index ppermute precv preduced psend pvary
    ragged_all_to_all random_clone random_unwrap random_wrap real reduce_precision reduced_vary_cast reduced_vary_cast_p
    relayout reshape reshard rev select_n sharding_constraint slice split squeeze stack stage stop_gradient swap tie
    tile to_edtype transpose unpin unstack vary_unreduced_cast vary_unreduced_cast_p xla_metadata_value zeros_like"""
)
CALLS = _names(  # one jaxpr inside, run once
    """jit pjit closed_call core_call call remat2 remat checkpoint custom_jvp_call custom_jvp_call_jaxpr custom_vjp_call
    custom_vjp_call_jaxpr remat_opt composite linear_call custom_vmap_call custom_partitioning xla_metadata_call
    compute_on eval_jaxpr run_state custom_linear_solve call_hi_primitive"""
)
NO_TEXTBOOK, FOREIGN = "has no single textbook count", "runs code that JAX does not see"
UNSUPPORTED = {
    **_each("eig eigh svd schur hessenberg tridiagonal qr geqrf geqp3 ormqr", NO_TEXTBOOK),
    **_each("householder_product cholesky_update symmetric_product tridiagonal_solve", NO_TEXTBOOK),
    **_each("pure_callback io_callback ffi_call buffer_callback call_exported", FOREIGN),
    "select_and_scatter": "joins with functions of its own, which no function of JAX makes",
    "pallas_call": "is a kernel that does not say its cost; give pallas_call a cost_estimate",
    "random_gamma": "draws until a value is accepted",
    "custom_lin": "stands for a derivative that is not taken yet",
}
"""Why `custom_calls` must say what it costs."""


def _inner(equation: core.JaxprEqn) -> Any:
    """The jaxpr that a call runs."""
    params = equation.params
    if "_prim" in params:  # "hijax", a primitive that is traced only when lowered: jnp.searchsorted from JAX 0.12 on
        return jax.make_jaxpr(params["_prim"].expand)(*params["_prim"].in_avals)
    if "jaxprs" in params:
        return params["jaxprs"].solve
    keys = ("jaxpr", "call_jaxpr", "fun_jaxpr", "fwd_jaxpr", "callee", "call")
    return next(params[key] for key in keys if key in params)


# To prove the trips of a loop, integer scalars are followed as (base, offset): base + offset, where the base is a
# carry of the loop, by its index, or None for a constant. A comparison of two is (its name, left, right).
Known = tuple[Any, ...] | None


def _constant(value: Any, atom: Any) -> Known:
    scalar = np.ndim(value) == 0 and _is_a(atom, np.integer) and not isinstance(value, jax.core.Tracer)
    return (None, int(value)) if scalar else None


def _known(atom: Any, env: Mapping[Any, Known]) -> Known:
    return _constant(atom.val, atom) if isinstance(atom, core.Literal) else env.get(atom)


def _enter(jaxpr: Any, values: Sequence[Known]) -> dict[Any, Known]:
    inputs, consts = _open(jaxpr).invars, zip(_open(jaxpr).constvars, getattr(jaxpr, "consts", ()), strict=False)
    # custom_linear_solve has operands that its solver never sees: then nothing is known of them.
    known = zip(inputs, values, strict=True) if len(values) == len(inputs) else ()
    return {**{variable: _constant(value, variable) for variable, value in consts}, **dict(known)}


def _follow(jaxpr: Any, values: Sequence[Known]) -> list[Known]:
    """What a jaxpr's results are, as far as sums and constants go."""
    env = _enter(jaxpr, values)
    for equation in _open(jaxpr).eqns:
        env.update(zip(equation.outvars, _fold(equation, env), strict=False))
    return [_known(atom, env) for atom in _open(jaxpr).outvars]


def _fold(equation: core.JaxprEqn, env: Mapping[Any, Known]) -> list[Known]:
    name, values = equation.primitive.name, [_known(atom, env) for atom in equation.invars]
    if name in CALLS and any(values):
        return _follow(_inner(equation), values)
    if not values or not all(values) or any(isinstance(value[0], str) for value in values):
        return []
    out, ((base, offset), (other, amount)) = equation.outvars[0], (values[0], values[-1])
    if name in ("lt", "le", "gt", "ge", "ne"):
        return [(name, *values)]
    if out.aval.shape or not _is_a(out, np.integer):
        return []
    if name in ("convert_element_type", "copy", "pvary"):
        # A type that cannot hold every value of the one before it may wrap.
        result = values[0] if base is None or np.can_cast(equation.invars[0].aval.dtype, out.aval.dtype) else None
    elif name == "add" and None in (base, other):
        result = (other if base is None else base, offset + amount)
    else:
        result = (base, offset - amount) if name == "sub" and other is None else None
    limits = jnp.iinfo(out.aval.dtype)
    return [result] if result and (result[0] is not None or limits.min <= result[1] <= limits.max) else []


def _prove_trips(equation: core.JaxprEqn, values: Sequence[Known]) -> int | None:
    """A while loop's trips, if its condition compares two integers that begin and step by constants."""
    params = equation.params
    conds, consts = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    start, carries = values[consts:], [(index, 0) for index in range(len(values) - consts)]
    after = _follow(params["body_jaxpr"], [*values[conds:consts], *carries])
    (compared,) = _follow(params["cond_jaxpr"], [*values[:conds], *carries])
    if not compared or not isinstance(compared[0], str):
        return None
    lines = []  # both sides of the comparison: value at the first trip, step, limits of the type
    for base, offset in compared[1:]:
        if base is None:
            lines.append((offset, 0, jnp.iinfo(np.int64)))
        elif not start[base] or start[base][0] is not None or not after[base] or after[base][0] != base:
            return None
        else:
            lines.append((start[base][1] + offset, after[base][1], jnp.iinfo(equation.outvars[base].aval.dtype)))
    sign = -1 if compared[0] in ("gt", "ge") else 1
    distance, step = (sign * (left - right) for left, right in list(zip(*lines, strict=True))[:2])
    distance -= compared[0] in ("le", "ge")
    # It goes on while distance < 0, or ≠ 0. A step the wrong way ends only when the counter wraps: no proof.
    if compared[0] == "ne":
        trips = 0 if not distance else -distance // step if step and not distance % step else -1
    else:
        trips = 0 if distance >= 0 else -(distance // step) if step > 0 else -1
    kept = all(limits.min <= value + step * trips <= limits.max for value, step, limits in lines)
    return trips if trips >= 0 and kept else None


@dataclass(frozen=True)
class _Walk:
    """One way down a program. `axes`: the mesh axes over which the code is one device's, with their sizes."""

    while_trips: int | None
    custom_calls: CustomCalls
    axes: Mapping[str, int] = field(default_factory=dict)
    where: str = "a line out of sight"

    def jaxpr(self, jaxpr: Any, values: Sequence[Known]) -> Count:
        env, total = _enter(jaxpr, values), Count()
        for equation in _open(jaxpr).eqns:
            # Inside a jit the user's own line may be out of sight: then the line of the call stands.
            here = replace(self, where=source_info_util.summarize(equation.source_info) or self.where)
            total += here.equation(equation, [_known(atom, env) for atom in equation.invars])
            env.update(zip(equation.outvars, _fold(equation, env), strict=False))
        return total

    def equation(self, equation: core.JaxprEqn, values: Sequence[Known]) -> Count:
        name, params = equation.primitive.name, equation.params
        label = (name in ("ffi_call", "pallas_call") and (params.get("target_name") or params.get("name"))) or name
        declared = self.custom_calls.get(label, self.custom_calls.get(name))
        if declared is not None:
            return self.leaf(equation, matrix=declared(equation) if callable(declared) else declared)
        if name in MOVEMENT:
            return Count()
        if name in CALLS:
            return self.jaxpr(_inner(equation), values)
        if name in ARITHMETIC:
            bucket, operations, costs = ARITHMETIC[name]
            return self.arithmetic(equation, bucket, operations(equation), costs)
        if name in JOINING:
            return self.joining(equation, *JOINING[name])
        if name in ALL_REDUCE:
            return self.all_reduce(equation)
        if name == "scan":
            return params["length"] * self.jaxpr(params["jaxpr"], ())
        if name == "while":
            return self.while_loop(equation, values)
        if name == "cond":
            branches, devices = params["branches"], params.get("branches_platforms") or ()
            counted = [branches[devices.index(None)]] if None in devices else branches
            return max((self.jaxpr(b, values[1:]) for b in counted), key=lambda c: (c.flops, c.integer))
        if name == "shard_map":
            sizes = {axis: params["mesh"].shape[axis] for axis in params["newly_manual_axes"]}
            return replace(self, axes={**self.axes, **sizes}).jaxpr(params["jaxpr"], values)
        why = UNSUPPORTED.get(name, "is a primitive that is not known here")
        if name == "pallas_call" and (cost := params["cost_estimate"]) is not None:
            return self.leaf(equation, matrix=cost.flops, transcendental=cost.transcendentals)
        raise InputError(f"{self.where}: {label!r} {why}; pass custom_calls={{{label!r}: its FLOPs}}")

    def leaf(self, equation: core.JaxprEqn, **buckets: int) -> Count:
        """What one device does, times the devices that do it."""
        return _named(equation, Count(**buckets)) * math.prod(self.axes.values())

    def arithmetic(self, equation: core.JaxprEqn, bucket: str, operations: int, costs: tuple[int, int]) -> Count:
        if not any(_is_a(atom, np.inexact) for atom in equation.invars[:2]):
            bucket = "integer"
        return self.leaf(equation, **{bucket: operations * costs[_is_a(equation.invars[0], np.complexfloating)]})

    def joining(self, equation: core.JaxprEqn, bucket: str, times: Callable[[core.JaxprEqn], int]) -> Count:
        jaxpr = equation.params.get("jaxpr", equation.params.get("update_jaxpr"))
        if jaxpr is None:  # scatter without a function of its own: what was there is replaced
            return Count()
        total = times(equation) * self.jaxpr(jaxpr, ())
        return _named(equation, replace(total, elementwise=0) + Count(**{bucket: total.elementwise}))

    def all_reduce(self, equation: core.JaxprEqn) -> Count:
        """Over all devices: every group of n turns n inputs into one output, or into n pieces (reduce_scatter)."""
        name, params = equation.primitive.name, equation.params
        axes = jax.tree.leaves(params.get("axes", params.get("axis_name")))
        named = [axis for axis in axes if not isinstance(axis, int)]  # vmap's axes are positions
        if unknown := set(named) - self.axes.keys():
            raise InputError(f"{self.where}: {name} over {sorted(map(str, unknown))}, axes of an unknown size")
        groups = params.get("axis_index_groups")
        group = len(groups[0]) if groups else math.prod(self.axes[axis] for axis in named)
        kept = group if name.endswith("reduce_scatter") else 1
        of_groups, total = replace(self, axes={"groups": math.prod(self.axes.values()) // group}), Count()
        for x, y in zip(equation.invars, equation.outvars, strict=True):
            one, operations = equation.replace(invars=[x], outvars=[y]), group * _size(x) - kept * _size(y)
            total += of_groups.arithmetic(one, "reduction", operations, ALL_REDUCE[name])
        return total

    def while_loop(self, equation: core.JaxprEqn, values: Sequence[Known]) -> Count:
        params, proved = equation.params, _prove_trips(equation, values)
        if (trips := self.while_trips if proved is None else proved) is None:
            raise InputError(
                f"{self.where}: the trips of a while loop cannot be proved; pass while_trips=, or use a scan"
            )
        return (trips + 1) * self.jaxpr(params["cond_jaxpr"], ()) + trips * self.jaxpr(params["body_jaxpr"], ())
