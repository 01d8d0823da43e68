"""Densest pages: which pages of each row, or of all rows together, a budget keeps."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.top_k import top_k


def densest_pages(
    page_scores: Float[Array, "R P"],
    pages: Int[Array, " R"],
    budget: int,
    *,
    wanted: Bool[Array, "R P"] | None = None,
    allowed: Int[Array, " R"] | Int[Array, ""] | None = None,
    shared: bool = False,
    backend: str | None = None,
) -> Bool[Array, "R P"]:
    """The `budget` pages of highest score of each row, or of all rows together where `shared`.

    Row r has `pages[r]` complete pages, of which `wanted` marks the candidates (None: all). Equal
    scores go to the page nearer to its row's end, then to the lower row. `allowed` asks for fewer
    than `budget`: one number per row, or one in all where `shared`. Counts of entries per page are
    scores as they are; tiers, such as pages that must stay, are a constant added to the score that
    exceeds every score's range. The scores of other pages have no influence; a page whose score is
    NaN or -inf is never kept.

    This is `top_k` over columns that count from a row's end: at equal scores the lowest such column
    is the nearest page; laid out page by page for all rows, the next lowest is the next row's.
    """
    rows, columns = page_scores.shape
    age = jnp.arange(columns, dtype=jnp.int32)
    pages = jnp.clip(pages, 0, columns)
    page = pages[:, None] - 1 - age  # of each age; negative: none
    at = jnp.maximum(page, 0)
    candidates = page >= 0
    if wanted is not None:
        candidates &= jnp.take_along_axis(wanted, at, axis=1)
    scores = jnp.take_along_axis(page_scores.astype(jnp.float32), at, axis=1)
    if shared:
        scores, candidates = scores.T.reshape(1, -1), candidates.T.reshape(1, -1)
    limit = None if allowed is None else jnp.asarray(allowed, jnp.int32).reshape(scores.shape[0])
    k = min(budget, scores.shape[1])
    index, valid = top_k(scores, candidates, k, limit=limit, backend=backend)
    column, row = (index // rows, index % rows) if shared else (index, jnp.arange(rows)[:, None])
    kept = jnp.where(valid, pages[row] - 1 - column, columns)
    return jnp.zeros((rows, columns), bool).at[row, kept].set(True, mode="drop")
