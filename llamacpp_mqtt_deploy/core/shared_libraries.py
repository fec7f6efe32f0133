"""Says in a sentence what the dynamic loader says about a shared library that is missing or too old."""

from __future__ import annotations

import re

# Name of a library -> what brings it. glibc's, libgomp's and libstdc++'s names are the same on every architecture of Debian.
_PACKAGES = (
    (re.compile(r"libgomp\.so\.1"), "libgomp1"),
    (re.compile(r"libstdc\+\+\.so\.6"), "libstdc++6"),
    (re.compile(r"libgcc_s\.so\.1"), "libgcc-s1"),
    (re.compile(r"libvulkan\.so\.1"), "libvulkan1"),
    (re.compile(r"libopenblas\.so\.0"), "libopenblas0"),
)
_OTHERS = (
    (re.compile(r"libcuda\.so[\d.]*|libnvidia-\S+"), "NVIDIA's driver"),
    (re.compile(r"libcu(dart|blas|blasLt|rand|fft|sparse)\.so[\d.]*"), "NVIDIA's CUDA runtime"),
    (re.compile(r"lib(amdhip64|hipblas|rocblas|hsa-runtime64)\.so[\d.]*"), "AMD's ROCm"),
)
# glibc's words (elf/dl-load.c), in English as the programs here run: "libx.so.1: cannot open shared object file: No such file".
_MISSING = re.compile(r"([\w+.-]+\.so(?:\.\d+)*): cannot open shared object file")
_TOO_OLD = re.compile(r"version [`'](\w+_[\d.]+)' not found")


def lacking_library(said: str) -> str | None:
    """What this machine lacks to load a library, without a full stop; None when the text speaks of something else."""
    missing = _MISSING.search(said)
    if missing:
        return f"the library {missing[1]} is missing; {_source(missing[1])}"
    too_old = _TOO_OLD.search(said)
    if too_old:
        return f"it was built for a newer system ({too_old[1]}) than this one"
    return None


def _source(library: str) -> str:
    for name, package in _PACKAGES:
        if name.fullmatch(library):
            return f"on Debian and Ubuntu: sudo apt-get install {package}"
    for name, bringer in _OTHERS:
        if name.fullmatch(library):
            return f"it comes with {bringer}"
    return f"`apt-file search {library}` names its package on Debian and Ubuntu"
