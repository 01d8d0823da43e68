"""What a memory indexer is trained to minimise, from logits and in float32 (LSA spec 5.2).

Shapes: logits [L, B, C] for L target layers and B samples of C candidates each; all else [B, C].
Every loss is one figure per layer, [L]. Candidates that are not `valid` have no influence, whatever
they hold, and a batch without a valid candidate has loss 0 and gradient 0. The published losses
are `bce`, `focal` and `pairwise`; ours are `mass_distillation`, `attention_share` and
`missed_mass`, on candidates that `train.data.labels` restricts to evictable ones where asked to.
"""

import dataclasses
from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lsa_jax.config import ConfigError
from lsa_jax.config_checks import number, refusal
from lsa_jax.lsa.indexer_config import Ensemble
from train.data.batch import Targets

PAIR_TILE = 1 << 24  # pairs held at once by `pairwise`: 64 MiB of float32
TERMS = ("bce", "focal", "bpr", "margin", "mass", "share", "missed")
OF_MASS = ("mass", "share", "missed")  # those that want attention mass
_BISECTIONS = 48  # more than float32 can tell apart in any interval met here
_SATURATED = 40.0  # sigmoid(40) is 1 in float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Which losses make up the objective, and their settings. Plain Python; static under jit.

    The first seven fields weight the losses (0: off): `bce`, `focal`, `bpr` and `margin` as
    published, `mass` for `mass_distillation`, `share` for `attention_share`, `missed` for
    `missed_mass`. Their weighted sum is
    taken per layer and averaged, with weight `per_layer`, and once more on the ensemble's logits,
    with weight `on_ensemble`: the ensemble is what is deployed, and its layers need not all find
    the same entries.

    `smoothing` e makes labels y(1 - 2e) + e in `bce` and `focal`; `gamma` is the focal exponent,
    `margin_width` the margin in logits; `mass_rate` and `temperature` are explained where they are
    used; `kept_shares` are the budgets of `missed`, as shares of the candidates, averaged;
    `page_entries` > 1 makes it select pages: runs of so many consecutive candidates.
    """

    bce: float = 0.0
    focal: float = 1.0
    bpr: float = 0.0
    margin: float = 0.0
    mass: float = 0.0
    share: float = 0.0
    missed: float = 0.0
    smoothing: float = 0.0
    gamma: float = 2.0
    margin_width: float = 1.0
    mass_rate: float = 1.0
    kept_shares: tuple[float, ...] = (0.1,)
    temperature: float = 1.0
    page_entries: int = 1
    per_layer: float = 1.0
    on_ensemble: float = 0.0
    ensemble: Ensemble = "max"

    def __post_init__(self) -> None:
        for name in (*TERMS, "per_layer", "on_ensemble"):
            if number(f"objective.{name}", getattr(self, name), float) < 0:
                raise refusal(f"objective.{name}", getattr(self, name), ">= 0")
        for names in (TERMS, ("per_layer", "on_ensemble")):
            if not any(getattr(self, name) for name in names):
                raise refusal(f"one of objective.{', '.join(names)}", "all 0", "> 0")
        for name in ("margin_width", "mass_rate", "temperature"):
            if number(f"objective.{name}", getattr(self, name), float) <= 0:
                raise refusal(f"objective.{name}", getattr(self, name), "> 0")
        if not 0 <= number("objective.smoothing", self.smoothing, float) < 0.5:
            raise refusal("objective.smoothing", self.smoothing, "in [0, 0.5)")
        if self.smoothing and not (self.bce or self.focal):
            raise refusal("objective.smoothing", self.smoothing, "0 without bce or focal")
        gamma = number("objective.gamma", self.gamma, float)
        if gamma != 0 and gamma < 1:  # in between, its slope is infinite where the loss is 0
            raise refusal("objective.gamma", self.gamma, "0 or >= 1")
        if number("objective.page_entries", self.page_entries, int) < 1:
            raise refusal("objective.page_entries", self.page_entries, ">= 1")
        if self.ensemble not in get_args(Ensemble):
            raise refusal("objective.ensemble", self.ensemble, f"one of {get_args(Ensemble)}")
        self._check_shares()

    def _check_shares(self) -> None:
        shares = self.kept_shares
        if not isinstance(shares, tuple) or not shares:
            raise refusal("objective.kept_shares", shares, "at least one share")
        for i, share in enumerate(shares):
            if not 0 < number(f"objective.kept_shares[{i}]", share, float) < 1:
                raise refusal(f"objective.kept_shares[{i}]", share, "in (0, 1)")


def _scores(logits: Float[Array, "L B C"], valid: Bool[Array, "B C"]) -> Float[Array, "L B C"]:
    """Float32, with 0 in place of whatever stands where nothing is valid, NaN included."""
    return jnp.where(valid, logits.astype(jnp.float32), 0)


def _mean(x: Float[Array, "L B C"], valid: Bool[Array, "B C"]) -> Float[Array, " L"]:
    """Over the valid elements of a layer: as published, not over the sum of their weights."""
    return jnp.sum(jnp.where(valid, x, 0), axis=(1, 2)) / jnp.maximum(jnp.sum(valid), 1)


def _cross_entropy(z: Float[Array, "L B C"], y: Float[Array, "B C"]) -> Float[Array, "L B C"]:
    """-y log p - (1 - y) log(1 - p) with p = sigmoid(z): no cancellation at either end."""
    return y * jax.nn.softplus(-z) + (1 - y) * jax.nn.softplus(z)


def _smoothed(labels: Float[Array, "B C"], smoothing: float) -> Float[Array, "B C"]:
    return labels.astype(jnp.float32) * (1 - 2 * smoothing) + smoothing


def bce(
    logits: Float[Array, "L B C"], targets: Targets, *, smoothing: float = 0.0
) -> Float[Array, " L"]:
    """Weighted binary cross entropy, divided by the number of elements."""
    z, y = _scores(logits, targets.valid), _smoothed(targets.labels, smoothing)
    return _mean(targets.weights.astype(jnp.float32) * _cross_entropy(z, y), targets.valid)


def focal(
    logits: Float[Array, "L B C"],
    targets: Targets,
    *,
    gamma: float = 2.0,
    smoothing: float = 0.0,
) -> Float[Array, " L"]:
    """`bce` with every element times (1 - p_t)^gamma, p_t the probability given to its label."""
    z, y = _scores(logits, targets.valid), _smoothed(targets.labels, smoothing)
    # 1 - p_t without the subtraction, which would round it to 0 where an element is nearly right.
    wrong = jax.nn.sigmoid(z) * (1 - y) + jax.nn.sigmoid(-z) * y
    factor = targets.weights.astype(jnp.float32) * wrong**gamma
    return _mean(factor * _cross_entropy(z, y), targets.valid)


def pairwise(
    logits: Float[Array, "L B C"],
    targets: Targets,
    *,
    margin: float | None = None,
    tile: int = PAIR_TILE,
) -> Float[Array, " L"]:
    """Mean over all pairs of a positive and a negative of the same sample, pooled over the batch.

    A pair costs -log sigmoid(s+ - s-) (BPR) or, with a margin, relu(margin - (s+ - s-)). Sample
    weights are not used. Some `tile` pairs are held at once, and no fewer than one candidate's
    against all: the backward pass computes them again instead of keeping them.
    """
    z = _scores(logits, targets.valid)
    positive = targets.valid & (targets.labels > 0.5)
    negative = targets.valid & ~positive
    block = max(1, min(z.shape[2], tile // max(1, z.size)))

    def blocks(x: Array) -> Array:  # [..., C] -> [C / block, ..., block]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)])
        return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, block), -2, 0)

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        gap = part[0][..., None] - z[:, :, None, :]
        cost = jax.nn.softplus(-gap) if margin is None else jax.nn.relu(margin - gap)
        pair = part[1][..., None] & negative[:, None, :]
        return total + jnp.sum(jnp.where(pair, cost, 0), axis=(1, 2, 3)), None

    body = jax.checkpoint(add, prevent_cse=False)
    total = jax.lax.scan(body, jnp.zeros(z.shape[0]), (blocks(z), blocks(positive)))[0]
    pairs = jnp.sum(jnp.sum(positive, 1) * jnp.sum(negative, 1, dtype=jnp.float32))
    return total / jnp.maximum(pairs, 1)


def mass_distillation(
    logits: Float[Array, "L B C"], targets: Targets, *, rate: float = 1.0
) -> Float[Array, " L"]:
    """Cross entropy towards the probability 1 - exp(-rate * mass), mean over the elements.

    An entry's mass sums, over the window's tokens and CSA layers, the share of attention it gets:
    the expected number of times it is drawn if each of them draws one entry. The target is then the
    probability (Poisson) that it is drawn at all, `rate` draws a token and layer. Other than votes
    it tells an entry read heavily from one that barely passed, and needs no threshold on the
    teacher; other than a divergence between distributions over the candidates it leaves the
    sigmoid a probability, which the deployed threshold is compared with.
    """
    z = _scores(logits, targets.valid)
    mass = jnp.where(targets.valid, targets.mass.astype(jnp.float32), 0)
    return _mean(_cross_entropy(z, -jnp.expm1(-rate * mass)), targets.valid)


def log_counts(targets: Targets) -> Float[Array, "B C"]:
    """Logarithm of how many candidates of the full pool each stands for, -inf where not valid.

    To be added to logits in a softmax. Rows without a candidate have one 0: a sum of something,
    for a gradient.
    """
    count = jnp.where(targets.valid, targets.stands_for.astype(jnp.float32), 0)
    found = jnp.where(count > 0, jnp.log(jnp.maximum(count, 1e-30)), -jnp.inf)
    return found.at[:, 0].max(jnp.where(jnp.any(count > 0, axis=1), -jnp.inf, 0))


def attention_share(logits: Float[Array, "L B C"], targets: Targets) -> Float[Array, " L"]:
    """Divergence of softmax(logits) from a sample's attention mass over the window, by mass.

    As lightning indexers are trained, but towards what all CSA layers read in all of the window's
    tokens: what an indexer with the score "softmax" says. Drawn candidates count as many times as
    they stand for, in the softmax as in the mass, so both are those of the full pool in
    expectation; a sample weighs as much as it has mass.
    """
    valid = targets.valid
    count = jnp.where(valid, targets.stands_for.astype(jnp.float32), 0)
    mass = jnp.where(valid, targets.mass.astype(jnp.float32), 0)
    total = jnp.sum(count * mass, axis=1)
    share = mass / jnp.maximum(total, 1e-30)[:, None]
    z = _scores(logits, valid)
    log_q = z - jax.nn.logsumexp(z + log_counts(targets), axis=2, keepdims=True)
    log_p = jnp.log(jnp.maximum(share, 1e-30))
    divergence = jnp.sum(count * share * (log_p - log_q), axis=2)
    return jnp.sum(total * divergence, axis=1) / jnp.maximum(jnp.sum(total), 1e-12)


def _threshold(
    u: Float[Array, "L B C"], count: Float[Array, "B C"], budget: Float[Array, " B"]
) -> Float[Array, "L B 1"]:
    """The x at which sum(count * sigmoid(u - x)) over a row is its budget, differentiable in u.

    Where no x gives it, because the budget is 0 or at least the whole count, the nearest end of an
    interval beyond which all sigmoids are saturated.
    """
    fixed = jax.lax.stop_gradient(u)
    low = jnp.min(fixed, axis=2, keepdims=True) - _SATURATED
    high = jnp.max(fixed, axis=2, keepdims=True) + _SATURATED

    def halve(_: Int[Array, ""], ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        kept = jnp.sum(count * jax.nn.sigmoid(fixed - middle), axis=2, keepdims=True)
        more = kept > budget[:, None]
        return jnp.where(more, middle, ends[0]), jnp.where(more, ends[1], middle)

    low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (low, high))
    x = (low + high) / 2
    # Implicit function theorem: dx = sum share du, share ~ count * sigmoid'. As a softmax of
    # logarithms it is also right where every derivative underflows.
    slope = jnp.log(count) + jax.nn.log_sigmoid(fixed - x) + jax.nn.log_sigmoid(x - fixed)
    share = jnp.where(count > 0, jax.nn.softmax(jnp.maximum(slope, -1e30), axis=2), 0)
    return x + jnp.sum(share * (u - fixed), axis=2, keepdims=True)


def missed_mass(
    logits: Float[Array, "L B C"],
    targets: Targets,
    budget: Float[Array, " B"],
    *,
    temperature: float = 1.0,
) -> Float[Array, " L"]:
    """Share of the batch's attention mass expected outside a set of `budget[b]` candidates a row.

    Candidate n is kept with probability sigmoid((logit[n] - x) / temperature), where the row's x is
    such that the expected number kept is the budget; the published recall at a number of pages is
    the limit of low temperature. Drawn candidates count as many times as they stand for, so that
    both the budget and the mass are those of the full pool, in expectation. Rows are pooled: a
    sample whose mass is all in resident entries teaches little, as it should.
    """
    valid = targets.valid
    count = jnp.where(valid, targets.stands_for.astype(jnp.float32), 0)
    mass = jnp.where(valid, count * targets.mass, 0)
    u = _scores(logits, valid) / temperature
    lost = jax.nn.sigmoid(_threshold(u, count, budget) - u)
    return jnp.sum(mass * lost, axis=(1, 2)) / jnp.maximum(jnp.sum(mass), 1e-12)


def pool_pages(
    logits: Float[Array, "L B C"], targets: Targets, page_entries: int
) -> tuple[Float[Array, "L B P"], Targets]:
    """Runs of `page_entries` candidates as one: the highest logit, summed mass, if any is valid.

    A page's score is its best entry's, as policy "top" ranks pages. Labels and weights are maxima;
    a page stands for as many as the entry of it that stands for most.
    """
    if logits.shape[2] % page_entries:
        wanted = f"a multiple of objective.page_entries={page_entries}"
        raise refusal("candidates", logits.shape[2], wanted)

    def split(x: Array) -> Array:
        return x.reshape(*x.shape[:-1], -1, page_entries)

    valid = split(targets.valid)
    top = jnp.max(jnp.where(valid, split(logits.astype(jnp.float32)), -jnp.inf), axis=3)

    def best(x: Array) -> Array:
        return jnp.max(jnp.where(valid, split(x.astype(jnp.float32)), 0), axis=2)

    mass = jnp.sum(jnp.where(valid, split(targets.mass.astype(jnp.float32)), 0), axis=2)
    labels, weights, count = map(best, (targets.labels, targets.weights, targets.stands_for))
    return top, Targets(labels, weights, mass, jnp.any(valid, axis=2), count)


def _missed(logits: Array, targets: Targets, cfg: ObjectiveConfig) -> Float[Array, " L"]:
    """`missed_mass`, mean over the budgets."""
    logits, targets = pool_pages(logits, targets, cfg.page_entries)
    total = jnp.sum(jnp.where(targets.valid, targets.stands_for, 0), axis=1)
    parts = [
        missed_mass(logits, targets, share * total, temperature=cfg.temperature)
        for share in cfg.kept_shares
    ]
    return jnp.mean(jnp.stack(parts), axis=0)


def ensemble_logits(
    logits: Float[Array, "L B C"], ensemble: Ensemble, weight: Float[Array, " L"] | None = None
) -> Float[Array, "1 B C"]:
    """Logits of the deployed ensemble's probabilities, float32, without leaving log space.

    `weight` is the leaf of a learned ensemble; ConfigError where it is missing or not wanted.
    """
    if (weight is None) == (ensemble == "learned"):
        got = "no weight" if weight is None else "a weight"
        raise ConfigError(f"a weight must be given for a learned ensemble only, got {got}")
    z = logits.astype(jnp.float32)
    if weight is not None:
        share = jax.nn.softmax(weight.astype(jnp.float32))
        return jnp.sum(share[:, None, None] * z, axis=0, keepdims=True)
    if ensemble == "max":
        return jnp.max(z, axis=0, keepdims=True)
    yes = jax.nn.logsumexp(jax.nn.log_sigmoid(z), axis=0, keepdims=True)
    return yes - jax.nn.logsumexp(jax.nn.log_sigmoid(-z), axis=0, keepdims=True)


def _terms(cfg: ObjectiveConfig) -> dict[str, Callable[[Array, Targets], Array]]:
    """The losses by their fields of the configuration."""
    return {
        "bce": lambda z, y: bce(z, y, smoothing=cfg.smoothing),
        "focal": lambda z, y: focal(z, y, gamma=cfg.gamma, smoothing=cfg.smoothing),
        "bpr": lambda z, y: pairwise(z, y),
        "margin": lambda z, y: pairwise(z, y, margin=cfg.margin_width),
        "mass": lambda z, y: mass_distillation(z, y, rate=cfg.mass_rate),
        "share": attention_share,
        "missed": lambda z, y: _missed(z, y, cfg),
    }


def objective(
    logits: Float[Array, "L B C"],
    targets: Targets,
    cfg: ObjectiveConfig,
    *,
    ensemble_weight: Float[Array, " L"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "..."]]]:
    """The loss to minimise, and every term that is on before weighting.

    Terms are [L] under their names, and scalars under "ensemble." plus their names where the
    ensemble is trained as well.
    """
    losses = {name: f for name, f in _terms(cfg).items() if getattr(cfg, name)}
    loss, parts = jnp.zeros(()), {}
    if cfg.per_layer:
        terms = {name: f(logits, targets) for name, f in losses.items()}
        loss += cfg.per_layer * sum(getattr(cfg, n) * jnp.mean(x) for n, x in terms.items())
        parts |= terms
    if cfg.on_ensemble:
        z = _scores(logits, targets.valid)  # before logarithms, so that garbage has no gradient
        joint = ensemble_logits(z, cfg.ensemble, ensemble_weight)
        terms = {name: f(joint, targets)[0] for name, f in losses.items()}
        loss += cfg.on_ensemble * sum(getattr(cfg, n) * x for n, x in terms.items())
        parts |= {f"ensemble.{name}": x for name, x in terms.items()}
    return loss, parts
