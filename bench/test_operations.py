"""Time of the operations and of a whole step: the reference eager and under ``torch.compile``, and the fused kernels.

Groups stand for one case each; within a group the factor in parentheses is the time relative to the fastest. ``copy``
is the floor: a copy that reads and writes as many bytes as the operation must.
"""

import pytest
import torch

from bench import cases
from bench.cases import Case, Unavailable
from bench.conftest import Record


def test_operation(
    record: Record, device: torch.device, case: Case, implementation: str, profile: str, seconds: float
) -> None:
    if implementation == "compiled" and not cases.is_compiled(case, profile):
        pytest.skip(f"a {profile} run does not wait for torch.compile here")
    try:
        timing = cases.timed(case, implementation, device, seconds)
    except Unavailable as reason:
        pytest.skip(str(reason))
    record(cases.figure(case, implementation, device, timing, seconds), timing)
