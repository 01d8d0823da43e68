"""Ownership of host pages: a random walk against a dense model, and every rule by itself."""

import hashlib

import numpy as np
import pytest

from lsa_jax.config import ConfigError
from lsa_jax.lsa.host_memory import HostLimitError, HostMemory, Kind, Segment
from lsa_jax.lsa.host_store import HostStore, HostStoreError, chain_digest, chain_root
from tests.host_store_model import (
    POISON,
    RECORD,
    ROOT,
    SHAPE,
    Walk,
    append,
    chain,
    pages,
    read,
    records,
    store_of,
)


@pytest.mark.slow
def test_a_hundred_thousand_random_operations_leave_every_byte_as_in_a_dense_copy() -> None:
    walk = Walk(rows=45, seed=3)
    for i in range(100_000):
        walk.step()
        if i % 5 == 0:
            walk.check_counts()
        if i % 64 == 0:
            walk.check_every_byte()
    walk.check_every_byte()
    stats = walk.store.stats()
    assert min(stats.hits, stats.stored, stats.evictions) > 2000
    assert min(walk.count.values()) > 100, walk.count  # no kind of operation is left out

    for owner in list(walk.model.tables):
        walk.store.finish(owner)
    walk.store.clear_cache()
    assert pages(walk.store) == {"live": 0, "cached": 0, "free": 45, "reserved": 0}
    assert (walk.store.memory.read(np.arange(45)) == POISON).all()


@pytest.mark.parametrize("kind", ["pageable", "pinned"])
def test_eight_requests_with_a_common_prefix_hold_it_once(kind: Kind) -> None:
    store, prefix = store_of(12 + 8 * 2, kind), chain(range(12))
    tails = [chain([100 + i, 200 + i], prefix[-1]) for i in range(8)]
    for i, tail in enumerate(tails):
        assert store.admit(i, 14, prefix + tail) == (12 if i else 0)
        append(store, i, (prefix if i == 0 else []) + tail)
    assert pages(store) == {"live": 28, "cached": 0, "free": 0, "reserved": 0}
    for i, tail in enumerate(tails):
        np.testing.assert_array_equal(read(store, i), records(prefix + tail))
        assert store.rows(i)[:12].tolist() == store.rows(0)[:12].tolist()

    for i in range(7):
        store.cancel(i)
    assert pages(store) == {"live": 14, "cached": 0, "free": 14, "reserved": 0}
    np.testing.assert_array_equal(read(store, 7), records(prefix + tails[7]))


def test_requests_admitted_before_their_common_prefix_is_stored_share_it_too() -> None:
    store, prefix = store_of(8), chain(range(4))
    store.admit("a", 4)
    store.admit("b", 4)
    append(store, "a", prefix)
    append(store, "b", prefix)
    assert pages(store) == {"live": 4, "cached": 0, "free": 4, "reserved": 0}
    assert store.stats().hits == 4


def test_the_least_recently_used_page_is_evicted_and_of_a_request_the_last_first() -> None:
    store = store_of(6)
    a, b, c = chain([1, 2]), chain([3, 4]), chain([5, 6])
    for owner, digests in (("a", a), ("b", b), ("c", c)):
        store.admit(owner, 2)
        append(store, owner, digests)
    used = np.array([store.rows("b")[0], store.rows("a")[1]])
    for owner in ("b", "a", "c"):  # finished, and so used, in this order
        store.finish(owner)
    store.touch(used)
    order = [b[1], a[0], c[1], c[0], b[0], a[1]]

    store.admit("new", 6)
    for i, token in enumerate(range(10, 16)):
        append(store, "new", chain([token]))
        assert [digest for digest in order if store.match_prefix([digest])] == order[i + 1 :]
    assert store.stats().evictions == 6


def test_a_page_about_to_be_shared_is_not_evicted_to_make_room_beside_it() -> None:
    store = store_of(2)
    oldest, newer, fresh = chain([1]), chain([2]), chain([3])
    for digests in (oldest, newer):
        store.admit("x", 1)
        append(store, "x", digests)
        store.finish("x")
    store.admit("y", 2)
    append(store, "y", fresh + oldest)
    np.testing.assert_array_equal(read(store, "y"), records(fresh + oldest))
    assert store.match_prefix(newer) == 0


def test_an_admitted_prefix_cannot_be_evicted_before_it_is_read() -> None:
    store, prefix = store_of(4), chain(range(3))
    store.admit("a", 3)
    append(store, "a", prefix)
    store.finish("a")
    assert store.admit("b", 3, prefix) == 3
    store.admit("c", 1)
    append(store, "c", chain([9]))
    with pytest.raises(HostLimitError):
        append(store, "c", chain([9, 9])[1:])
    np.testing.assert_array_equal(read(store, "b"), records(prefix))


def test_refused_admission_states_needed_and_available_bytes_and_changes_nothing() -> None:
    store = store_of(10)
    store.admit("a", 4)
    append(store, "a", chain([1, 2]))
    store.admit("cached", 3)
    append(store, "cached", chain([3, 4, 5]))
    store.finish("cached")
    before, generations = store.stats(), store.generations
    with pytest.raises(HostLimitError, match=f"request 'b' needs {7 * RECORD} bytes") as refused:
        store.admit("b", 7)
    assert (refused.value.needed, refused.value.available) == (7 * RECORD, 6 * RECORD)
    assert refused.value.available == before.available
    assert store.stats() == before
    np.testing.assert_array_equal(store.generations, generations)
    store.admit("b", 6)  # cached pages count as room


def test_memory_that_the_system_refuses_is_refused_at_admission() -> None:
    def allocate(shape: tuple[int, int, int]) -> Segment:
        if memory.rows:
            raise MemoryError("none left")
        return Segment(np.zeros(shape, np.uint8), None)

    memory = HostMemory(SHAPE, 8 * RECORD, segment_bytes=4 * RECORD, allocate=allocate)
    store = HostStore(memory)
    store.admit("a", 3)
    before = store.stats()
    with pytest.raises(ConfigError, match="the system refused: none left"):
        store.admit("b", 2)
    assert store.stats() == before
    store.admit("b", 1)


def test_a_request_that_outgrows_its_reservation_is_refused_alone() -> None:
    store = store_of(8)
    store.admit("short", 2)
    store.admit("long", 4)
    first = chain([1, 2, 3, 4])
    append(store, "short", first)  # two more than reserved: there is room
    more = chain([5, 6], first[-1])
    before = store.stats()
    with pytest.raises(HostLimitError, match=r"'short'.*needs 512 bytes.* 0 bytes available"):
        append(store, "short", more)
    assert store.stats() == before
    np.testing.assert_array_equal(read(store, "short"), records(first))

    append(store, "long", chain([7, 8, 9, 10]))  # its reservation is whole
    store.finish("long")
    append(store, "short", more)  # room again, in evicted pages
    np.testing.assert_array_equal(read(store, "short"), records(first + more))


def test_an_owner_finishes_once_and_its_id_can_be_used_again() -> None:
    store = store_of(4)
    for release in (store.finish, store.cancel):
        with pytest.raises(HostStoreError, match="'a': not admitted, or finished"):
            release("a")
        store.admit("a", 2)
        append(store, "a", chain([1]))
        release("a")
        with pytest.raises(HostStoreError, match="'a': not admitted, or finished"):
            release("a")
        assert pages(store)["reserved"] == pages(store)["live"] == 0


def test_cancelling_forgets_what_only_that_request_brought() -> None:
    store, prefix = store_of(8), chain([1, 2])
    store.admit("a", 2)
    append(store, "a", prefix)
    store.finish("a")
    store.admit("b", 4, prefix)
    own = chain([3, 4], prefix[-1])
    append(store, "b", own)
    store.cancel("b")
    assert store.match_prefix(prefix + own) == 2
    assert pages(store) == {"live": 0, "cached": 2, "free": 6, "reserved": 0}


def test_a_row_changes_its_generation_when_it_loses_its_page_and_only_then() -> None:
    store, digests = store_of(1), chain([1])
    generations = []
    for owner, release in (("a", store.finish), ("b", store.cancel), ("c", store.cancel)):
        store.admit(owner, 1)
        append(store, owner, digests)  # b finds a's page, which stays after b; c does, too
        release(owner)
        generations += store.generations.tolist()
    store.clear_cache()
    generations += store.generations.tolist()
    for token in (2, 3):  # the second evicts the first
        store.admit("d", 1)
        append(store, "d", chain([token]))
        store.finish("d")
        generations += store.generations.tolist()
    assert generations == [0, 0, 0, 1, 1, 2]
    store.admit("e", 1)
    assert store.generations.dtype == store.rows("e").dtype == np.int32


def test_digests_chain_over_tokens_and_begin_at_the_fingerprint() -> None:
    root = hashlib.sha256(b"v4").digest()
    first = hashlib.sha256(root + b"\x01\x00\x00\x00\x00\x01\x00\x00").digest()
    assert chain_digest(chain_root(b"v4"), [1, 256]) == first
    assert chain_digest(chain_root(b"v4"), np.array([1, 256], np.int64)) == first
    second = hashlib.sha256(first + b"\xff\xff\xff\x7f").digest()
    assert chain_digest(first, [2**31 - 1]) == second
    assert chain_digest(chain_root(b"other"), [1, 256]) != first


@pytest.mark.parametrize("tokens", [[], [-1], [2**31], [2**63], [1.0], [[1]]])
def test_tokens_that_are_none_are_refused(tokens: list) -> None:
    with pytest.raises(HostStoreError, match="tokens must be"):
        chain_digest(ROOT, tokens)
    with pytest.raises(HostStoreError, match="previous must be 32 bytes"):
        chain_digest(b"", [1])


def test_bad_calls_are_refused_before_anything_changes() -> None:
    store, digests = store_of(4), chain([1, 2])
    store.admit("a", 2)
    append(store, "a", digests[:1])
    before = store.stats()
    other = records(digests)[::-1]
    for call, message in (
        (lambda: store.append_pages("a", digests, records(digests)[:1]), "records must be"),
        (lambda: store.append_pages("a", digests[1:] * 2, other), "digests must be distinct"),
        (lambda: store.append_pages("a", digests, other), "must equal its stored bytes"),
        (lambda: store.admit("b", -1), "pages_needed must be >= 0"),
        (lambda: store.touch(np.array([0, 1])), "got row 1, which is free"),
    ):
        with pytest.raises(HostStoreError, match=message):
            call()
        assert store.stats() == before
