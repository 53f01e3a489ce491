def versions() -> tuple[int, int]:
    """The CUDA runtime linked in and the newest that the driver takes, as 1000 * major + 10 * minor."""

def architectures() -> str:
    """What the kernels are built for, such as ``8.0;9.0;12.0+PTX``."""
