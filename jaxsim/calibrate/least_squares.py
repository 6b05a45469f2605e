"""Bounded robust least squares over named parameters with priors, and what the data say about each of them.

    minimise  sum over rows of rho((error / scale)^2) + sum over parameters of (log(p / centre) / width)^2
    rho(z) = 2 (sqrt(1 + z) - 1),   lower <= p <= upper

An error is log(predicted / measured), or any other number of size `scale` where the model is good. Parameters move in
their logarithm, so a width of 0.5 is a factor of 1.65. Jacobians are JAX's, in double precision.

Source: trust region reflective of SciPy (`scipy.optimize.least_squares`); standard errors: sandwich of robust
regression (Huber 1967), with scores summed within groups where that gives more (Liang and Zeger 1986).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import least_squares

from jaxsim._core.errors import InputError
from jaxsim._core.precision import enable_x64

UNDETERMINED = 0.3
"""Standard error of a logarithm beyond which the data do not determine a parameter: more than a third of its value."""

CORRELATED = 0.95
"""Correlation of two parameters from which on the data determine them only together."""

LEAST_NOISE = 0.1
"""Of `scale`: no rows are taken to be more exact, for a fit to the last digit would claim that everything is known."""

STILL_MOVING = 0.01
"""Next step of a logarithm by which a fit that ran out of evaluations is said to move still."""

_AT_BOUND = 1e-3


class Parameter(NamedTuple):
    """A positive number between bounds. The prior is log-normal around `centre`; without one the width is infinite."""

    name: str
    start: float
    lower: float
    upper: float
    centre: float = math.nan
    width: float = math.inf


@dataclass(frozen=True)
class Fit:
    """What a fit found; standard errors are of logarithms, so near 0 they are shares of the value.

    errors: with the prior; data_errors: what the data alone leave (infinite where no row depends on the parameter);
    both are nan at a bound. bounds: "lower" or "upper" where a parameter sits at one. condition: of the Jacobian with
    columns of one length, without the prior. correlated: pairs beyond `CORRELATED` with their correlation.
    moving: parameters that had not settled. cost: of the minimum; evaluations: of the errors.
    """

    values: Mapping[str, float]
    errors: Mapping[str, float]
    data_errors: Mapping[str, float]
    bounds: Mapping[str, str]
    limits: Mapping[str, tuple[float, float]]
    correlated: tuple[tuple[str, str, float], ...]
    condition: float
    converged: bool
    moving: tuple[str, ...]
    cost: float
    evaluations: int

    @property
    def undetermined(self) -> tuple[str, ...]:
        """Parameters that the data alone do not determine."""
        return tuple(name for name, error in self.data_errors.items() if error > UNDETERMINED)

    def sentences(self) -> list[str]:
        """What a reader has to know, a sentence each; empty where all is well."""
        told = []
        if not self.converged:
            moving = ", ".join(self.moving) or "none of the parameters by much"
            told.append(f"Did not converge in {self.evaluations} evaluations; still moving: {moving}.")
        for name in self.undetermined:
            error = self.data_errors[name]
            factor = f"a factor of {math.exp(error):.2g}" if error < math.log(100) else "more than a factor of 100"
            told.append(f"{name} is not determined: no row depends on it." if math.isinf(error) else
                        f"{name} is not determined: the data leave it {factor} either way.")
        for one, other, correlation in self.correlated:
            told.append(f"{one} and {other} are determined only together (correlation {correlation:+.2f}).")
        for name, side in self.bounds.items():
            told.append(f"{name} is at its {side} bound, {self.limits[name][side == 'upper']:.4g}.")
        return told


def double_precision() -> AbstractContextManager:
    """A context in which JAX computes in 64 bits, whatever the process does elsewhere."""
    return enable_x64(True)


class Problem:
    """Errors as a function of named parameters, solved for any weights of the rows.

    evaluate: from logarithms of the parameters to one error a row, and the derivatives (`rows parameters`).
    """

    def __init__(self, evaluate: Callable[[Float[np.ndarray, " parameters"]], tuple[np.ndarray, np.ndarray]],
                 parameters: Sequence[Parameter], *, scale: float = 0.1):
        if not parameters:
            raise InputError("calibration parameters", [], "there is nothing to fit", "give at least one")
        for p in parameters:
            if not 0 < p.lower < p.upper < math.inf or not p.lower <= p.start <= p.upper or not p.width > 0:
                raise InputError(f"calibration parameter {p.name}", tuple(p[1:]), "is not start, 0 < lower < upper,"
                                 " centre, width > 0 with start inside", "correct it")
        self.parameters, self.scale = tuple(parameters), scale
        self._names = [p.name for p in parameters]
        self._lower, self._upper, self._start, self._centre = np.log(
            [[p.lower, p.upper, p.start, p.centre if math.isfinite(p.width) else p.start] for p in parameters]).T
        self._pull = np.array([1 / p.width for p in parameters])
        self._last: tuple[bytes, np.ndarray, np.ndarray] | None = None
        self._compute = evaluate

    @classmethod
    def compiled(cls, errors: Callable[[dict[str, Array], Any], Float[Array, " rows"]],
                 parameters: Sequence[Parameter], data: Any, *, scale: float = 0.1) -> "Problem":
        """Of errors that JAX differentiates, from a dictionary of scalars and `data` (any pytree of arrays)."""
        names = [p.name for p in parameters]

        @jax.jit
        def both(x, data):
            def of(x):
                found = errors(dict(zip(names, jnp.exp(x), strict=True)), data)
                return found, found

            jacobian, found = jax.jacfwd(of, has_aux=True)(x)
            return found, jacobian

        with double_precision():
            data = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), data)

        def evaluate(x):
            with double_precision():
                return both(jnp.asarray(x), data)

        return cls(evaluate, parameters, scale=scale)

    def _evaluate(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # SciPy asks for errors and Jacobian of the same point one after the other.
        key = x.tobytes()
        if self._last is None or self._last[0] != key:
            self._last = key, *(np.asarray(f, np.float64) for f in self._compute(x))
        return self._last[1:]

    def errors(self, values: Mapping[str, float]) -> Float[np.ndarray, " rows"]:
        """Errors of all rows at given values."""
        return self._evaluate(np.log([values[name] for name in self._names]))[0]

    def solve(self, weights: Float[np.ndarray, " rows"] | None = None, groups: np.ndarray | None = None,
              max_evaluations: int = 100) -> Fit:
        """The fit; weights: of the rows, 0 leaves a row out; groups: a label a row, of rows that err together.

        Raises `InputError` where an error is not finite at the start.
        """
        start = np.clip(self._start, self._lower + 1e-6, self._upper - 1e-6)
        found, _ = self._evaluate(start)
        weights = np.ones(len(found)) if weights is None else np.asarray(weights, np.float64)
        if not np.isfinite(found[weights > 0]).all():
            raise InputError("calibration", int(np.argmax(~np.isfinite(found) & (weights > 0))),
                             "the error of this row is not finite at the start", "check its measurement and sizes")
        root, rows, priors = np.sqrt(weights) / self.scale, len(found), np.diag(self._pull)

        def residuals(x):
            return np.concatenate([np.nan_to_num(self._evaluate(x)[0]) * root, self._pull * (x - self._centre)])

        def jacobian(x):
            return np.concatenate([np.nan_to_num(self._evaluate(x)[1]) * root[:, None], priors])

        def loss(z):
            # Priors stay quadratic: only rows may be outliers.
            data, prior = z[:rows], z[rows:]
            return np.stack([np.concatenate(pair) for pair in (
                (2 * (np.sqrt(1 + data) - 1), prior), ((1 + data) ** -0.5, np.ones_like(prior)),
                (-0.5 * (1 + data) ** -1.5, np.zeros_like(prior)))])

        solved = least_squares(residuals, start, jacobian, bounds=(self._lower, self._upper), method="trf", loss=loss,
                               ftol=1e-7, xtol=1e-6, gtol=1e-9, max_nfev=max_evaluations)
        x = solved.x
        return self._told(x, residuals(x)[:rows], jacobian(x)[:rows], groups, solved)

    def _told(self, x, residual, jacobian, groups, solved) -> Fit:
        side = {name: "lower" if x[i] - self._lower[i] < _AT_BOUND else "upper" for i, name in enumerate(self._names)
                if min(x[i] - self._lower[i], self._upper[i] - x[i]) < _AT_BOUND}
        free = np.array([name not in side for name in self._names])
        # First and second derivative of the loss: an outlier has a score and tells little.
        bend, curve = (1 + residual ** 2) ** -0.5, (1 + residual ** 2) ** -1.5
        data, scores = jacobian[:, free], (bend * residual)[:, None] * jacobian[:, free]
        information = (data * curve[:, None]).T @ data
        spread = [scores.T @ scores]
        if groups is not None and len(found := np.unique(groups, return_inverse=True)[1]) and found.max() > 0:
            count = found.max() + 1
            sums = np.zeros((count, scores.shape[1]))
            np.add.at(sums, found, scores)
            spread.append(sums.T @ sums * count / (count - 1))
        pull = np.diag(self._pull[free] ** 2)
        alone, correlation, condition = _inverse(information)
        together, _, _ = _inverse(information + pull)
        # A row that a parameter moves by less than a millionth of an error does not depend on it.
        seen = np.diag(information) > 1e-12
        information = np.where(seen[:, None] & seen, information, 0.0)
        # Scores are as blind as the data: only the inverse itself says that a direction was not measured.
        noise = max(np.sum((bend * residual) ** 2) / np.sum(curve[residual != 0], initial=1e-300), LEAST_NOISE ** 2)
        data_errors = np.maximum(_largest(alone, spread), np.sqrt(noise * np.diag(alone)))
        data_errors = np.where(seen, data_errors, math.inf)
        is_known = np.diag(information + pull) > 0
        errors = np.where(is_known, _largest(together, [s + pull for s in spread]), math.inf)
        step = together @ (scores.sum(0) + pull @ (x - self._centre)[free])
        names = [n for n, f in zip(self._names, free, strict=True) if f]
        moving = [(abs(s), n) for s, n in zip(step, names, strict=True) if abs(s) > STILL_MOVING]
        converged = solved.status > 0 or not moving
        pairs = [(names[i], names[j], float(correlation[i, j])) for i in range(len(names)) for j in range(i)
                 if seen[i] and seen[j] and abs(correlation[i, j]) > CORRELATED]
        nothing = dict.fromkeys(self._names, math.nan)
        return Fit(
            dict(zip(self._names, np.exp(x).tolist(), strict=True)),
            nothing | dict(zip(names, errors.tolist(), strict=True)),
            nothing | dict(zip(names, data_errors.tolist(), strict=True)), side,
            {p.name: (p.lower, p.upper) for p in self.parameters}, tuple(pairs), condition, converged,
            () if converged else tuple(n for _, n in sorted(moving, reverse=True)), float(solved.cost),
            int(solved.nfev))


def _inverse(information: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Inverse, the correlations it says, and the condition of the Jacobian behind it, columns scaled to one length.

    Parameters nothing is known of have zeros in all three.
    """
    inverse, correlation = np.zeros((2, *information.shape))
    at = np.flatnonzero(np.diag(information) > 0)
    if not len(at):
        return inverse, correlation, 1.0
    size = np.sqrt(np.diag(information)[at])
    values, vectors = np.linalg.eigh(information[np.ix_(at, at)] / size[:, None] / size)
    # Directions nobody measured get a variance that is huge but a number.
    scaled = vectors / np.maximum(values, 1e-12) @ vectors.T
    deviation = np.sqrt(np.diag(scaled))
    inverse[np.ix_(at, at)] = scaled / size[:, None] / size
    correlation[np.ix_(at, at)] = scaled / deviation[:, None] / deviation
    return inverse, correlation, float(np.sqrt(values.max() / max(values.min(), 1e-24)))


def _largest(inverse: np.ndarray, spreads: list[np.ndarray]) -> np.ndarray:
    """Standard errors: of each parameter the largest that one of the spreads of scores gives."""
    return np.sqrt(np.max([np.diag(inverse @ spread @ inverse) for spread in spreads], axis=0, initial=0.0))
