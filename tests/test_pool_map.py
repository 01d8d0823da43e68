"""The pool map against a model in plain Python, over random traces."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.lsa import pool_map

SLOTS, HOSTS, SHAPE = 12, 40, (3, 10)
assign = jax.jit(pool_map.assign, static_argnames="width")


class Model:
    """What the pool should do: slots as a dict, one page at a time."""

    def __init__(self):
        self.held = {}  # slot -> [host row, generation, cycle in which it was last wanted]

    def assign(self, host_rows, generations, wanted, limit, cycle, width):
        self.held = {
            slot: entry
            for slot, entry in self.held.items()
            if slot < limit and generations[entry[0]] == entry[1]
        }
        pairs = [(b, p) for b, p in np.argwhere(wanted).tolist()]
        missing = sum(host_rows[pair] < 0 for pair in pairs)
        pairs = [pair for pair in pairs if host_rows[pair] >= 0]
        rows = list(dict.fromkeys(int(host_rows[pair]) for pair in pairs))
        slot_of = {entry[0]: slot for slot, entry in self.held.items()}
        for row in rows:
            if row in slot_of:
                self.held[slot_of[row]][2] = cycle
        copies = []
        for row in rows:
            if row not in slot_of:
                slot = self.victim(limit, cycle)
                if slot is None:
                    missing += 1
                    continue
                slot_of.pop(self.held.get(slot, [None])[0], None)
                slot_of[row] = slot
                self.held[slot] = [row, int(generations[row]), cycle]
                copies.append((row, slot))
        table = [[] for _ in host_rows]
        for b, p in pairs:
            if int(host_rows[b, p]) in slot_of:
                table[b].append((p, slot_of[int(host_rows[b, p])]))
        missing += sum(max(len(line) - width, 0) for line in table)
        return copies, [line[:width] for line in table], missing

    def victim(self, limit, cycle):
        """The lowest empty slot; else the one not wanted for longest; None if all are wanted."""
        for slot in range(min(limit, SLOTS)):
            if slot not in self.held:
                return slot
        idle = [(entry[2], slot) for slot, entry in self.held.items() if entry[2] < cycle]
        return min(idle)[1] if idle else None


def assert_state(pool, model):
    arrays = [np.asarray(x) for x in (pool.host_row, pool.generation, pool.stamp)]
    for slot in range(SLOTS):
        assert [int(x[slot]) for x in arrays] == model.held.get(slot, [-1, -1, -1]), slot


def assert_result(result, want, width):
    _, copies, table, missing = jax.tree.map(np.asarray, result)
    wanted_copies, lines, wanted_missing = want
    count = len(wanted_copies)
    assert copies.count == count and missing == wanted_missing
    assert list(zip(copies.src, copies.dst, strict=True))[:count] == wanted_copies
    assert (copies.src[count:] == -1).all() and (copies.dst[count:] == -1).all()
    for b, line in enumerate(lines):
        padded = [*line, *[(-1, -1)] * (width - len(line))]
        assert list(zip(table.pages[b].tolist(), table.slots[b].tolist(), strict=True)) == padded


class Trace:
    """Rows of pages that share prefixes, grow, end, and whose host rows are used again."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.generations = np.zeros(HOSTS, np.int32)
        self.limit = SLOTS
        self.host_rows = np.stack([self.new_row() for _ in range(SHAPE[0])])

    def new_row(self):
        row = self.rng.permutation(HOSTS)[: SHAPE[1]].astype(np.int32)
        row[self.rng.integers(3, SHAPE[1] + 1) :] = -1
        return row

    def step(self, *, overfull):
        """Host rows, generations, wanted pages and limit of the next cycle."""
        rng = self.rng
        if rng.random() < 0.3:  # a row ends, another takes its place, perhaps with a common prefix
            b, other = rng.integers(0, SHAPE[0], 2)
            fresh, common = self.new_row(), rng.integers(0, SHAPE[1])
            if rng.random() < 0.5:
                fresh[:common] = self.host_rows[other, :common]
            self.host_rows[b] = fresh
        if rng.random() < 0.2:  # a host row holds something else now
            self.generations[rng.integers(0, HOSTS, 2)] += 1
        if rng.random() < 0.15:
            self.limit = int(rng.integers(0, SLOTS + 3))
        wanted = rng.random(SHAPE) < rng.choice([0.1, 0.3, 0.9] if overfull else [0.1, 0.3])
        if not overfull:
            wanted &= self.host_rows >= 0
            while len(set(self.host_rows[wanted].tolist())) > min(self.limit, SLOTS):
                one = rng.choice(np.flatnonzero(wanted))
                wanted.flat[one] = False
        return self.host_rows.copy(), self.generations.copy(), wanted, self.limit


def run(seed, cycles, width, *, overfull, call: Callable = assign):
    """Plays a trace on the pool and on the model; yields what each cycle did."""
    trace, model = Trace(seed), Model()
    pool = pool_map.empty_pool(SLOTS)
    for cycle in range(cycles):
        host_rows, generations, wanted, limit = trace.step(overfull=overfull)
        before = pool
        result = call(pool, host_rows, generations, wanted, limit, cycle, width=width)
        want = model.assign(host_rows, generations, wanted, limit, cycle, width)
        assert_result(result, want, width)
        assert_state(result[0], model)
        pool = result[0]
        yield before, result, (host_rows, generations, wanted)


@pytest.mark.parametrize("seed", range(10))
def test_a_trace_within_its_limits_is_that_of_the_model(seed):
    recalled = 0
    for _, (_, copies, _, missing), _ in run(seed, 80, 10, overfull=False):
        assert missing == 0
        recalled += int(copies.count)
    assert recalled > 50


@pytest.mark.parametrize("seed", range(6))
def test_what_does_not_fit_is_counted_and_the_rest_is_right(seed):
    short = [int(missing) for _, (*_, missing), _ in run(100 + seed, 60, 4, overfull=True)]
    assert 0 in short and max(short) > 3


def test_the_bytes_of_every_page_in_the_table_are_those_of_its_host_row():
    content = np.full((SLOTS, 2), -1)  # of each slot: host row and generation, as copied
    for _, (pool, copies, table, _), (host_rows, generations, _) in run(7, 80, 10, overfull=False):
        n = int(copies.count)
        src, dst = np.asarray(copies.src)[:n], np.asarray(copies.dst)[:n]
        content[dst] = np.stack([src, generations[src]], 1)
        content[np.asarray(pool.host_row) < 0] = -1  # poison: nobody may read an empty slot
        pages, slots = np.asarray(table.pages), np.asarray(table.slots)
        for b, k in np.argwhere(pages >= 0):
            row = host_rows[b, pages[b, k]]
            assert content[slots[b, k]].tolist() == [row, generations[row]]


class Pool:
    """A pool whose every row has the given host rows as its first pages."""

    def __init__(self, *host_rows):
        self.map, self.cycle = pool_map.empty_pool(SLOTS), -1
        self.host_rows = np.full(SHAPE, -1, np.int32)
        for b, row in enumerate(host_rows):
            self.host_rows[b, : len(row)] = row

    def want(self, *pages, limit=SLOTS):
        """One cycle: the logical pages wanted of each row. Copies (host row, slot), and table."""
        wanted, self.cycle = np.zeros(SHAPE, bool), self.cycle + 1
        for b, row in enumerate(pages):
            wanted[b, row] = True
        generations = np.zeros(HOSTS, np.int32)
        self.map, copies, table, missing = assign(
            self.map, self.host_rows, generations, wanted, limit, self.cycle, width=10
        )
        assert missing == 0
        pairs = zip(copies.src.tolist(), copies.dst.tolist(), strict=True)
        return list(pairs)[: int(copies.count)], table.slots.tolist()


def test_pages_wanted_again_cost_nothing_and_rows_share_slots():
    pool = Pool([4, 5, 6], [4, 5, 7])
    copies, table = pool.want([0, 1, 2], [0, 1, 2])
    assert copies == [(4, 0), (5, 1), (6, 2), (7, 3)]
    assert table[0][:4] == [0, 1, 2, -1] and table[1][:4] == [0, 1, 3, -1]
    assert pool.want()[0] == []
    assert pool.want([0, 1, 2], [0, 1, 2]) == ([], table)


def test_the_least_recently_wanted_page_goes_first_not_the_first_recalled():
    pool = Pool(range(6))
    for pages in ([0, 1, 2], [0], [0, 2]):
        pool.want(pages, limit=3)
    assert [pool.want([page], limit=3)[0] for page in (3, 4, 5)] == [
        [(3, 1)],
        [(4, 0)],  # pages 0 and 2 are of one age: the lower slot
        [(5, 2)],
    ]


def test_a_smaller_limit_empties_the_slots_beyond_it():
    pool = Pool(range(6))
    pool.want(range(6), limit=6)
    copies, table = pool.want([4, 5], limit=2)
    assert copies == [(4, 0), (5, 1)] and table[0][:3] == [0, 1, -1]
    assert pool.map.host_row.tolist() == [4, 5] + [-1] * 10


@pytest.mark.slow  # every operation is compiled by itself
def test_calling_without_jit_gives_the_same():
    assert len(list(run(3, 12, 10, overfull=False, call=pool_map.assign))) == 12


def test_no_array_is_larger_than_the_inputs_at_true_sizes():
    slots, hosts, shape = 20_000, 1_000_000, (4, 4096)
    arrays = jax.eval_shape(
        lambda: (
            pool_map.empty_pool(slots),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(hosts, jnp.int32),
            jnp.zeros(shape, bool),
        )
    )
    closed = jax.make_jaxpr(functools.partial(pool_map.assign, width=4096))(*arrays, 10, 1)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars)
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    assert max(sizes(closed.jaxpr)) <= hosts + 1
