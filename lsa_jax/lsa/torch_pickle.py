"""Reads the pickle of a torch checkpoint as data; nothing that it names is ever imported or called.

Python's unpickler, and torch's, call what a file names. This is a stack machine of our own over
the opcodes that such files use: a name outside a short table is refused where it is pushed, and
those in the table only make inert values here. Tensors come out as descriptions of where their
elements lie in the archive. Other files of torch's, with a table of their own, use `read_stream`.
"""

import abc
import dataclasses
import io
import mmap
import pickletools
import warnings
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

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


class Stateful(abc.ABC):
    """A value that the pickle completes after it was made, with what Python calls its state."""

    @abc.abstractmethod
    def set_state(self, state: object) -> None:
        """Takes the state, or raises PickleError."""


@dataclasses.dataclass(frozen=True)
class Name:
    """What a pickle may name; `build` makes an inert value from the arguments it is called with."""

    name: str
    build: Callable[..., object] | None = None


_KINDS = ("Float", "Half", "BFloat16", "Double", "ComplexFloat", "ComplexDouble")
_KINDS += ("Long", "Int", "Short", "Char", "Byte", "Bool")


def require(ok: bool, what: str) -> None:
    """Raises PickleError with `what` where something is not as it must be."""
    if not ok:
        raise PickleError(what)


def _counts(value: object) -> bool:
    return isinstance(value, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _tensor(storage: object, offset: object, shape: Any, strides: Any, *_: object) -> StoredTensor:
    good = isinstance(storage, Storage) and _counts((offset,)) and _counts(shape)
    require(good and _counts(strides) and len(shape) == len(strides), "has a malformed tensor")
    assert isinstance(storage, Storage) and isinstance(offset, int)
    return StoredTensor(storage, offset, shape, strides)


def _parameter(data: object, *_: object) -> object:
    require(isinstance(data, StoredTensor), "has a parameter that is no tensor")
    return data


def _empty_dict(*arguments: object) -> dict[Any, Any]:
    require(not arguments, "has a collections.OrderedDict made from arguments")
    return {}


def _opaque(name: str) -> Name:
    return Name(name, lambda *_: Opaque(name))


CHECKPOINT_NAMES: Mapping[str, Name] = {
    entry.name: entry
    for entry in (
        Name("collections.OrderedDict", _empty_dict),
        Name("torch._utils._rebuild_tensor_v2", _tensor),
        Name("torch._utils._rebuild_parameter", _parameter),
        Name("torch.Size", lambda dims=(): dims),
        *(Name(f"torch.{kind}Storage") for kind in _KINDS),
        *map(_opaque, ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")),
        *map(_opaque, ("numpy.dtype", "_codecs.encode", "argparse.Namespace")),
    )
}

_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_STRINGS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES")
_STRINGS += ("BINBYTES8", "BYTEARRAY8")
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NO_EFFECT = frozenset(("PROTO", "FRAME"))


class _Machine:
    """The pickle's stack, its stacks below open marks, and its memo."""

    def __init__(self, names: Mapping[str, Name]) -> None:
        self.names = names
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        require(bool(self.stack), "takes a value from an empty stack")
        return self.stack.pop()

    def top(self, kind: type, doing: str) -> Any:
        require(bool(self.stack) and type(self.stack[-1]) is kind, f"{doing} no {kind.__name__}")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        require(bool(self.below), "closes a mark that it has not opened")
        items, self.stack = self.stack, self.below.pop()
        return items

    def push_name(self, name: str) -> None:
        known = name in self.names
        require(known, f"names {shown(name)}, which is refused: nothing of a file is run")
        self.stack.append(self.names[name])

    def near(self) -> str:
        """Words for the item of the outermost dictionary that is being read, if any."""
        items = [*self.below, self.stack][1] if self.below else []
        keys = [item for item in items if type(item) is str]
        return f" near {shown(keys[-1])}" if keys else ""

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
        require(len(keys) == len(values), "sets an item without a value")
        plain = all(key is None or type(key) in (str, int, float, bool) for key in keys)
        require(plain, "has a dictionary with a key that is no string or number")
        target.update(zip(keys, values, strict=True))

    def op_MEMOIZE(self, _: Any) -> None:
        self.op_BINPUT(len(self.memo))

    def op_BINPUT(self, index: int) -> None:
        require(bool(self.stack), "remembers a value of an empty stack")
        self.memo[index] = self.stack[-1]

    def op_BINGET(self, index: int) -> None:
        require(index in self.memo, f"recalls value {index}, which it has not remembered")
        self.stack.append(self.memo[index])

    op_LONG_BINPUT, op_LONG_BINGET = op_BINPUT, op_BINGET

    def op_GLOBAL(self, name: str) -> None:
        self.push_name(".".join(name.split(" ", 1)))

    def op_STACK_GLOBAL(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        require(type(name) is str and type(module) is str, "names something by no string")
        self.push_name(f"{module}.{name}")

    def op_REDUCE(self, _: Any) -> None:
        arguments, made = self.pop(), self.pop()
        build = made.build if isinstance(made, Name) else None
        if build is None or type(arguments) is not tuple:
            raise PickleError("calls something that cannot be called")
        try:
            self.stack.append(build(*arguments))
        except TypeError:
            raise PickleError(f"calls {made.name} with {len(arguments)} arguments") from None

    def op_NEWOBJ(self, _: Any) -> None:
        arguments, made = self.pop(), self.pop()
        known = isinstance(made, Name) and made.name == "argparse.Namespace" and arguments == ()
        require(known, "makes an object of a class that is not argparse.Namespace")
        self.stack.append(Opaque(made.name))

    def op_BUILD(self, _: Any) -> None:
        """Gives a Stateful its state; drops attributes of dicts and contents of opaque values."""
        state = self.pop()
        target = self.stack[-1] if self.stack else None
        if isinstance(target, Stateful):
            target.set_state(state)
        else:
            known = type(target) in (dict, Opaque)
            require(known, "sets the state of something that is no dictionary")

    def op_BINPERSID(self, _: Any) -> None:
        pid = self.pop()
        # The sixth, of torch's format without an archive, is for views of storages: not written.
        good = type(pid) is tuple and (len(pid) == 5 or (len(pid) == 6 and pid[5] is None))
        good = good and pid[0] == "storage"
        kind = pid[1].name if good and isinstance(pid[1], Name) else ""
        good = good and kind.endswith("Storage") and type(pid[2]) is str and _counts((pid[4],))
        require(good, "has a malformed reference to a storage")
        self.stack.append(Storage(kind.removeprefix("torch.").removesuffix("Storage"), *pid[2::2]))


def read_pickle(data: bytes) -> object:
    """The value of a checkpoint's pickle: dicts, lists, tuples, strings, numbers, StoredTensor and
    Opaque. Raises PickleError as `read_stream` does.
    """
    require(len(data) <= MAX_PICKLE_BYTES, f"has {len(data)} bytes, over {MAX_PICKLE_BYTES}")
    return read_stream(io.BytesIO(data))


def read_stream(
    stream: io.BytesIO | mmap.mmap, names: Mapping[str, Name] = CHECKPOINT_NAMES
) -> object:
    """The value of the pickle at a stream's position, which moves to the pickle's end.

    Raises PickleError for anything that is neither plain nor in `names`, naming it, and for a
    pickle that is cut short or damaged. Counts in it need not be true: these streams allocate no
    more for a read than they have left.
    """
    machine = _Machine(names)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # odd escapes in damaged names
            for opcode, argument, _ in pickletools.genops(cast(IO[bytes], stream)):
                if opcode.name == "STOP":
                    return machine.pop()
                _step(machine, opcode.name, argument)
    except PickleError:
        raise
    except (ValueError, OverflowError) as why:
        fault = f"is cut short or damaged{machine.near()} ({' '.join(str(why).split())})"
        raise PickleError(fault) from None
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
        require(run is not None, f"has opcode {name}{what}, which no checkpoint needs")
        assert run is not None
        run(argument)
