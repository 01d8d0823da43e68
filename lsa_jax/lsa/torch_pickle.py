"""Reads the pickle of a torch checkpoint as data; nothing that it names is ever imported or called.

Python's unpickler, and torch's, call what a file names. This is a stack machine of our own over
the opcodes that such files use: a name outside a short table is refused where it is pushed, and
those in the table only make inert values here. Tensors come out as descriptions of where their
elements lie in the archive.
"""

import dataclasses
import pickletools
import warnings
from collections.abc import Callable
from typing import Any

from lsa_jax.config_checks import shown

MAX_PICKLE_BYTES = 16 << 20  # of a checkpoint's structure; tensors' bytes are not in it


class PickleError(ValueError):
    """A pickle that is no plain torch checkpoint; the message says what stands in the way."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """Elements of one type, in archive member `data/KEY`; `kind` as in torch.FloatStorage."""

    kind: str
    key: str
    numel: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Opaque:
    """A harmless value that no indexer needs, such as a NumPy scalar among training metrics."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Name:
    """A name of the table, as pushed by the pickle; `build` makes its value from arguments."""

    name: str
    build: Callable[..., object] | None = None


_KINDS = ("Float", "Half", "BFloat16", "Double", "ComplexFloat", "ComplexDouble")
_KINDS += ("Long", "Int", "Short", "Char", "Byte", "Bool")


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise PickleError(what)


def _counts(value: object) -> bool:
    return isinstance(value, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _tensor(storage: object, offset: object, shape: Any, strides: Any, *_: object) -> StoredTensor:
    good = isinstance(storage, Storage) and _counts((offset,)) and _counts(shape)
    _require(good and _counts(strides) and len(shape) == len(strides), "has a malformed tensor")
    assert isinstance(storage, Storage) and isinstance(offset, int)
    return StoredTensor(storage, offset, shape, strides)


def _parameter(data: object, *_: object) -> object:
    _require(isinstance(data, StoredTensor), "has a parameter that is no tensor")
    return data


def _empty_dict(*arguments: object) -> dict[Any, Any]:
    _require(not arguments, "has a collections.OrderedDict made from arguments")
    return {}


def _opaque(name: str) -> _Name:
    return _Name(name, lambda *_: Opaque(name))


_TABLE = {
    entry.name: entry
    for entry in (
        _Name("collections.OrderedDict", _empty_dict),
        _Name("torch._utils._rebuild_tensor_v2", _tensor),
        _Name("torch._utils._rebuild_parameter", _parameter),
        _Name("torch.Size", lambda dims=(): dims),
        *(_Name(f"torch.{kind}Storage") for kind in _KINDS),
        *map(_opaque, ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")),
        *map(_opaque, ("numpy.dtype", "_codecs.encode", "argparse.Namespace")),
    )
}

_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_STRINGS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES")
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NO_EFFECT = frozenset(("PROTO", "FRAME"))


class _Machine:
    """The pickle's stack, its stacks below open marks, and its memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        _require(bool(self.stack), "takes a value from an empty stack")
        return self.stack.pop()

    def top(self, kind: type, doing: str) -> Any:
        _require(bool(self.stack) and type(self.stack[-1]) is kind, f"{doing} no {kind.__name__}")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        _require(bool(self.below), "closes a mark that it has not opened")
        items, self.stack = self.stack, self.below.pop()
        return items

    def push_name(self, name: str) -> None:
        known = name in _TABLE
        _require(known, f"names {shown(name)}, which is refused: nothing of a file is run")
        self.stack.append(_TABLE[name])

    def op_MARK(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def op_EMPTY_LIST(self, _: Any) -> None:
        self.stack.append([])

    def op_EMPTY_DICT(self, _: Any) -> None:
        self.stack.append({})

    def op_TUPLE(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def op_APPEND(self, _: Any) -> None:
        item = self.pop()
        self.top(list, "appends to").append(item)

    def op_APPENDS(self, _: Any) -> None:
        items = self.pop_mark()
        self.top(list, "appends to").extend(items)

    def op_SETITEM(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def op_SETITEMS(self, _: Any) -> None:
        self.set_items(self.pop_mark())

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict, "sets items of")
        keys, values = items[::2], items[1::2]
        _require(len(keys) == len(values), "sets an item without a value")
        plain = all(key is None or type(key) in (str, int, float, bool) for key in keys)
        _require(plain, "has a dictionary with a key that is no string or number")
        target.update(zip(keys, values, strict=True))

    def op_MEMOIZE(self, _: Any) -> None:
        self.op_BINPUT(len(self.memo))

    def op_BINPUT(self, index: int) -> None:
        _require(bool(self.stack), "remembers a value of an empty stack")
        self.memo[index] = self.stack[-1]

    def op_BINGET(self, index: int) -> None:
        _require(index in self.memo, f"recalls value {index}, which it has not remembered")
        self.stack.append(self.memo[index])

    op_LONG_BINPUT, op_LONG_BINGET = op_BINPUT, op_BINGET

    def op_GLOBAL(self, name: str) -> None:
        self.push_name(".".join(name.split(" ", 1)))

    def op_STACK_GLOBAL(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        _require(type(name) is str and type(module) is str, "names something by no string")
        self.push_name(f"{module}.{name}")

    def op_REDUCE(self, _: Any) -> None:
        arguments, made = self.pop(), self.pop()
        build = made.build if isinstance(made, _Name) else None
        if build is None or type(arguments) is not tuple:
            raise PickleError("calls something that cannot be called")
        try:
            self.stack.append(build(*arguments))
        except TypeError:
            raise PickleError(f"calls {made.name} with {len(arguments)} arguments") from None

    def op_NEWOBJ(self, _: Any) -> None:
        arguments, made = self.pop(), self.pop()
        known = isinstance(made, _Name) and made.name == "argparse.Namespace" and arguments == ()
        _require(known, "makes an object of a class that is not argparse.Namespace")
        self.stack.append(Opaque(made.name))

    def op_BUILD(self, _: Any) -> None:
        """Drops the state: attributes of state dicts, contents of opaque values."""
        self.pop()
        known = bool(self.stack) and type(self.stack[-1]) in (dict, Opaque)
        _require(known, "sets the state of something that is no dictionary")

    def op_BINPERSID(self, _: Any) -> None:
        pid = self.pop()
        good = type(pid) is tuple and len(pid) == 5 and pid[0] == "storage"
        kind = pid[1].name if good and isinstance(pid[1], _Name) else ""
        good = good and kind.endswith("Storage") and type(pid[2]) is str and _counts((pid[4],))
        _require(good, "has a malformed reference to a storage")
        self.stack.append(Storage(kind.removeprefix("torch.").removesuffix("Storage"), *pid[2::2]))


def read_pickle(data: bytes) -> object:
    """The value of a pickle: dicts, lists, tuples, strings, numbers, StoredTensor and Opaque.

    Raises PickleError for anything else, naming it, and for a pickle that is cut short or damaged.
    """
    _require(len(data) <= MAX_PICKLE_BYTES, f"has {len(data)} bytes, over {MAX_PICKLE_BYTES}")
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # odd escapes in damaged names
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name == "STOP":
                    return machine.pop()
                _step(machine, opcode.name, argument)
    except PickleError:
        raise
    except (ValueError, OverflowError) as why:
        raise PickleError(f"is cut short or damaged ({' '.join(str(why).split())})") from None
    raise PickleError("is cut short: it does not end")


def _step(machine: _Machine, name: str, argument: Any) -> None:
    if name in _NO_EFFECT:
        return
    if name in _LITERALS:
        machine.stack.append(_LITERALS[name])
    elif name in _NUMBERS or name in _STRINGS:
        machine.stack.append(argument)
    elif name in _TUPLES:
        items = [machine.pop() for _ in range(_TUPLES[name])]
        machine.stack.append(tuple(reversed(items)))
    else:
        run = getattr(machine, f"op_{name}", None)
        what = f" with {shown(argument)}" if isinstance(argument, str) else ""
        _require(run is not None, f"has opcode {name}{what}, which no checkpoint needs")
        assert run is not None
        run(argument)
