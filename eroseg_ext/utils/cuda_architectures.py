"""Lists of CUDA architectures, written as TORCH_CUDA_ARCH_LIST is: what the kernels are built for and where they run.

setup.py loads this file by its path, without the package: it imports nothing but the standard library.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# The names that torch.utils.cpp_extension takes, and what it takes them for.
NAMES = {
    "Kepler": "3.5+PTX",
    "Kepler+Tesla": "3.7",
    "Maxwell": "5.0;5.2+PTX",
    "Maxwell+Tegra": "5.3",
    "Pascal": "6.0;6.1+PTX",
    "Volta": "7.0+PTX",
    "Volta+Tegra": "7.2",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}


class Architecture(NamedTuple):
    """One entry of such a list, ``9.0a`` or ``12.0+PTX``."""

    major: int
    minor: int
    suffix: str  # "a": code for this compute capability alone; "f": for its family, the later ones of its major version
    ptx: bool

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.suffix}{'+PTX' if self.ptx else ''}"

    def nvcc_options(self) -> list[str]:
        number = f"{self.major}{self.minor}{self.suffix}"
        codes = ("sm", "compute") if self.ptx else ("sm",)
        return [f"-gencode=arch=compute_{number},code={code}_{number}" for code in codes]

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a device of this compute capability runs the code, or compiles the PTX as it is loaded."""
        own = (self.major, self.minor)
        if self.suffix == "a":
            return capability == own
        # PTX with a suffix uses instructions that later major versions do not have.
        later_majors = self.ptx and not self.suffix
        return capability >= own and (capability[0] == self.major or later_majors)


def parse(text: str) -> list[Architecture]:
    """The architectures of a list such as ``8.0;9.0a;12.0+PTX`` or ``Ampere Hopper``; of an empty one, none.

    Raises:
        ValueError: an entry is neither a number nor a name; says which in one sentence.
    """
    architectures = []
    for entry in re.findall(r"[^;\s]+", text):
        name = entry.removesuffix("+PTX")
        numbers = NAMES.get(name, name)
        if entry != name:
            numbers = numbers.removesuffix("+PTX") + "+PTX"
        for number in numbers.split(";"):
            parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", number)
            if parts is None:
                raise ValueError(
                    f"TORCH_CUDA_ARCH_LIST has {entry!r}, wanted numbers such as 8.0, 9.0a or 12.0+PTX, or names "
                    f"such as Hopper, separated by semicolons or spaces"
                )
            architectures.append(Architecture(int(parts[1]), int(parts[2]), parts[3], parts[4] is not None))
    return architectures
