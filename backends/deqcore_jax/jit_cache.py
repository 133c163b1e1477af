"""One representative for equal programs, so that eager calls do not compile again.

`jax.jit` and `lax.while_loop` recognise compiled code by the identity of Python functions. An eager `fixed_point` gets
a new lambda in each call, and must trace it in each call, because the values that it closes over may have changed.
Tracing takes milliseconds; compiling the loop takes most of a second. So the traced program (a jaxpr with its arrays
as arguments) is compared by structure with earlier ones, and the first of equal programs represents them all, so that
its compiled code is reused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from deqcore.types import Tree

KEEP: Final = 256
RULES: Final = frozenset({"jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees"})
DEPTH: Final = 3  # a derivative rule may hold functions with rules of their own

_seen: OrderedDict[Hashable, core.Jaxpr] = OrderedDict()


def intern(jaxpr: core.Jaxpr, *, rules: bool) -> core.Jaxpr:
    """Return the first jaxpr that computes the same as this one.

    Args:
        jaxpr: without constants; arrays that f closes over are inputs.
        rules: whether derivatives must agree as well (custom derivative rules are compared by tracing them).
    """
    key = (rules, _jaxpr_key(jaxpr, DEPTH if rules else 0))
    representative = _seen.setdefault(key, jaxpr)
    _seen.move_to_end(key)
    if len(_seen) > KEEP:
        _seen.popitem(last=False)
    return representative


def _jaxpr_key(jaxpr: core.Jaxpr, depth: int) -> Hashable:
    """Return the content of a jaxpr with its variables numbered. `depth` 0 leaves derivative rules out."""
    numbers: dict[core.Var, int] = {}

    def atom(a: core.Var | core.Literal) -> Hashable:
        if isinstance(a, core.Literal):
            return a.aval, _param_key(np.asarray(a.val), depth)
        return numbers.setdefault(a, len(numbers))

    inputs = tuple((atom(v), v.aval) for v in (*jaxpr.constvars, *jaxpr.invars))
    lines = tuple(
        (
            eqn.primitive,
            tuple(map(atom, eqn.invars)),
            tuple((atom(v), v.aval) for v in eqn.outvars),
            _params_key(jaxpr, eqn, depth),
            eqn.ctx,
        )
        for eqn in jaxpr.eqns
    )
    return len(jaxpr.constvars), inputs, lines, tuple(map(atom, jaxpr.outvars))


def _params_key(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, depth: int) -> Hashable:
    custom = not RULES.isdisjoint(eqn.params)
    parameters = tuple((name, _param_key(eqn.params[name], depth)) for name in sorted(eqn.params.keys() - RULES))
    return (parameters, _rule_key(jaxpr, eqn, depth)) if custom and depth else parameters


def _param_key(value: object, depth: int) -> Hashable:
    if isinstance(value, core.Jaxpr):
        return _jaxpr_key(value, depth)
    if isinstance(value, core.ClosedJaxpr):
        return _jaxpr_key(value.jaxpr, depth), _param_key(tuple(value.consts), depth)
    if isinstance(value, tuple | list):
        return type(value), tuple(_param_key(item, depth) for item in value)
    if isinstance(value, dict):
        return tuple((name, _param_key(item, depth)) for name, item in value.items())
    if isinstance(value, np.ndarray | np.generic):
        return str(value.dtype), value.shape, value.tobytes()
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return type(value), value  # 1 == True, but they are different parameters


def _is_dropped(v: core.Var) -> bool:
    """Return whether this output is unused. JAX's class for it is public only since 0.10."""
    return type(v).__name__ == "DropVar"


def _rule_key(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, depth: int) -> Hashable:
    """Return the jaxpr of a custom derivative rule, traced on the inputs that can be differentiated."""
    inputs = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, core.Literal)))
    outputs = [v for v in eqn.outvars if not _is_dropped(v)]
    alone = core.jaxpr_as_fun(
        core.ClosedJaxpr(jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=[eqn]), ())
    )
    moving = [i for i, v in enumerate(inputs) if jnp.issubdtype(v.aval.dtype, jnp.inexact)]

    def derivative(xs: list[jax.Array], dxs: list[jax.Array]) -> tuple[Tree, Tree]:
        def f(*moved: jax.Array) -> list[jax.Array]:
            at = dict(zip(moving, moved, strict=True))
            return alone(*(at.get(i, x) for i, x in enumerate(xs)))

        primals = [xs[i] for i in moving]
        if "bwd" not in eqn.params:
            return jax.jvp(f, primals, dxs)
        out, vjp = jax.vjp(f, *primals)  # such a rule has reverse mode only
        return out, vjp(out)

    examples = [_example(v.aval) for v in inputs]
    try:
        traced = jax.make_jaxpr(derivative)(examples, [examples[i] for i in moving])
    except (TypeError, ValueError, NotImplementedError):
        return _Same(eqn)
    return _param_key(traced, depth - 1)


def _example(aval: jax.core.ShapedArray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


class _Same:
    """A key that is equal only to itself. It holds the object, so that its address cannot pass to another."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
