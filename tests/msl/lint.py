"""What Metal forbids, or this project does, and the compilers here let pass.

Among them offsets in 32 bits: B T G D may pass 2^31, and no test here could store so much.

Works on words, not on a syntax tree: it can be fooled by macros (so a #define of more than a number is an
objection too), and knows only what is written here.
"""

import re
from collections.abc import Iterator

from ..support.msl.wrap import Wrapped, used_attributes
from . import preamble

SPACES = ("device", "threadgroup", "constant", "thread", "threadgroup_imageblock")

# Metal's keywords, and words of MSL that are types or qualifiers there.
RESERVED = {
    *SPACES,
    *("kernel", "vertex", "fragment", "mesh", "object", "visible", "intersection", "stitchable"),
    *("half", "bfloat", "sampler", "texture1d", "texture2d", "texture3d", "texturecube", "depth2d", "atomic"),
    *("patch_control_point", "ray_data", "object_data", "access", "packed_float3", "vec", "matrix", "array"),
}
FORBIDDEN = {
    r"\bdouble\b": "double does not exist in Metal",
    r"\bgoto\b": "goto does not exist in Metal",
    r"\b(new|delete|throw|try|catch|virtual|dynamic_cast|typeid|thread_local|asm|mutable)\b": "not in Metal",
    r"\bstd\s*::": "Metal has no std::",
    r"\[[=&\w, ]*\]\s*\([^)]*\)\s*(->\s*\w+\s*)?\{": "lambdas need Metal 3.2",
    r"#\s*include": "headers of the system are not there when MLX compiles",
    # `#define NAME 1`, `#if NAME`, `#else` and `#endif` are the preprocessor the kernels use
    (
        r"#(?!\s*(define [A-Z_]+ -?\d+|if [A-Z_]+( > 0)?|else|endif|pragma METAL fp contract\(off\)"
        r"|pragma unroll( 1)?)\s*$)"
    ): "hides text from this lint",
    r"\b(printf|malloc|free|memcpy|memset)\s*\(": "no C library in Metal",
    r"\bfast\s*::": "fast:: is neither accurate nor safe for large arguments",
    r"\b(long|unsigned)\s+(long|double)\b": "not in Metal",
    r"\(\s*\*\s*\w+\s*\)\s*\(": "function pointers are not Metal",
    r"\bstatic\s+(const\s+|constexpr\s+)?\w+\s+\w+\s*(=|;|\[)": "static variables are not Metal",
}
FLOAT = re.compile(r"(?<![\w.])(\d+\.\d*|\.\d+|\d+(?=[eE][+-]?\d))([eE][+-]?\d+)?(?![\w.])([fhFH]?)(?!\w)")
BUILT_IN = r"(?:float|int|uint|bool|half|bfloat|short|ushort|char|uchar|auto|size_t|u?int\d+_t|b?float16_t)"
OWN = r"[A-Z]\w*(?:<[^<>;]*>)?"
TYPES = rf"(?:{BUILT_IN}|{OWN})"
# `float * p` too; but `A * B` of own names is a product, so there only `A* p` and `A *p` count as pointers.
MARK = rf"(?:{BUILT_IN}(?:\s+const)?\s*[*&]\s*|{OWN}(?:[*&]\s*|\s+[*&]))"
POINTER = re.compile(
    rf"(?:^|(?<=[(,;{{]))\s*(?P<before>(?:\w+\s+)*){MARK}(?P<name>[A-Za-z_]\w*)\s*(?=[,;)=])"
)
CAST = re.compile(rf"(?:\(|<)\s*(?P<before>(?:const\s+)?){TYPES}\s*[*&]\s*[)>]")
DECLARED = re.compile(rf"\b{TYPES}[*&]?\s+[*&]?([A-Za-z_]\w*)\s*(?=[=;,()\[{{])")
GLOBAL = re.compile(rf"^\s*(?:const\s+|constexpr\s+|inline\s+)*{TYPES}\s+\w+\s*(?:=|;|\[)")
METAL_BUFFERS = 31


def lint(wrapped: Wrapped, header: str) -> list[str]:
    """Objections to a kernel's header and body, each with its line; [] if there are none."""
    found = list(_words(strip(header), "header")) + list(_words(strip(wrapped.body), "body"))
    found += _globals(strip(header))
    found += _arrays(strip(wrapped.body), strip(header))
    found += _offsets(wrapped)
    if not used_attributes(strip(wrapped.body)):
        found.append("body: uses no attribute (mlx 0.32.4 then closes the signature early)")
    if len(wrapped.parameters) > METAL_BUFFERS:
        found.append(f"{len(wrapped.parameters)} buffers; Metal has {METAL_BUFFERS}")
    return found


def strip(text: str) -> str:
    """The text without comments and strings, lines kept."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    return re.sub(r'//[^\n]*|"(?:[^"\\\n]|\\.)*"', "", text)


def _words(text: str, place: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        at = f"{place} line {number}: "
        for pattern, why in FORBIDDEN.items():
            if re.search(pattern, line):
                yield at + f"{why}: {line.strip()}"
        for m in FLOAT.finditer(line):
            if not m[3]:
                yield at + f"the literal {m[0]} is a double in C++; write {m[0]}f"
        for m in POINTER.finditer(line):
            if not set(m["before"].split()) & set(SPACES):
                yield at + f"`{m['name']}` has no address space: {line.strip()}"
        if CAST.search(line):
            yield at + f"a cast to a pointer without an address space: {line.strip()}"
        for m in DECLARED.finditer(line):
            if m[1] in RESERVED:
                yield at + f"`{m[1]}` is a word of Metal's"
            if m[1] in preamble.names() and (
                m[1].isupper() or not line.startswith(" ")
            ):  # locals may shadow functions
                yield at + f"`{m[1]}` is a name of MLX's preamble"


def _globals(header: str) -> Iterator[str]:
    """Variables at program scope must be in constant memory. (Our namespaces are not indented.)"""
    depth = 0
    for number, line in enumerate(header.splitlines(), 1):
        opens_namespace = re.match(r"\s*namespace\b", line)
        if depth == 0 and GLOBAL.match(line):
            yield f"header line {number}: a variable at program scope must be constant: {line.strip()}"
        if (not opens_namespace and not re.match(r"\s*}\s*$", line)) or depth:
            depth += line.count("{") - line.count("}")
            depth = max(0, depth)


def _arrays(body: str, header: str) -> Iterator[str]:
    """Threadgroup arrays: `threadgroup T name[n];` alone on a line, at the top of the kernel."""
    if re.search(r"\bthreadgroup\s+[\w:]+\s+\w+\s*\[", header):
        yield "header: threadgroup memory can only be declared in a kernel"
    depth = 0
    for number, line in enumerate(body.splitlines(), 1):
        declares = re.match(r"\s*threadgroup\s+\w+\s+\w+[^*&(]*;", line)
        if declares and depth:
            yield f"body line {number}: threadgroup memory declared in an inner scope"
        if declares and not re.fullmatch(r"\s*threadgroup\s+\w+\s+\w+\s*(\[[^\]]+\])+\s*;\s*", line):
            yield f"body line {number}: write `threadgroup T name[n];` alone on its line"
        depth += line.count("{") - line.count("}")


INTEGERS = r"(?:int|uint|short|ushort|u?int(?:8|16|32)_t)"
WIDE = {"size_t", "int64_t", "uint64_t"}
DECLARED_INTEGER = re.compile(rf"\b({INTEGERS}|size_t|u?int64_t)\s+(\w+)\s*=\s*([^;]+);")
TOKEN = re.compile(r"\s*([A-Za-z_]\w*(?:::\w+)*|\d\w*|[<>=!]=|&&|\|\||[-+*/%()\[\].,?:<>])")


class _Expression:
    """Tells the width of an integer expression, as C++ has it, and which products are made in 32 bits."""

    def __init__(self, text: str, wide_names: set[str]) -> None:
        self.tokens = TOKEN.findall(text)
        self.whole = "".join(self.tokens) == re.sub(r"\s", "", text)
        self.wide_names, self.narrow_product = wide_names, False

    def is_wide(self) -> bool:
        """Raises ValueError for what is more than a simple expression."""
        wide = self._binary(0)
        if self.tokens or not self.whole:
            raise ValueError(self.tokens)
        return wide

    def _next(self, *wanted: str) -> str:
        if self.tokens and (not wanted or self.tokens[0] in wanted):
            return self.tokens.pop(0)
        return ""

    def _expect(self, token: str) -> None:
        if not self._next(token):
            raise ValueError(token)

    def _binary(self, level: int) -> bool:
        levels = (("?",), ("&&", "||", "<", ">", "<=", ">=", "==", "!="), ("+", "-"), ("*", "/", "%"))
        if level == len(levels):
            return self._primary()
        wide = self._binary(level + 1)
        while operator := self._next(*levels[level]):
            if operator == "?":  # the condition's width is no matter
                wide = self._binary(0)
                self._expect(":")
                wide = self._binary(0) or wide
                continue
            right = self._binary(level + 1)
            self.narrow_product |= operator == "*" and not wide and not right
            wide = level != 1 and (wide or right)
        return wide

    def _primary(self) -> bool:
        if self._next("-"):
            return self._primary()
        if self._next("("):
            wide = self._binary(0)
            self._expect(")")
            return wide
        name = self._next()
        if not re.match(r"\w", name):
            raise ValueError(name)
        wide = name in self.wide_names
        while opening := self._next("(", "[", "."):
            if opening == ".":
                self._next()
                continue
            inner = self._binary(0)
            while self._next(","):
                inner = self._binary(0) or inner
            self._expect(")" if opening == "(" else "]")
            if opening == "[":
                wide = name.endswith("_strides")
            else:  # a cast, or a function, which is as wide as its arguments
                wide = name in WIDE or (inner and not re.fullmatch(INTEGERS, name))
        return wide


def _offsets(wrapped: Wrapped) -> Iterator[str]:
    """Device memory is indexed by 64-bit arithmetic throughout, by `[]` alone."""
    body = strip(wrapped.body)
    wide_names = set(re.findall(r"\b(?:size_t|u?int64_t)\s+(\w+)\s*=", body))
    for m in DECLARED_INTEGER.finditer(body):
        expression = _Expression(m[3], wide_names)
        try:
            wide = expression.is_wide()
        except ValueError:
            continue  # (not an expression of integers)
        if wide and m[1] not in WIDE:
            yield f"body: `{m[2]}` keeps 64 bits in 32: {m[0]}"
        if expression.narrow_product and m[1] in WIDE:
            yield f"body: a product of 32 bits, widened too late: {m[0]}"
    buffers = [p.name for p in wrapped.parameters if not p.fact and not p.declaration.endswith("&")]
    walking = re.findall(r"\bauto (\w+) = &\w+\[", body)  # pointers into them
    moved = re.compile(rf"\b({'|'.join(walking) or '$'})\s*[-+]=\s*([^;]+);")
    for m in moved.finditer(body):
        expression = _Expression(m[2], wide_names)
        expression.is_wide()
        if expression.narrow_product:
            yield f"body: a product of 32 bits moves a pointer: {m[0]}"
    body = re.sub(r"\bauto \w+ = &", "", moved.sub("", body))
    buffers += walking
    for m in re.finditer(rf"(?<![.\w])({'|'.join(buffers)})\b", body):
        if body[m.end() : m.end() + 1] != "[":
            yield f"body: `{m[1]}` without an index: write {m[1]}[...]"
            continue
        index = _bracketed(body, m.end())
        try:
            expression = _Expression(index, wide_names)
            expression.is_wide()
        except ValueError:
            yield f"body: the index of {m[1]}[{index}] is more than this lint can read"
            continue
        if expression.narrow_product:
            yield f"body: a product of 32 bits in the offset {m[1]}[{index}]"


def _bracketed(text: str, opening: int) -> str:
    depth = 0
    for end in range(opening, len(text)):
        depth += {"[": 1, "]": -1}.get(text[end], 0)
        if not depth:
            return text[opening + 1 : end]
    return text[opening + 1 :]
