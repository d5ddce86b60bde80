"""Links relocatable objects into a shared object, so that compiling a model needs neither a C compiler nor a
linker.

LLVM leaves ELF objects; the loader wants a shared object. What stands between is small for code like
ours (position independent, no thread-local data, no constructors): place the sections, fill in the addresses,
and write the table of what the loader fills in. A linker from a package would weigh 37 to 413 MB, and `ld`
cannot be counted on. Everything that this linker does not know raises an error that names it. The result
depends on the input bytes only.

Every name that the objects define is bound inside, whatever else is loaded in the process; only names that
start with `EXPORT` are visible from outside. Formats: System V ABI, chapters 4 and 5
(https://gabi.xinuos.com); what differs from machine to machine is in `relocations`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from .relocations import MACHINES, Machine
from .relocations import linking_failed as _fail

EXPORT = "llmc_"
NEEDED = ("libm.so.6", "libc.so.6")

_PROGBITS, _RELA, _NOBITS, _SYMTAB = 1, 4, 8, 2
_WRITE, _ALLOC, _EXEC, _TLS = 1, 2, 4, 0x400
_UNDEFINED, _ABSOLUTE, _COMMON = 0, 0xFFF1, 0xFFF2
_LOCAL, _GLOBAL, _WEAK = 0, 1, 2
_FUNC = 2

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")


@dataclass
class _Section:
    """A section of an input object that takes part in the result."""

    name: str
    flags: int
    size: int
    alignment: int
    data: bytes
    """Empty for zero-filled sections."""
    relocations: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(offset, kind, symbol number, addend)."""
    address: int = 0

    @property
    def zero_filled(self) -> bool:
        return self.size > 0 and not self.data


@dataclass
class _Symbol:
    name: str
    binding: int
    kind: int
    section: _Section | None
    value: int
    size: int
    defined: bool


@dataclass
class _Object:
    machine: int
    sections: list[_Section]
    symbols: list[_Symbol]


def _text(table: bytes, offset: int) -> str:
    return table[offset : table.index(b"\0", offset)].decode()


def _parse(data: bytes) -> _Object:
    if data[:6] != b"\x7fELF\x02\x01":
        raise _fail("the object is no 64-bit little-endian ELF file")
    fields = _HEADER.unpack_from(data)
    kind, machine, table, size, count, names_index = (
        fields[1],
        fields[2],
        fields[6],
        fields[11],
        fields[12],
        fields[13],
    )
    if kind != 1 or machine not in MACHINES:
        known = " or ".join(one.name for one in MACHINES.values())
        raise _fail(f"the object is of type {kind} for machine {machine}, not relocatable {known}")
    headers = [_SECTION.unpack_from(data, table + i * size) for i in range(count)]
    names = data[headers[names_index][4] :]
    kept: dict[int, _Section] = {}
    for i, (name, section_kind, flags, _, offset, length, _, _, alignment, _) in enumerate(headers):
        text = _text(names, name)
        if not flags & _ALLOC or text.startswith(".eh_frame") or not length:
            continue  # debug information, unwinding tables (nothing here throws), empty sections
        if section_kind not in (_PROGBITS, _NOBITS) or flags & _TLS:
            raise _fail(f"section {text} of kind {section_kind} and flags {flags:#x} is not supported")
        content = b"" if section_kind == _NOBITS else data[offset : offset + length]
        kept[i] = _Section(text, flags, length, max(1, alignment), content)
    symbols = _symbols(data, headers, kept)
    for header in headers:
        if header[1] == _RELA and header[7] in kept:
            for at in range(header[4], header[4] + header[5], _RELOCATION.size):
                offset, info, addend = _RELOCATION.unpack_from(data, at)
                kept[header[7]].relocations.append((offset, info & 0xFFFFFFFF, info >> 32, addend))
    return _Object(machine, list(kept.values()), symbols)


def _symbols(data: bytes, headers: Sequence[tuple[int, ...]], kept: dict[int, _Section]) -> list[_Symbol]:
    found: list[_Symbol] = []
    for header in headers:
        if header[1] != _SYMTAB:
            continue
        strings = data[headers[header[6]][4] :]
        for at in range(header[4], header[4] + header[5], _SYMBOL.size):
            name, info, _, index, value, size = _SYMBOL.unpack_from(data, at)
            if index in (_ABSOLUTE, _COMMON) and info >> 4 != _LOCAL:
                raise _fail(f"symbol {_text(strings, name)} is absolute or common")
            section = kept.get(index)
            defined = index != _UNDEFINED and section is not None
            found.append(_Symbol(_text(strings, name), info >> 4, info & 15, section, value, size, defined))
    return found


class _Linker:
    def __init__(self, objects: Sequence[_Object]) -> None:
        machines = sorted({obj.machine for obj in objects})
        if len(machines) != 1:
            names = " and ".join(MACHINES[number].name for number in machines)
            raise _fail(f"objects for {names or 'no machine'} make no library")
        self.machine: Machine = MACHINES[machines[0]]
        self.objects = objects
        self.table: dict[str, _Symbol] = {}
        self.imports: list[str] = []
        self.got: dict[str, int] = {}
        """Name → slot; undefined names and global definitions that code reaches through the table."""
        self.stubs: dict[str, int] = {}
        self.dynamic_relocations: list[tuple[int, int, int]] = []

    # -- symbols -------------------------------------------------------------------------------------------
    def resolve(self) -> None:
        """One definition for each name (a strong one wins over weak ones), and what nobody defines."""
        for obj in self.objects:
            for symbol in obj.symbols:
                if symbol.binding == _LOCAL or not symbol.defined:
                    continue
                old = self.table.get(symbol.name)
                if old is not None and _GLOBAL == old.binding == symbol.binding:
                    raise _fail(f"{symbol.name} is defined twice")
                if old is None or (old.binding == _WEAK and symbol.binding == _GLOBAL):
                    self.table[symbol.name] = symbol
        for obj in self.objects:
            for section in obj.sections:
                for _, kind, number, _ in section.relocations:
                    self._reserve(obj.symbols[number], kind)

    def _reserve(self, symbol: _Symbol, kind: int) -> None:
        """Slots of the offset table and call stubs that a relocation needs."""
        target = self._target(symbol)
        if target is None:
            if symbol.name not in self.imports:
                self.imports.append(symbol.name)
            if kind in self.machine.calls:
                self.stubs.setdefault(symbol.name, len(self.stubs))
        through_table = kind in self.machine.through_table
        if through_table or (target is None and kind in self.machine.calls):
            if symbol.binding == _LOCAL:
                raise _fail(f"local symbol {symbol.name} is reached through the offset table")
            self.got.setdefault(symbol.name, len(self.got))

    def _target(self, symbol: _Symbol) -> _Symbol | None:
        if symbol.binding != _LOCAL:
            return self.table.get(symbol.name)
        if not symbol.defined:
            raise _fail(f"local symbol {symbol.name or '(section)'} stands in a section that is left out")
        return symbol

    @property
    def exports(self) -> list[str]:
        return sorted(name for name in self.table if name.startswith(EXPORT))

    # -- layout --------------------------------------------------------------------------------------------
    def place(self, sections: Sequence[_Section], start: int) -> int:
        for section in sections:
            start = _up(start, section.alignment)
            section.address = start
            start += section.size
        return start

    def of_kind(self, flags: int, zero_filled: bool = False) -> list[_Section]:
        return [
            section
            for obj in self.objects
            for section in obj.sections
            if section.flags & (_WRITE | _EXEC) == flags and section.zero_filled == zero_filled
        ]

    def copy_sections(self, image: bytearray) -> None:
        for obj in self.objects:
            for section in obj.sections:
                image[section.address : section.address + len(section.data)] = section.data

    # -- addresses -----------------------------------------------------------------------------------------
    def relocate(self, image: bytearray) -> None:
        """Fill in every address; what only the loader knows goes to `dynamic_relocations`."""
        for obj in self.objects:
            for section in obj.sections:
                for offset, kind, number, addend in section.relocations:
                    self._apply(image, section.address + offset, kind, obj.symbols[number], addend)
        for name, slot in self.got.items():
            at = self.got_address + 8 * slot
            target = self.table.get(name)
            if target is None:
                number = self.imports.index(name) + 1
                self.dynamic_relocations.append((at, number << 32 | self.machine.global_data, 0))
            else:
                self.dynamic_relocations.append((at, self.machine.relative, _address(target)))
        for name in self.stubs:
            at = self._stub(name)
            code = self.machine.stub(at, self.got_address + 8 * self.got[name])
            image[at : at + len(code)] = code

    def _stub(self, name: str) -> int:
        return self.stub_address + self.machine.stub_size * self.stubs[name]

    def _apply(self, image: bytearray, place: int, kind: int, symbol: _Symbol, addend: int) -> None:
        target = self._target(symbol)
        if kind == self.machine.absolute:
            if target is None:
                entry = (place, self.imports.index(symbol.name) + 1 << 32 | kind, addend)
            else:
                entry = (place, self.machine.relative, _address(target) + addend)
            self.dynamic_relocations.append(entry)
            return
        if kind in self.machine.through_table:
            value = self.got_address + 8 * self.got[symbol.name]
        elif target is not None:
            value = _address(target)
        elif kind in self.machine.calls:
            value = self._stub(symbol.name)
        else:
            raise _fail(f"relocation {kind} against {symbol.name}, which is not defined, is not supported")
        if not self.machine.apply(image, place, kind, value + addend):
            raise _fail(f"relocation {kind} against {symbol.name} is not supported")

    @property
    def relocation_count(self) -> int:
        """How many `dynamic_relocations` there will be: room is made for them before addresses are known."""
        kinds = [kind for obj in self.objects for s in obj.sections for _, kind, _, _ in s.relocations]
        absolute = kinds.count(self.machine.absolute)
        return len(self.got) + absolute

    def write_relocations(self, image: bytearray, at: int) -> None:
        """The loader's table; relative ones first, in the order of their places."""
        entries = sorted(self.dynamic_relocations, key=lambda e: (e[1] != self.machine.relative, e[0]))
        for i, entry in enumerate(entries):
            _RELOCATION.pack_into(image, at + i * _RELOCATION.size, *entry)

    got_address = 0
    stub_address = 0


def _address(symbol: _Symbol) -> int:
    assert symbol.section is not None
    return symbol.section.address + symbol.value


def _up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def _string_table(names: Sequence[str]) -> tuple[bytes, dict[str, int]]:
    """Names one after the other, the first of which is empty, and where each begins."""
    table = b"\0"
    offsets = {"": 0}
    for name in names:
        offsets[name] = len(table)
        table += name.encode() + b"\0"
    return table, offsets


def _hash(name: str) -> int:
    """System V ABI, chapter 5, "Hash Table"."""
    h = 0
    for c in name.encode():
        h = (h << 4) + c
        h = (h ^ (h & 0xF0000000) >> 24) & 0x0FFFFFFF
    return h


def _hash_table(names: Sequence[str]) -> bytes:
    """Names of the dynamic symbols, the first of which is empty → DT_HASH."""
    buckets = [0] * max(1, len(names) // 2)
    chain = [0] * len(names)
    for i, name in enumerate(names):
        if name:
            b = _hash(name) % len(buckets)
            chain[i], buckets[b] = buckets[b], i
    return struct.pack(f"<{2 + len(buckets) + len(chain)}I", len(buckets), len(chain), *buckets, *chain)


def link(objects: Sequence[bytes]) -> bytes:
    """Relocatable objects of one machine → a shared object that exports the names starting with `EXPORT`.

    Raises CompileError for anything that it does not know, and for a name that two objects define.
    """
    linker = _Linker([_parse(data) for data in objects])
    linker.resolve()
    page = linker.machine.page
    names = ["", *linker.imports, *linker.exports]
    strings, offsets = _string_table((*names[1:], *NEEDED))
    hashes = _hash_table(names)
    relocation_count = linker.relocation_count
    # Read-only: tables of the loader and constants. Then code. Then what the loader fills in. Then data.
    symbols_at = _up(_HEADER.size + 7 * _PROGRAM.size, 64)
    hashes_at = symbols_at + _SYMBOL.size * len(names)
    strings_at = hashes_at + len(hashes)
    relocations_at = _up(strings_at + len(strings), 8)
    constants_end = linker.place(linker.of_kind(0), relocations_at + _RELOCATION.size * relocation_count)
    linker.stub_address = code_at = _up(constants_end, page)
    code_end = linker.place(linker.of_kind(_EXEC), code_at + linker.machine.stub_size * len(linker.stubs))
    dynamic_at = data_at = _up(code_end, page)
    entries = 13 + len(NEEDED)
    linker.got_address = dynamic_at + 16 * entries
    fixed = [s for s in linker.of_kind(_WRITE) if s.name.startswith(".data.rel.ro")]
    fixed_end = _up(linker.place(fixed, linker.got_address + 8 * len(linker.got)), page)
    data_end = linker.place([s for s in linker.of_kind(_WRITE) if s not in fixed], fixed_end)
    memory_end = linker.place(linker.of_kind(_WRITE, zero_filled=True), data_end)

    image = bytearray(data_end)
    linker.copy_sections(image)
    linker.relocate(image)
    assert len(linker.dynamic_relocations) == relocation_count
    for i, name in enumerate(names[1:], 1):
        image[symbols_at + i * 24 : symbols_at + i * 24 + 24] = _dynamic_symbol(linker, name, offsets[name])
    image[hashes_at : hashes_at + len(hashes)] = hashes
    image[strings_at : strings_at + len(strings)] = strings
    linker.write_relocations(image, relocations_at)
    tags = [(1, offsets[name]) for name in NEEDED]
    tags += [(4, hashes_at), (5, strings_at), (6, symbols_at), (10, len(strings)), (11, _SYMBOL.size)]
    tags += [(7, relocations_at), (8, _RELOCATION.size * relocation_count), (9, _RELOCATION.size)]
    tags += [(30, 8), (0x6FFFFFFB, 1), (0, 0)]  # resolve everything when it is loaded
    assert len(tags) <= entries
    for i, tag in enumerate(tags):
        struct.pack_into("<qQ", image, dynamic_at + 16 * i, *tag)
    _write_headers(
        image,
        [
            (1, 4, 0, constants_end, constants_end, page),
            (1, 5, code_at, code_end - code_at, code_end - code_at, page),
            (1, 6, data_at, data_end - data_at, memory_end - data_at, page),
            (2, 6, dynamic_at, 16 * len(tags), 16 * len(tags), 8),
            (0x6474E552, 4, dynamic_at, fixed_end - dynamic_at, fixed_end - dynamic_at, 1),
            (0x6474E551, 6, 0, 0, 0, 16),  # the stack is not executable
        ],
        linker.machine.number,
    )
    return bytes(image)


def _dynamic_symbol(linker: _Linker, name: str, at: int) -> bytes:
    symbol = linker.table.get(name)
    if symbol is None:
        return _SYMBOL.pack(at, _GLOBAL << 4, 0, _UNDEFINED, 0, 0)
    # There are no section headers; any defined index will do for the loader.
    return _SYMBOL.pack(at, _GLOBAL << 4 | symbol.kind, 0, 1, _address(symbol), symbol.size)


def _write_headers(
    image: bytearray, segments: Sequence[tuple[int, int, int, int, int, int]], machine: int
) -> None:
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    fields = (3, machine, 1, 0, _HEADER.size, 0, 0, _HEADER.size, _PROGRAM.size, len(segments), 64, 0, 0)
    _HEADER.pack_into(image, 0, ident, *fields)
    for i, (kind, flags, at, size, memory, alignment) in enumerate(segments):
        _PROGRAM.pack_into(
            image, _HEADER.size + i * _PROGRAM.size, kind, flags, at, at, at, size, memory, alignment
        )
