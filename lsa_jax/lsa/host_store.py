"""Who owns which page of host memory: reservations, sharing by prefix, and the LRU cache.

A row of `HostMemory` is in one of three states. *Live*: at least one owner's table names it.
*Cached*: nobody's does, but its bytes stay for a later request with the same prefix, until the room
is needed. *Free*: empty. A complete page never changes, so it is known by the chain digest of its
tokens and of all tokens before them, and owners with the same prefix hold the same row.

An owner can only ever release what its own table names, whatever the order of requests in a batch
(invariants I7 to I9 of spec 3.5). Not thread-safe: one thread calls a store and its memory.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from lsa_jax.lsa.host_memory import HostLimitError, HostMemory

_POISON = 0xA5
_DIGEST_BYTES = 32


class HostStoreError(ValueError):
    """A call that the store's contract forbids, such as finishing an owner twice."""


def chain_root(fingerprint: bytes) -> bytes:
    """Digest before a prompt's first page. The fingerprint names all that shapes a page's bytes:
    the weights, the model's and the cache's configuration, the layout of records."""
    return hashlib.sha256(fingerprint).digest()


def chain_digest(previous: bytes, tokens: Sequence[int] | np.ndarray) -> bytes:
    """Digest of a page's tokens and all before: sha256(previous digest, tokens as int32 LE)."""
    if len(previous) != _DIGEST_BYTES:
        raise HostStoreError(f"previous must be {_DIGEST_BYTES} bytes, got {len(previous)}")
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":  # no tokens are float64
        raise HostStoreError(f"tokens must be integers [n >= 1], got {ids.dtype} {ids.shape}")
    if not 0 <= ids.min() <= ids.max() < 2**31:
        raise HostStoreError(f"tokens must be in [0, 2^31), got {ids.min()} to {ids.max()}")
    return hashlib.sha256(previous + ids.astype("<i4").tobytes()).digest()


@dataclasses.dataclass(frozen=True)
class HostStats:
    """Bytes of whole records: limit = live + cached + free. Counts are of pages, since the start.

    `reserved` is promised to owners beyond what they hold, and comes out of free and cached.
    """

    live: int
    cached: int
    free: int
    reserved: int
    limit: int
    allocated: int  # what the memory has taken from the system so far
    stored: int  # pages whose bytes were written
    hits: int  # pages found stored already
    evictions: int  # cached pages given up for others

    @property
    def available(self) -> int:
        """Bytes that an admission may ask for."""
        return self.limit - self.live - self.reserved


@dataclasses.dataclass(slots=True)
class _Page:
    """A row in use. `kept`: some owner has finished and wants it cached once nobody owns it."""

    digest: bytes
    owners: int = 0
    kept: bool = False


@dataclasses.dataclass(slots=True)
class _Owner:
    """A request: the rows of its logical pages (the first `count`), and pages still promised."""

    promised: int
    count: int = 0
    table: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(16, np.int32))

    def extend(self, rows: list[int]) -> None:
        end = self.count + len(rows)
        if end > len(self.table):
            self.table = np.concatenate([self.table, np.empty(end, np.int32)])
        self.table[self.count : end] = rows
        self.count = end


class HostStore:
    """Pages of many owners in one `HostMemory`, every distinct page once.

    An owner is any hashable id; it is free for reuse once finished. Digests are `chain_digest`s.
    Every call either does all it says or raises and changes nothing.

    `verify` costs time and is meant for tests: a shared page's bytes are compared with the caller's
    (its forward pass may round differently), and rows given up are overwritten with 0xA5.
    """

    def __init__(self, memory: HostMemory, *, verify: bool = False) -> None:
        self.memory = memory
        self._verify = verify
        self._owners: dict[Hashable, _Owner] = {}
        self._rows: dict[bytes, int] = {}  # of every page stored
        self._pages: dict[int, _Page] = {}  # by row, live and cached
        self._free: list[int] = []
        self._unused = 0  # rows from here on never held a page
        # Cached rows, least recently used first. A use is a release or a touch.
        self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._generations = np.zeros(memory.max_rows, np.int32)
        self._promised = self._live = 0
        self._stored = self._hits = self._evictions = 0

    def admit(self, owner: Hashable, pages_needed: int, prefix: Sequence[bytes] = ()) -> int:
        """Reserves room for a request of `pages_needed` pages in all.

        Those leading pages of `prefix` that are stored already become the owner's first pages, so
        that they cannot be evicted before it reads them; their number is returned. Pages that
        another owner holds cost no room.

        Raises:
          HostStoreError: the owner is live, or `pages_needed` is negative.
          HostLimitError: not enough room.
        """
        if owner in self._owners:
            raise HostStoreError(f"owner must be new or finished, got {owner!r}, which is live")
        if pages_needed < 0:
            raise HostStoreError(f"pages_needed must be >= 0, got {pages_needed}")
        shared = list(prefix[: min(pages_needed, self.match_prefix(prefix))])
        self._check_distinct(shared)
        rest = pages_needed - len(shared)
        self._check_room(owner, self._not_live(shared) + rest, self._promised)
        self._grow_for(rest + self._promised)
        self._owners[owner] = account = _Owner(promised=rest)
        self._promised += rest
        account.extend([self._hold(digest) for digest in shared])
        return len(shared)

    def append(self, owner: Hashable, digest: bytes, record: np.ndarray) -> None:
        """The owner's next page, uint8 [record_rows, 128]; see `append_pages`."""
        self.append_pages(owner, [digest], record[None])

    def append_pages(self, owner: Hashable, digests: Sequence[bytes], records: np.ndarray) -> None:
        """The owner's next pages: digests [n] and records uint8 [n, record_rows, 128].

        A page that is stored already is shared, and its bytes stay as they are. Others take rows
        that are free, then rows of the least recently used cached pages.

        Raises:
          HostStoreError: the owner is not live, or sizes are off.
          HostLimitError: the owner outgrew its reservation, and nothing is left for it. Other
            owners keep their pages and reservations, and this one those it has.
        """
        account = self._account(owner)
        self._check_records(digests, records)
        absent = [i for i, digest in enumerate(digests) if digest not in self._rows]
        used = min(account.promised, len(digests))
        self._check_room(owner, self._not_live(digests), self._promised - used)
        if self._verify:
            self._check_shared_bytes(digests, records)
        self._grow_for(len(absent))

        account.promised -= used
        self._promised -= used
        # Stored pages first: while they are held, making room for the others cannot evict them.
        rows = [self._hold(digest) if digest in self._rows else -1 for digest in digests]
        for i, row in zip(absent, self._take_rows(len(absent)), strict=True):
            rows[i] = row
            self._place(row, digests[i])
        if absent:
            new = records if len(absent) == len(digests) else records[absent]
            self.memory.write(np.array([rows[i] for i in absent], np.int32), new)
        account.extend(rows)

    def finish(self, owner: Hashable, keep: bool = True) -> None:
        """Ends a request. Its pages that nobody else owns stay cached if it or an earlier owner
        finished with `keep`, else they are freed. Its last page is the first to be evicted: a page
        is of no use without those before it."""
        account = self._account(owner)
        del self._owners[owner]
        self._promised -= account.promised
        for row in reversed(account.table[: account.count].tolist()):
            self._release(row, keep)

    def cancel(self, owner: Hashable) -> None:
        """Ends a request and forgets the pages that only it brought."""
        self.finish(owner, keep=False)

    def clear_cache(self) -> None:
        """Frees every cached page."""
        while self._cached:
            row, _ = self._cached.popitem(last=False)
            self._drop(row)
            self._free.append(row)

    def rows(self, owner: Hashable) -> np.ndarray:
        """Row of each of the owner's logical pages, int32 [pages]; a copy."""
        account = self._account(owner)
        return account.table[: account.count].copy()

    @property
    def generations(self) -> np.ndarray:
        """How often each row lost its page, int32 [memory.rows]; a copy. Bytes recalled from a row
        are the row's as long as its generation is what it was then."""
        return self._generations[: self.memory.rows].copy()

    def touch(self, rows: np.ndarray) -> None:
        """Makes cached rows the most recently used, the last one most of all; live rows stay."""
        ids = np.asarray(rows).tolist()
        for row in ids:
            if row not in self._pages:
                raise HostStoreError(f"rows to touch must hold pages, got row {row}, which is free")
        for row in ids:
            if row in self._cached:
                self._cached.move_to_end(row)

    def match_prefix(self, digests: Sequence[bytes]) -> int:
        """How many leading pages are stored, whoever owns them."""
        for count, digest in enumerate(digests):
            if digest not in self._rows:
                return count
        return len(digests)

    def stats(self) -> HostStats:
        """Bytes in each state, and what happened so far."""
        size, limit, cached = self.memory.record_nbytes, self.memory.max_rows, len(self._cached)
        return HostStats(
            live=self._live * size,
            cached=cached * size,
            free=(limit - self._live - cached) * size,
            reserved=self._promised * size,
            limit=limit * size,
            allocated=self.memory.nbytes,
            stored=self._stored,
            hits=self._hits,
            evictions=self._evictions,
        )

    def _account(self, owner: Hashable) -> _Owner:
        account = self._owners.get(owner)
        if account is None:
            raise HostStoreError(f"owner must be live, got {owner!r}: not admitted, or finished")
        return account

    def _not_live(self, digests: Sequence[bytes]) -> int:
        """How many of these distinct pages nobody owns: each takes room from free or cached."""
        rows = (self._rows.get(digest) for digest in digests)
        return sum(row is None or row in self._cached for row in rows)

    def _check_room(self, owner: Hashable, pages: int, promised: int) -> None:
        available = self.memory.max_rows - self._live - promised
        if pages > available:
            size = self.memory.record_nbytes
            raise HostLimitError(
                f"request {owner!r}",
                needed=pages * size,
                available=available * size,
                limit=self.memory.limit_bytes,
            )

    def _check_records(self, digests: Sequence[bytes], records: np.ndarray) -> None:
        wanted = (len(digests), *self.memory.record_shape)
        if records.dtype != np.uint8 or records.shape != wanted:
            got = f"{records.dtype.name} {records.shape}"
            raise HostStoreError(f"records must be uint8 {wanted}, got {got}")
        self._check_distinct(digests)

    def _check_distinct(self, digests: Sequence[bytes]) -> None:
        distinct = len(set(digests))
        if distinct != len(digests):  # two pages of one chain never have the same digest
            raise HostStoreError(f"digests must be distinct, got {distinct} of {len(digests)}")

    def _check_shared_bytes(self, digests: Sequence[bytes], records: np.ndarray) -> None:
        shared = [i for i, digest in enumerate(digests) if digest in self._rows]
        stored = self.memory.read(np.array([self._rows[digests[i]] for i in shared], np.int32))
        wrong = np.flatnonzero((stored != records[shared]).any((1, 2)))
        if wrong.size:
            digest = digests[shared[wrong[0]]].hex()
            raise HostStoreError(f"page {digest} must equal its stored bytes, got others")

    def _grow_for(self, pages: int) -> None:
        """Has memory ready for `pages` more, as far as the limit allows, before cached ones go."""
        wanted = self._unused + max(0, pages - len(self._free))
        self.memory.grow(min(wanted, self.memory.max_rows))

    def _take_rows(self, count: int) -> Iterator[int]:
        for _ in range(count):
            if self._free:
                yield self._free.pop()
            elif self._unused < self.memory.rows:
                self._unused += 1
                yield self._unused - 1
            else:
                row, _ = self._cached.popitem(last=False)
                self._drop(row)
                self._evictions += 1
                yield row

    def _place(self, row: int, digest: bytes) -> None:
        self._pages[row] = _Page(digest, owners=1)
        self._rows[digest] = row
        self._live += 1
        self._stored += 1

    def _hold(self, digest: bytes) -> int:
        """One more owner of a stored page; returns its row."""
        row = self._rows[digest]
        page = self._pages[row]
        if not page.owners:
            del self._cached[row]
            self._live += 1
        page.owners += 1
        self._hits += 1
        return row

    def _release(self, row: int, keep: bool) -> None:
        page = self._pages[row]
        page.owners -= 1
        page.kept |= keep
        if page.owners:
            return
        self._live -= 1
        if page.kept:
            self._cached[row] = None
        else:
            self._drop(row)
            self._free.append(row)

    def _drop(self, row: int) -> None:
        """The row loses its page, and copies of it elsewhere become stale."""
        del self._rows[self._pages.pop(row).digest]
        self._generations[row] += 1
        if self._verify:
            poison = np.full((1, *self.memory.record_shape), _POISON, np.uint8)
            self.memory.write(np.array([row]), poison)
