"""Hostile pickles and archives: by the list of instructions, and by what a zip file can pretend."""

import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.pt_writer import write_archive, write_pt
from tests.support.small_models import apple_gru


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def long(count: int) -> bytes:
    return struct.pack("<Q", count)


Record = tuple[str | zipfile.ZipInfo, bytes]


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def attacks(path) -> dict[str, bytes]:
    """Pickles that make `path` when Python's own pickle module loads them, or use what such pickles use."""
    command = f"touch {path}"
    make = f"open({str(path)!r}, 'w')"
    run = text(make) + b"\x85R."
    return {
        "os.system": pickle.dumps(Touch(path), 2),
        "os.system, protocol 4": pickle.dumps(Touch(path), 4),
        "posix.system inside a dict": b"\x80\x02}" + text("w") + b"cposix\nsystem\n" + text(command)
        + b"\x85Rs.",
        "builtins.eval": b"\x80\x02cbuiltins\neval\n" + run,
        "__builtin__.eval": b"\x80\x02c__builtin__\neval\n" + run,
        "builtins.exec": b"\x80\x02cbuiltins\nexec\n" + run,
        "getattr chain": b"\x80\x02cbuiltins\ngetattr\ncbuiltins\n__import__\n" + text("os")
        + b"\x85R" + text("system") + b"\x86R" + text(command) + b"\x85R.",
        "getattr of a function": b"\x80\x02cbuiltins\ngetattr\nctorch._utils\n_rebuild_tensor_v2\n"
        + text("__globals__") + b"\x86R.",
        "getattr of a name in a string": b"\x80\x02cbuiltins\ngetattr\n" + text("_MEM_FORMAT_ENCODING")
        + text("__class__") + b"\x86R.",
        "dotted name, protocol 4": b"\x80\x04" + text("collections")
        + text("OrderedDict.__init__.__globals__") + b"\x93.",
        "dotted module": b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93"
        + text(command) + b"\x85R.",
        "torch.load": b"\x80\x02ctorch\nload\n" + text(str(path)) + b"\x85R.",
        "torch.hub": b"\x80\x02ctorch.hub\nload\n" + text("a/b") + text("c") + b"\x86R.",
        "copyreg": b"\x80\x02ccopy_reg\n_reconstructor\nccollections\nOrderedDict\nc__builtin__\nobject\n"
        b"N\x87R.",
        "copyreg.add_extension": b"\x80\x02ccopyreg\nadd_extension\n" + text("os") + text("system")
        + b"K\x07\x87R.",
        "extension registry 1": b"\x80\x02\x82\x07.",
        "extension registry 2": b"\x80\x02\x83\x07\x00.",
        "extension registry 4": b"\x80\x02\x84\x07\x00\x00\x00.",
        "INST": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "INST without string": b"(" + text(command) + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + text(command) + b"o.",
        "OBJ of an allowed class": b"(ccollections\nOrderedDict\no.",
        "NEWOBJ": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "NEWOBJ_EX": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
        "call of a called thing": b"\x80\x02ccollections\nOrderedDict\n)R)R.",
        "call of a string": b"\x80\x02" + text("os.system") + text(command) + b"\x85R.",
        "call of a storage": b"\x80\x02ctorch\nFloatStorage\n)R.",
        "call of a dtype": b"\x80\x02ctorch\nfloat32\n)R.",
        "OrderedDict with arguments": b"\x80\x02ccollections\nOrderedDict\n](\x85R.",
        "BUILD on a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}" + text("call") + b"K\x01sb.",
        "BUILD on a storage": b"\x80\x02ctorch\nFloatStorage\n}" + text("dtype") + text("F64") + b"sb.",
        "BUILD on a tuple": b"\x80\x02)}" + text("__class__") + b"K\x01sb.",
        "persistent id that is no tuple": b"\x80\x02" + text("storage") + b"Q.",
        "persistent id of another kind": b"\x80\x02(" + text("module") + b"ctorch\nFloatStorage\n" + text("0")
        + text("cpu") + b"K\x01tQ.",
        "persistent id, a string for its storage": b"\x80\x02(" + text("storage") + text("F32") + text("0")
        + text("cpu") + b"K\x01tQ.",
        "persistent id in text": b"\x80\x02Pstorage\n.",
        "parameter that is no tensor": b"\x80\x02ctorch._utils\n_rebuild_parameter\n" + text("x")
        + b"\x89N\x87R.",
        "memo slot of four billion": b"\x80\x02Nr\xff\xff\xff\xff.",
        "negative memo slot": b"\x80\x02Np-1\n.",
        "buffer": b"\x80\x05\x97.",
        "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
        "huge string": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b".",
        "list as a key": b"\x80\x02}]Ns.",
        "tuple as a key": b"\x80\x02})Ns.",
        "append to a dict": b"\x80\x02}Na.",
        "stack underflow": b"\x80\x02R.",
        "no STOP": b"\x80\x02N",
        "nothing": b"",
    }  # fmt: skip


# Instructions that make plain values: a pickle of each, whose value is Python's own.
PLAIN = {
    "INT": b"I5\n.", "BININT": b"J\5\0\0\0.", "BININT1": b"K\5.", "BININT2": b"M\5\0.", "LONG": b"L5L\n.",
    "LONG1": b"\x8a\1\5.", "LONG4": b"\x8b\1\0\0\0\5.", "BINBYTES": b"B\1\0\0\0a.",
    "SHORT_BINBYTES": b"C\1a.",
    "BINBYTES8": b"\x8e" + long(1) + b"a.", "BYTEARRAY8": b"\x96" + long(1) + b"a.", "NONE": b"N.",
    "NEWTRUE": b"\x88.", "NEWFALSE": b"\x89.", "UNICODE": b"Va\n.", "SHORT_BINUNICODE": b"\x8c\1a.",
    "BINUNICODE": text("a") + b".", "BINUNICODE8": b"\x8d" + long(1) + b"a.", "FLOAT": b"F1.5\n.",
    "BINFLOAT": b"G" + struct.pack(">d", 1.5) + b".", "EMPTY_LIST": b"].", "APPEND": b"]Na.",
    "APPENDS": b"](NNe.", "LIST": b"(Nl.", "EMPTY_TUPLE": b").", "TUPLE": b"(Nt.", "TUPLE1": b"N\x85.",
    "TUPLE2": b"NN\x86.", "TUPLE3": b"NNN\x87.", "EMPTY_DICT": b"}.", "DICT": b"(K\1Nd.",
    "SETITEM": b"}K\1Ns.",
    "SETITEMS": b"}(K\1Nu.", "EMPTY_SET": b"\x8f.", "ADDITEMS": b"\x8f(K\1\x90.", "FROZENSET": b"(K\1\x91.",
    "POP": b"NK\0010.", "DUP": b"N2\x86.", "MARK": b"K\1(N1.", "POP_MARK": b"K\1(N1.", "GET": b"Np0\n0g0\n.",
    "BINGET": b"Nq\0000h\0.", "LONG_BINGET": b"Nr\0\0\0\0000j\0\0\0\0.", "PUT": b"Np0\n.", "BINPUT": b"Nq\0.",
    "LONG_BINPUT": b"Nr\0\0\0\0.", "MEMOIZE": b"N\x94.", "PROTO": b"\x80\2N.", "STOP": b"N.",
    "FRAME": b"\x80\4\x95" + long(2) + b"N.",
}  # fmt: skip

# The others: a pickle of each, and what its refusal names.
REFUSED = {
    "GLOBAL": (b"cos\nsystem\n" + text("true") + b"\x85R.", "os.system"),
    "STACK_GLOBAL": (text("os") + text("system") + b"\x93.", "os.system"),
    "REDUCE": (b"cevil\nrun\n" + text("true") + b"\x85R.", "evil.run"),
    "BUILD": (b"ctorch\nFloatStorage\n}b.", "sets the state of an object"),
    "INST": (b"(S'true'\nios\nsystem\n.", "instruction STRING"),
    "OBJ": (b"(ccollections\nOrderedDict\no.", "instruction OBJ"),
    "NEWOBJ": (b"cevil\nThing\n)\x81.", "evil.Thing"),
    "NEWOBJ_EX": (b"cevil\nThing\n)}\x92.", "instruction NEWOBJ_EX"),
    "EXT1": (b"\x82\7.", "instruction EXT1"),
    "EXT2": (b"\x83\7\0.", "instruction EXT2"),
    "EXT4": (b"\x84\7\0\0\0.", "instruction EXT4"),
    "PERSID": (b"Pstorage\n.", "instruction PERSID"),
    "BINPERSID": (text("storage") + b"Q.", "BINPERSID"),
    "NEXT_BUFFER": (b"\x97.", "instruction NEXT_BUFFER"),
    "READONLY_BUFFER": (b"N\x98.", "instruction READONLY_BUFFER"),
    "STRING": (b"S'a'\n.", "instruction STRING"),
    "BINSTRING": (b"T\1\0\0\0a.", "instruction BINSTRING"),
    "SHORT_BINSTRING": (b"U\1a.", "instruction SHORT_BINSTRING"),
}


def _edited(path: Path, edit: Callable[[bytearray], None]) -> Path:
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)
    return path


def _records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zipped(path: Path, records: Sequence[Record], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records:
            archive.writestr(name, content)
    return path


def _directory(data: bytearray) -> int:
    """Where the list of records begins."""
    end = data.rindex(b"PK\5\6")
    return int(struct.unpack_from("<I", data, end + 16)[0])


def archives(folder: Path) -> dict[str, tuple[Path, str]]:
    """What a zip file can pretend: checkpoints that would convert without it, and what refusals say."""
    whole = write_pt(folder / "m.pt", apple_gru())
    records = _records(whole)
    code = records["m/data.pkl"]
    evil = b"\x80\2cos\nsystem\n" + text(f"touch {folder / 'executed'}") + b"\x85R."
    pairs: list[Record] = list(records.items())
    made: dict[str, tuple[Path, str]] = {}

    def add(name: str, said: str, path: Path) -> None:
        made[name] = path.rename(folder / f"{len(made)}.pt"), said

    def copied(edit: Callable[[bytearray], None]) -> Path:
        copy = folder / "copy"
        copy.write_bytes(whole.read_bytes())
        return _edited(copy, edit)

    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add("two pickles of one name", "damaged", _zipped(folder / "x", [*pairs, ("m/data.pkl", evil)]))
    add(
        "a second pickle in a folder of its own",
        "no data.pkl",
        _zipped(folder / "x", [*pairs, ("n/data.pkl", evil)]),
    )

    def first_named_otherwise(data: bytearray) -> None:
        place = data.index(b"m/data.pkl")
        data[place : place + 10] = b"m/date.pkl"

    add("a name in the directory that the record has not", "called otherwise", copied(first_named_otherwise))

    def ended_by_zero(data: bytearray) -> None:
        for place in (data.index(b"m/version"), data.rindex(b"m/version")):
            data[place : place + 9] = b"m/vers\0on"

    add("a name that ends at a zero byte", "called otherwise", copied(ended_by_zero))

    def overlapping(data: bytearray) -> None:
        at, places = _directory(data), []
        while data[at : at + 4] == b"PK\1\2":
            name, extra, comment = struct.unpack_from("<3H", data, at + 28)
            places.append(at)
            at += 46 + name + extra + comment
        # the second storage inside of the first, whose bytes hold a header for it
        one, two = places[2], places[3]
        offset = struct.unpack_from("<I", data, one + 42)[0]
        name = struct.unpack_from("<H", data, two + 28)[0]
        header = bytearray(30 + name)
        struct.pack_into("<4s", header, 0, b"PK\3\4")
        struct.pack_into("<H", header, 26, name)
        header[30:] = data[two + 46 : two + 46 + name]
        begin = offset + 30 + struct.unpack_from("<H", data, one + 28)[0]
        data[begin : begin + len(header)] = header
        struct.pack_into("<I", data, two + 42, begin)

    add("records that share their bytes", "lies inside another record", copied(overlapping))
    add("an archive after another one", "bytes stand before", copied(lambda data: data.__setitem__(
        slice(0, 0), _zipped(folder / "y", [("m/data.pkl", evil)]).read_bytes())))  # fmt: skip
    for name in ("../data.pkl", "m/data/../../x", "/etc/x", "m\\data\\0"):
        more = [(name if n == "m/data.pkl" and name.endswith(".pkl") else n, c) for n, c in records.items()]
        if not name.endswith(".pkl"):
            more.append((name, b"x"))
        add(f"a record called {name}", "file elsewhere", _zipped(folder / "x", more))
    add("compressed records", "compressed", _zipped(folder / "x", pairs, compression=zipfile.ZIP_DEFLATED))
    bomb: list[Record] = [("m/data.pkl", b"\x80\2N." + bytes(1 << 22))]
    add("a compressed bomb", "compressed", _zipped(folder / "x", bomb, compression=zipfile.ZIP_DEFLATED))
    add("LZMA", "compressed", _zipped(folder / "x", pairs, compression=zipfile.ZIP_LZMA))

    def encrypted(data: bytearray) -> None:
        at = _directory(data)
        while data[at : at + 4] == b"PK\1\2":
            data[at + 8] |= 1
            at += 46 + sum(struct.unpack_from("<3H", data, at + 28))

    add("encrypted records", "encrypted", copied(encrypted))

    def larger(data: bytearray) -> None:
        at = _directory(data)
        struct.pack_into("<2I", data, at + 20, 0x7FFFFFFF, 0x7FFFFFFF)

    add("a record longer than the file", "damaged", copied(larger))

    def farther(data: bytearray) -> None:
        struct.pack_into("<I", data, data.rindex(b"PK\1\2") + 42, 0x7FFFFFFF)

    add("a record beyond the file", "damaged", copied(farther))

    def many(data: bytearray) -> None:
        struct.pack_into("<2H", data, data.rindex(b"PK\5\6") + 8, 0xFFFE, 0xFFFE)
        struct.pack_into("<I", data, data.rindex(b"PK\5\6") + 12, 0x7FFFFFF0)

    add("a directory larger than the file", "damaged", copied(many))
    add(
        "a directory cut short", "damaged", copied(lambda data: data.__delitem__(slice(len(data) - 10, None)))
    )
    script = write_archive(folder / "s.pt", code, {"constants.pkl": evil, "code/m.py": b"import os"})
    add("TorchScript", "TorchScript", script)
    add(
        "a pickle in front of the archive",
        "old format",
        copied(lambda data: data.__setitem__(slice(0, 0), evil)),
    )
    running = [*{**records, "m/data.pkl": evil}.items()]
    add("a pickle that runs something", "os.system", _zipped(folder / "x", running))
    other = [*pairs, ("m/data.pkl/data.pkl", evil), ("m/DATA.PKL", evil), ("m/extra/data.pkl", evil)]
    link = zipfile.ZipInfo("m/data/link")
    link.external_attr = 0o120777 << 16
    made["harmless: other pickles, and a link, beside"] = (
        _zipped(folder / "beside.pt", [*other, (link, b"/etc")]),
        "",
    )
    return made
