"""Texts of metal/ that are broken on purpose, and compilers' flags for them."""

from mlx_pararnn.compute import cpu_build, texts


def broken(monkeypatch, file, old, new):
    """A file of metal/ with a piece replaced, wherever a text is assembled from it."""
    parts, text = texts.metal_text, texts.metal_text(file)
    assert text.count(old) == 1, (file, text.count(old))
    monkeypatch.setattr(
        texts, "metal_text", lambda *path: text.replace(old, new) if path == (file,) else parts(*path)
    )


def built_with(flags, monkeypatch):
    """Libraries are compiled with these flags."""
    flags = ["-std=c++17", *flags, "-shared", "-fPIC", "-pthread"]
    monkeypatch.setattr(cpu_build, "_flags", lambda: flags)
