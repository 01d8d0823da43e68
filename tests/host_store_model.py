"""A host store done the plain way, and a random walk that holds the real one to it."""

import random
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import pytest

from lsa_jax.lsa.host_memory import HostLimitError, HostMemory, Kind
from lsa_jax.lsa.host_store import HostStore, HostStoreError, chain_digest, chain_root

SHAPE = (2, 128)
RECORD = 2 * 128
POISON = 0xA5
ROOT = chain_root(b"model and cache")


def store_of(rows: int, kind: Kind = "pageable") -> HostStore:
    memory = HostMemory(SHAPE, rows * RECORD + 3, kind=kind, segment_bytes=24 * RECORD)
    return HostStore(memory, verify=True)


def chain(tokens: Sequence[int], previous: bytes = ROOT) -> list[bytes]:
    """Digests of pages of one token."""
    digests = [previous]
    for token in tokens:
        digests.append(chain_digest(digests[-1], [token]))
    return digests[1:]


def records(digests: Sequence[bytes]) -> np.ndarray:
    """A page's bytes follow from its digest, as a model's do from its tokens."""
    return np.frombuffer(b"".join(digest * 8 for digest in digests), np.uint8).reshape(-1, *SHAPE)


def append(store: HostStore, owner: Hashable, digests: Sequence[bytes]) -> None:
    store.append_pages(owner, digests, records(digests))


def read(store: HostStore, owner: Hashable) -> np.ndarray:
    return store.memory.read(store.rows(owner))


def pages(store: HostStore) -> dict[str, int]:
    """Statistics in pages."""
    stats = store.stats()
    assert stats.limit == stats.live + stats.cached + stats.free
    return {name: getattr(stats, name) // RECORD for name in ("live", "cached", "free", "reserved")}


class Model:
    """What a store must do, the plain way: tables of digests and a list in LRU order."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.tables: dict[int, list[bytes]] = {}
        self.promised: dict[int, int] = {}
        self.cached: list[bytes] = []
        self.kept: set[bytes] = set()

    def live(self) -> set[bytes]:
        return set().union(*self.tables.values())

    def shortage(self, owner: int, digests: list[bytes], promise: int) -> tuple[int, int] | None:
        """(needed, available) if the owner cannot take these pages and hold this promise."""
        live = self.live()
        others = sum(self.promised.values()) - self.promised.get(owner, 0)
        new = owner not in self.tables
        needed = sum(digest not in live for digest in digests) + (promise if new else 0)
        available = self.rows - len(live) - others - (0 if new else promise)
        return None if needed <= available else (needed, available)

    def take(self, owner: int, digests: list[bytes], promise: int) -> None:
        self.cached = [digest for digest in self.cached if digest not in digests]
        self.tables.setdefault(owner, []).extend(digests)
        self.promised[owner] = promise
        evicted = max(0, len(self.live()) + len(self.cached) - self.rows)
        self.kept -= set(self.cached[:evicted])
        del self.cached[:evicted]

    def finish(self, owner: int, keep: bool) -> None:
        table = self.tables.pop(owner)
        del self.promised[owner]
        self.kept |= set(table) if keep else set()
        live = self.live()
        gone = [digest for digest in reversed(table) if digest not in live]
        self.cached += [digest for digest in gone if digest in self.kept]


class Walk:
    """Random requests on a tree of prefixes: a page continues most often as others did."""

    OWNERS = 8

    def __init__(self, rows: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.store, self.model = store_of(rows), Model(rows)
        self.row_of: dict[bytes, int] = {}  # as the store said when the page was appended
        self.recalled: list[tuple[int, int, bytes]] = []  # row, generation then, digest
        self.links: dict[tuple[bytes, int], bytes] = {}
        self.count: dict[str, int] = {}

    def path(self, previous: bytes, length: int) -> list[bytes]:
        digests = []
        for _ in range(length):
            token = 0 if self.rng.random() < 0.85 else self.rng.randrange(1, 4)
            key = (previous, token)
            previous = self.links.setdefault(key, b"") or chain_digest(previous, [token])
            self.links[key] = previous
            digests.append(previous)
        return digests

    def step(self) -> None:
        """One operation on a random owner, live or not."""
        owner, dice = self.rng.randrange(self.OWNERS), self.rng.random()
        if owner not in self.model.tables:
            ops = (self.admit, self.admit, self.admit, self.call_for_a_dead_owner)
            op = ops[int(dice * 4)]
        elif dice < 0.62:
            op = self.append
        elif dice < 0.86:
            op = self.recall
        elif dice < 0.98:
            op = self.finish
        else:
            op = self.rng.choice([self.admit_again, self.touch, self.touch, self.clear])
        self.count[op.__name__] = self.count.get(op.__name__, 0) + 1
        op(owner)

    def attempt(self, owner: int, digests: list[bytes], promise: int, call: Callable) -> None:
        """The call takes these pages, or it is refused with exactly the model's numbers."""
        short = self.model.shortage(owner, digests, promise)
        if short is None:
            call()
            self.model.take(owner, digests, promise)
            new = self.store.rows(owner)[-len(digests) :].tolist() if digests else []
            self.row_of.update(zip(digests, new, strict=True))
            return
        self.count["refused"] = self.count.get("refused", 0) + 1
        with pytest.raises(HostLimitError) as refused:
            call()
        got = (refused.value.needed // RECORD, refused.value.available // RECORD)
        assert got == short

    def admit(self, owner: int) -> None:
        prefix = self.path(ROOT, self.rng.choice([0, 0, 3, 10]))
        total = self.rng.randrange(14)
        stored = self.model.live() | set(self.model.cached)
        shared = 0
        while shared < min(total, len(prefix)) and prefix[shared] in stored:
            shared += 1
        assert min(total, self.store.match_prefix(prefix)) == shared

        def call() -> None:
            assert self.store.admit(owner, total, prefix) == shared

        self.attempt(owner, prefix[:shared], total - shared, call)

    def append(self, owner: int) -> None:
        table = self.model.tables[owner]
        digests = self.path(table[-1] if table else ROOT, self.rng.choice([1, 1, 1, 2, 5]))
        promise = max(0, self.model.promised[owner] - len(digests))
        self.attempt(owner, digests, promise, lambda: append(self.store, owner, digests))

    def recall(self, owner: int) -> None:
        """Reads the owner's pages, and pages read by anyone before, if they are still there."""
        table, generations = self.model.tables[owner], self.store.generations
        assert np.array_equal(read(self.store, owner), records(table))
        valid = [x for x in self.recalled if generations[x[0]] == x[1]]
        rows = np.array([row for row, _, _ in valid], int)
        want = records([digest for _, _, digest in valid])
        assert np.array_equal(self.store.memory.read(rows), want)
        rows = self.store.rows(owner).tolist()
        fresh = [(row, generations[row], digest) for row, digest in zip(rows, table, strict=True)]
        self.recalled = (valid + fresh)[-16:]

    def finish(self, owner: int) -> None:
        keep = self.rng.random() < 0.7
        self.store.finish(owner) if keep else self.store.cancel(owner)
        self.model.finish(owner, keep)

    def touch(self, owner: int) -> None:
        cached = self.model.cached
        used = self.rng.sample(cached, len(cached) // 3) + self.model.tables[owner][:1]
        self.store.touch(np.array([self.row_of[digest] for digest in used], int))
        used = [digest for digest in used if digest in cached]
        self.model.cached = [digest for digest in cached if digest not in used] + used

    def clear(self, owner: int) -> None:
        if self.rng.random() < 0.2:
            self.store.clear_cache()
            self.model.kept -= set(self.model.cached)
            self.model.cached = []

    def admit_again(self, owner: int) -> None:
        with pytest.raises(HostStoreError, match=f"got {owner}, which is live"):
            self.store.admit(owner, 1)

    def call_for_a_dead_owner(self, owner: int) -> None:
        digests = self.path(ROOT, 1)
        for call in (
            lambda: self.store.finish(owner),
            lambda: self.store.rows(owner),
            lambda: append(self.store, owner, digests),
        ):
            with pytest.raises(HostStoreError, match=f"owner must be live, got {owner}:"):
                call()

    def check_counts(self) -> None:
        live, cached = len(self.model.live()), len(self.model.cached)
        assert pages(self.store) == {
            "live": live,
            "cached": cached,
            "free": self.model.rows - live - cached,
            "reserved": sum(self.model.promised.values()),
        }

    def check_every_byte(self) -> None:
        """The whole pool: live and cached pages intact, all that was given up poisoned."""
        memory = self.store.memory
        want = np.full((memory.rows, *SHAPE), POISON, np.uint8)
        held = [*self.model.live(), *self.model.cached]
        rows = [self.row_of[digest] for digest in held]
        assert len(set(rows)) == len(rows)
        want[rows] = records(held)
        got = memory.read(np.arange(memory.rows))
        never = (self.store.generations == 0) & ~np.isin(np.arange(memory.rows), rows)
        want[never] = 0
        np.testing.assert_array_equal(got, want)
        for owner, table in self.model.tables.items():
            assert self.store.rows(owner).tolist() == [self.row_of[digest] for digest in table]
