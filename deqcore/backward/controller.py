"""What the adaptive strategy learns from audits, and what it decides: arithmetic on a few dozen numbers.

An audit knows the exact gradient p* of the batch and those of the powers, p_j = (∂f/∂θ)ᵀ (Jᵀ)^j g. With their inner
products the error of *every* polynomial Σ c_j (Jᵀ)^j g is known: ‖p* − Σ c_j p_j‖² = s − 2 cᵀb + cᵀG c. A new audit
judges the coefficients that the audits before it gave, so that no candidate is judged by the data that made it.

All functions take the array namespace `xp`: NumPy in eager code, the framework's own in traced code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from deqcore.types import Array

RIDGE: Final = 1e-4
"""On the Gram matrix of unit gradients: powers become dependent, and are known to float32."""

MEMORY: Final = 0.3
"""Weight of the newest audit in every average, once there are several."""

SPREAD: Final = 4.0
"""The bound of an error is its geometric mean times exp(SPREAD · deviation), where the deviation is twice the mean
excess of the logarithm. For a normal distribution 2.06 of them are exceeded by 5 %; the least k whose bound meets the
target is one whose errors happened to be small, which takes the rest."""

YOUNG: Final = 0.3
"""Least deviation of the logarithm of an error before audits have shown one."""

BEYOND: Final = 2
"""Powers that an audit forms beyond g, and beyond those in force: enough for the choice of one vjp more."""

UNSEEN: Final = 1.2
"""Factor on errors of coefficients on the audit that made them."""

LARGEST: Final = 2.0
"""Most that one audit counts as a deviation, so that the start of a training is forgotten soon."""

EXACT_EVERY: Final = 16.0
"""Most passes between audits while each pass is a solve: an audit may show that fewer vjps will do."""

EASIER: Final = 0.8
"""Part of the target that the bound of fewer vjps must meet before they are taken: hysteresis."""

JUMP: Final = 1.5
"""Factor by which a free signal may leave its value at the audit."""

PROBE_EVERY: Final = 8
"""Passes without a vjp, after which one measures ‖Jᵀg‖ / ‖g‖."""

RECENT: Final = 0.1
"""Weight of the latest pass in the average of a free signal."""

FARTHER: Final = 6.0
"""Factor by which the residual of a forward solve that did not converge may exceed that of the audit."""

UNCONVERGED: Final = 0.1
"""By how much the share of unconverged samples may grow before it counts as a jump."""

FLOOR: Final = 1e-4
"""Least error that inner products in float32 can show."""

MIXED: Final = 1e-5
"""Variance of `chosen`, relative to its square, above which a state is the mean of states with other choices."""


class Learned(NamedTuple):
    """The state, unpacked. Scalars have shape `()`; with m = max_vjps + 1 candidates, vectors `(m,)`.

    Attributes:
        begun: 1 after the first audit.
        since: passes since the last audit.
        interval: passes from one audit to the next.
        audits: audits that counted.
        excluded: audits that did not count: no sample's forward solve converged, or a gradient was not finite.
        chosen: vjps of the next passes; m where none of the candidates is good enough, so that the solve is exact.
        bound: of the relative error with `chosen`, 0 where the solve is exact.
        error: relative error that the last audit found for what was in force; −1 before there is one, and where
            passes were exact.
        cosine: cosine that the last audit found; −1 as `error`.
        growth: ‖(Jᵀ)^k g‖ / ‖g‖ of the passes since the audit, averaged, for k = `chosen`; 0 before there is one.
        forward: mean ‖f(z) − z‖ of the forward solve at the audit.
        unconverged: share of samples whose forward solve did not converge at the audit.
        jumped: 1 if a signal of the last pass asks for an audit.
        passes: backward passes so far.
        vjps: vector–Jacobian products so far, of the slowest sample of each pass.
        products: products with the parameters that audits took.
        over: audits whose error exceeded the target.
        square: chosen², which shows that a state is the mean of states with other choices.
        coefficients: of the powers, for `chosen`.
        right: b, averaged, in units of ‖p*‖²; of use for the candidates that the last audit measured.
        gram: G `(m, m)`, averaged, in units of ‖p*‖²; as `right`.
        level: mean logarithm of the error, for each number of vjps.
        deviation: mean deviation of that; −1 for a candidate that the last audit did not measure. Its other figures are
            old then, and it is not chosen before an audit has measured it.
    """

    begun: Array
    since: Array
    interval: Array
    audits: Array
    excluded: Array
    chosen: Array
    bound: Array
    error: Array
    cosine: Array
    growth: Array
    forward: Array
    unconverged: Array
    jumped: Array
    passes: Array
    vjps: Array
    products: Array
    over: Array
    square: Array
    coefficients: Array
    right: Array
    level: Array
    deviation: Array
    gram: Array


SCALARS: Final = Learned._fields.index("coefficients")
VECTORS: Final = Learned._fields.index("gram") - SCALARS


class Signals(NamedTuple):
    """What a pass knows without a product more; each has shape `()`."""

    forward: Array
    unconverged: Array


@dataclass(frozen=True)
class Controller:
    """The rules of one strategy.

    Attributes:
        target: largest relative error of the batch's parameter gradient.
        audit_every: most passes from one audit to the next.
        candidates: m = max_vjps + 1.
        exact: whether the solve is exact where no candidate meets the target; if not, the last candidate is taken.
    """

    target: float
    audit_every: int
    candidates: int
    exact: bool

    def initial(self) -> list[float]:
        """Return the state before the first pass, which asks for an audit."""
        return [0.0] * (SCALARS + self.candidates * (VECTORS + self.candidates))

    def unpack(self, xp: Any, values: Array) -> Learned:
        """Split the vector; one that is not finite counts as `initial`.

        A sum of states, as the gradient with respect to a state that several solves share, is their mean. Coefficients
        of different choices have no mean, so that such a state is exact and asks for an audit.
        """
        m = self.candidates
        values = xp.where(xp.all(xp.isfinite(values)), values, xp.zeros_like(values))
        values = values / xp.where(values[0] > 0, values[0], xp.ones_like(values[0]))
        ends = [SCALARS + m * (i + 1) for i in range(VECTORS)]
        vectors = [values[end - m : end] for end in ends]
        gram = xp.reshape(values[ends[-1] :], (m, m))
        s = Learned._make([*(values[i] for i in range(SCALARS)), *vectors, gram])
        mixed = (s.begun > 0) & (s.square - s.chosen * s.chosen > MIXED * (1.0 + s.square))
        chosen = xp.where(mixed, m + 0 * s.chosen, xp.floor(s.chosen + 0.5))
        return s._replace(chosen=chosen, jumped=xp.where(mixed, xp.ones_like(s.jumped), s.jumped))

    def pack(self, xp: Any, learned: Learned) -> Array:
        """Undo `unpack`."""
        scalars = [xp.reshape(scalar, (1,)) for scalar in learned[:SCALARS]]
        return xp.concat([*scalars, *learned[SCALARS:-1], xp.reshape(learned.gram, (-1,))])

    def due(self, xp: Any, s: Learned) -> Array:
        """Return whether this pass is an audit: its turn has come, or a signal of the pass before has jumped.

        The state alone decides, so that all ranks that share it do the same.
        """
        exact = xp.where(s.chosen >= self.candidates, EXACT_EVERY + 0 * s.interval, s.interval)
        return (s.begun == 0) | (s.since + 1 >= xp.minimum(exact, s.interval)) | (s.jumped > 0)

    def steps(self, xp: Any, s: Learned) -> Array:
        """Return the vjps of a pass between audits: `chosen`, and now and then one where that is 0.

        Its coefficient is zero. It only measures ‖Jᵀg‖, without which nothing would show that the cell has changed.
        """
        probes = (s.chosen == 0) & (s.since % PROBE_EVERY == 0)
        return xp.where(probes, xp.ones_like(s.chosen), s.chosen)

    def powers(self, xp: Any, s: Learned) -> Array:
        """Return how many powers an audit forms, g included: those in force and one more; all where passes are exact.

        A choice that needs others waits for the next audit, which comes at once.
        """
        every = self.candidates + 0 * s.chosen
        few = xp.where(s.chosen < self.candidates, s.chosen + BEYOND, every)
        return xp.minimum(few, every) if self.exact else every

    def grown(self, xp: Any, s: Learned, growth: Array, now: Signals, measured: Array | bool | None = None) -> Learned:
        """Compare the free signals with those of the audit, and ask for another one if they have jumped.

        ‖(Jᵀ)^k g‖ / ‖g‖ is compared with its average over the passes since the audit. `measured` says whether this pass
        took the vjps of the state, as passes do unless they were recorded without.
        """
        known, measured = s.growth > 0, self.steps(xp, s) > 0 if measured is None else measured
        jumped = known & measured & ((growth > JUMP * s.growth) | (growth * JUMP < s.growth))
        worse = (now.forward > FARTHER * s.forward) & (now.unconverged > 0)
        jumped = jumped | worse | (now.unconverged > s.unconverged + UNCONVERGED)
        average = xp.where(known, s.growth + RECENT * (growth - s.growth), growth)
        return s._replace(
            growth=xp.where(measured, average, s.growth),
            jumped=xp.where(jumped, xp.ones_like(s.jumped), s.jumped),
            since=s.since + 1,
        )

    def learn(self, xp: Any, s: Learned, gram: Array, right: Array, eye: Array, now: Signals) -> Learned:
        """Judge what was in force on this audit, learn from it, and choose.

        Candidates that the audit before did not measure are judged as at the first audit, and the averages of G and b
        begin again: an average of matrices that lack other entries is none.

        Args:
            xp: the namespace.
            s: what was known before.
            gram: inner products of the p_j `(m, m)`, in units of ‖p*‖²; zero beyond `powers`.
            right: their inner products with p* `(m,)`, in units of ‖p*‖²; zero beyond `powers`.
            eye: the identity `(m, m)`.
            now: the signals of this pass.
        """
        first = s.begun == 0
        measured = _order(xp, eye) < self.powers(xp, s)
        fresh = measured & (first | (s.deviation < 0))
        before, own = nested(xp, s.gram, s.right, eye), nested(xp, gram, right, eye)
        weight = xp.where(first, xp.ones_like(s.begun), xp.maximum(1.0 / (s.audits + 1.0), MEMORY + 0 * s.audits))
        share = xp.where(xp.any(fresh), xp.ones_like(weight), weight)
        g, b = s.gram + share * (gram - s.gram), s.right + share * (right - s.right)
        error, cosine = judged(xp, xp.where(fresh[:, None], own, before), gram, right)
        logs = xp.log(xp.where(fresh, UNSEEN * error, error))
        off = xp.clip(2.0 * (logs - s.level), 0.0, LARGEST)
        level = xp.where(fresh, logs, s.level + xp.where(measured, weight, 0 * off) * (logs - s.level))
        deviation = xp.where(measured & ~fresh, s.deviation + weight * (off - s.deviation), -xp.ones_like(off))
        deviation = xp.where(fresh, xp.maximum(xp.max(deviation), YOUNG + 0 * weight), deviation)
        used = xp.sum(xp.where(self._is(xp, s.chosen, eye), error, xp.zeros_like(error)))
        agreed = xp.sum(xp.where(self._is(xp, s.chosen, eye), cosine, xp.zeros_like(cosine)))
        solved = s.chosen >= self.candidates
        learned = s._replace(
            gram=g, right=b, level=level, deviation=deviation, audits=s.audits + 1, begun=xp.ones_like(s.begun),
            error=xp.where(first | solved, -xp.ones_like(used), used),
            cosine=xp.where(first | solved, -xp.ones_like(used), agreed),
            growth=xp.zeros_like(s.growth), jumped=xp.zeros_like(s.jumped), since=xp.zeros_like(s.since),
            forward=now.forward, unconverged=now.unconverged,
        )  # fmt: skip
        over = ~first & (used > self.target)
        surprised = over & (used > s.bound)  # the bound may be known to miss the target
        learned = learned._replace(over=s.over + xp.where(over, xp.ones_like(s.over), xp.zeros_like(s.over)))
        return self._choose(xp, learned, s, nested(xp, g, b, eye), eye, surprised)

    def _choose(self, xp: Any, s: Learned, old: Learned, fits: Array, eye: Array, surprised: Array) -> Learned:
        """Choose the fewest vjps whose bound meets the target, and fewer than before only if it meets `EASIER` of it.

        A surprise brings the next audits near; each that confirms the choice doubles the interval. Where the measured
        candidates are not enough, the next pass is an audit of all.
        """
        m, first = self.candidates, old.begun == 0
        none = xp.full_like(s.level, float("inf"))
        bounds = xp.where(s.deviation < 0, none, xp.exp(s.level + SPREAD * s.deviation))
        enough, easy = _first(xp, bounds <= self.target, eye), _first(xp, bounds <= EASIER * self.target, eye)
        chosen = xp.where(first | (enough >= old.chosen), enough, xp.minimum(easy, old.chosen))
        chosen = chosen if self.exact else xp.minimum(chosen, (m - 1) + 0 * chosen)
        taken = self._is(xp, chosen, eye)
        bound = xp.sum(xp.where(taken, bounds, xp.zeros_like(bounds)))
        coefficients = xp.sum(xp.where(taken[:, None], fits, xp.zeros_like(fits)), axis=0)
        more = surprised | (~first & (chosen > old.chosen))
        longer = xp.where(more, old.interval / 4.0, old.interval * 2.0)
        interval = xp.clip(xp.floor(longer), 1.0, float(self.audit_every))
        unseen = (chosen >= m) & (self.powers(xp, old) < m)
        return s._replace(
            chosen=chosen, square=chosen * chosen, bound=bound, coefficients=coefficients, interval=interval,
            jumped=xp.where(unseen, xp.ones_like(s.jumped), s.jumped),
        )  # fmt: skip

    def exclude(self, xp: Any, s: Learned) -> Learned:
        """Count an audit that shows nothing, and try again after half of the interval."""
        again = xp.clip(xp.floor(s.interval / 2.0), 1.0, float(self.audit_every))
        since = xp.where(s.begun == 0, xp.zeros_like(s.since), s.interval - again)
        return s._replace(excluded=s.excluded + 1, since=since, jumped=xp.zeros_like(s.jumped))

    def _is(self, xp: Any, chosen: Array, eye: Array) -> Array:
        """Return the one-hot mask `(m,)` of the candidate, all False where the solve is exact."""
        return _order(xp, eye) == chosen


def _order(xp: Any, eye: Array) -> Array:
    """Return 0, 1, … m − 1."""
    return _up_to(xp, xp.ones_like(eye[0]), eye) - 1.0


def _up_to(xp: Any, x: Array, eye: Array) -> Array:
    """Return the cumulative sums of `x` `(m,)`."""
    return xp.matmul(x, xp.triu(xp.ones_like(eye)))


def _first(xp: Any, held: Array, eye: Array) -> Array:
    """Return the first index where `held` `(m,)` is true, m if it is nowhere."""
    one, none = xp.ones_like(eye[0]), xp.zeros_like(eye[0])
    return xp.sum(xp.where(_up_to(xp, xp.where(held, one, none), eye) == 0, one, none))


def nested(xp: Any, gram: Array, right: Array, eye: Array) -> Array:
    """Return the least-squares coefficients by the first 1, 2, … m vectors, a row each `(m, m)`.

    One sweep a vector: after the j-th, the last column has the coefficients of the first j.

    Source: Goodnight (1979), "A tutorial on the SWEEP operator".
    """
    m = right.shape[0]
    size = xp.sqrt(xp.maximum(xp.sum(gram * eye, axis=0), xp.full_like(right, 1e-30)))
    a = gram / (size[:, None] * size[None, :]) + RIDGE * eye
    b = right / size
    rows = []
    for j in range(m):
        at = eye[j]
        pivot = xp.sum(a[j] * at)
        row, column = a[j] / pivot, a[:, j]
        top = b[j] / pivot
        b = xp.where(at > 0, top, b - column * top)
        swept = a - column[:, None] * row[None, :]
        swept = xp.where(at[None, :] > 0, -column[:, None] / pivot, swept)
        swept = xp.where(at[:, None] > 0, row[None, :], swept)
        a = xp.where((at[:, None] * at[None, :]) > 0, 1.0 / pivot, swept)
        done = xp.sum(eye[: j + 1], axis=0)
        rows.append(b * done / size)
    return xp.stack(rows)


def judged(xp: Any, fits: Array, gram: Array, right: Array) -> tuple[Array, Array]:
    """Return the relative error and the cosine of each row of coefficients, `(m,)` each."""
    along = xp.sum(fits * right[None, :], axis=1)
    square = xp.sum(xp.matmul(fits, gram) * fits, axis=1)
    error = xp.sqrt(xp.maximum(1.0 - 2.0 * along + square, xp.full_like(along, FLOOR**2)))
    sound = square > 0
    return error, xp.where(sound, along / xp.sqrt(xp.where(sound, square, xp.ones_like(square))), xp.zeros_like(along))
