"""Walks a jaxpr with all the jaxprs inside it."""


def equations(jaxpr):
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def largest_value(jaxpr):
    """Elements of the largest array that any equation makes, or that enters an inner jaxpr."""
    return max(variable.aval.size for e in equations(jaxpr) for variable in (*e.outvars, *e.invars))
