"""The attack methods: a table that settings, objects, commands and documentation are made from.

To add a method:

1. a row in ``METHODS``, and its settings, if it has any of its own, in ``settings.py`` and ``options.py``;
2. a branch in ``ops/reference.py``'s ``pixel_grad``, which defines its weight, and its name in ``PIXEL_METHODS``;
3. the same branch in ``csrc/pixel_math.h``, an entry in ``csrc/enums.h`` and the name in ``fused.FUSED_METHODS``;
4. a class of two lines in ``classes.py``, imported in ``eroseg_ext/__init__.py``;
5. a row in ``tests/test_attack_methods.py``; most other tests run over ``METHODS`` and ``PIXEL_METHODS``;
6. the table of methods in the documentation: the test that compares it prints the new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Method(NamedTuple):
    """What is particular to a method; :mod:`eroseg_ext.attacks.gradients` runs it."""

    name: str
    """as the setting ``method`` has it"""
    class_name: str
    """of the object form in :mod:`eroseg_ext`"""
    op: str
    """``erosion_grad``, or the method of ``pixel_grad`` that gives the gradient"""
    summary: str
    source: str
    settings: Sequence[str] = ()
    """fields of ``AttackSettings`` that only this method reads"""
    balanced: bool = False
    """each pixel is weighted inversely to the number of its class's pixels"""


_FRONT = (
    "confidence", "front", "direction", "radius", "slope", "within", "threshold", "schedule",
    "reach", "front_first", "front_min", "front_max", "balance", "rho_range",
)  # fmt: skip

METHODS = {
    method.name: method
    for method in (
        Method("eroseg", "EroSeg", "erosion_grad", "front of eroded confidence", "Song et al., ICASSP 2026", _FRONT),
        Method("pgd", "PGD", "pgd", "cross-entropy", "Madry et al., ICLR 2018"),
        Method("segpgd", "SegPGD", "segpgd", "correct pixels first, wrong ones later", "Gu et al., ECCV 2022"),
        Method(
            "cospgd", "CosPGD", "cospgd", "cosine of prediction and label", "Agnihotri et al., ICML 2024", ("variant",)
        ),
        Method("mce", "MaskedCE", "mce", "correct pixels only", "Croce et al., ECCV 2024"),
        Method(
            "mce_bal", "MaskedCE", "mce", "as mce, divided by the class's pixels", "Croce et al., ECCV 2024", (), True
        ),
        Method("js", "JSD", "js", "Jensen-Shannon divergence", "Croce et al., ECCV 2024"),
        Method("tsallis", "Tsallis", "tsallis", "Tsallis cross-entropy", "Tsallis, J. Stat. Phys. 1988", ("q",)),
    )
}
"""By name, in the order that messages list them."""
