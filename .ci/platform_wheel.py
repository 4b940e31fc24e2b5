"""platform_wheel.py WHEEL FOLDER: a wheel for one platform made from the pure one, the CPU backend compiled.

Whoever installs it needs a compiler for cells of their own alone. The texts are those of WHEEL, the flags are
those of a build at first use but for the processor (mlx_pararnn/compute/prebuilt.py). On Linux the C++
library is linked in, and the wheel's tag names the glibc that is needed then. For another machine than this
one: --machine aarch64 --tools aarch64-linux-gnu-. Needs an environment that the package runs in, and `wheel`.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MACOS = "14.0"  # the oldest that MLX's wheels are for
LINKED = {
    # nothing of another libstdc++ in the process may be taken for this one
    "linux": ["-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections", "-s"],
    "darwin": [f"-mmacosx-version-min={MACOS}"],
}
OLDEST_GLIBC = (2, 17)  # of all wheels called manylinux that have a number


def compiled(name: str, text: str, flags: list[str], folder: Path, compiler: str) -> Path:
    """The library of `text`, in `folder`, under the name by which it is found."""
    from mlx_pararnn.compute import prebuilt

    with tempfile.TemporaryDirectory() as work:
        source, built = Path(work, f"{name}.cpp"), Path(work, "built.so")
        source.write_text(text)
        subprocess.run(
            [compiler, *flags, *LINKED[sys.platform], "-o", built, source.name], cwd=work, check=True
        )
        path = folder / f"{name}-{prebuilt.key_of(text, *flags)}-{prebuilt.digest(built)}.so"
        path.write_bytes(built.read_bytes())
    return path


def needed_glibc(library: Path, objdump: str) -> tuple[int, int]:
    """The glibc that a library asks for; ends the program if it asks for more than the C library."""
    said = subprocess.run([objdump, "-p", library], capture_output=True, text=True, check=True).stdout
    others = [n for n in re.findall(r"NEEDED +(\S+)", said) if not re.match(r"(libc|libm|ld-linux.*)\.so", n)]
    if others:
        sys.exit(f"{library.name} needs {', '.join(others)}, which not every machine has")
    return max((OLDEST_GLIBC, *((int(a), int(b)) for a, b in re.findall(r"GLIBC_(\d+)\.(\d+)", said))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--machine", default=platform.machine(), help="as `uname -m` says it")
    parser.add_argument("--tools", default="", metavar="PREFIX", help="of a cross compiler's g++ and objdump")
    parser.add_argument("--only", default="", metavar="REGEX", help="libraries of these names; for a trial")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([sys.executable, "-m", "wheel", "unpack", "--dest", work, args.wheel], check=True)
        (unpacked,) = Path(work).iterdir()
        sys.path.insert(0, str(unpacked))
        sys.dont_write_bytecode = True  # which would be packed too
        from mlx_pararnn.compute import prebuilt, texts

        processors = prebuilt.PROCESSORS[sys.platform, args.machine]
        wanted = [
            (f"{name}-{processor.partition('=')[2]}", text, prebuilt.flags(processor))
            for processor in processors
            for name, text in texts.built_in_texts()
        ]
        if args.machine == "x86_64":
            wanted.append(("level-x86-64", prebuilt.level_text(), prebuilt.flags(prebuilt.ANY_X86_64)))
        wanted = [one for one in wanted if re.search(args.only, one[0])]
        folder = unpacked / "mlx_pararnn" / "prebuilt"
        folder.mkdir()
        compiler = f"{args.tools}g++" if sys.platform == "linux" else "c++"
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = [*pool.map(lambda one: compiled(*one, folder, compiler), wanted)]
        if sys.platform == "linux":
            major, minor = max(needed_glibc(path, f"{args.tools}objdump") for path in made)
            tag = f"manylinux_{major}_{minor}_{args.machine}"
        else:
            tag = f"macosx_{MACOS.replace('.', '_')}_{args.machine}"
        (about,) = unpacked.glob("*.dist-info/WHEEL")
        about.write_text(
            about.read_text()
            .replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
            .replace("Tag: py3-none-any", f"Tag: py3-none-{tag}")
        )
        subprocess.run(
            [sys.executable, "-m", "wheel", "pack", "--dest-dir", args.folder, unpacked], check=True
        )
        size = sum(path.stat().st_size for path in made)
        print(f"{tag}: {len(made)} libraries, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
