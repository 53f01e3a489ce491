"""What the loop costs: no wait for the device, and one buffer of the logits."""

from __future__ import annotations

import math
import warnings
import weakref
from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from attack_common import (
    EPS,
    Batch,
    MakeNet,
    backend_for,
    name_of,
    run,
)
from conftest import SIZE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eroseg_ext import attack

pytestmark = pytest.mark.usefixtures("one_thread")


class HostSyncs(TorchDispatchMode):
    """Counts what makes the host wait for the device, or the device for the host.

    Reading a value (``_local_scalar_dense`` is ``.item()``), shapes that depend on data (``nonzero`` and indexing by a
    bool mask), copies between devices, and tensors made from Python values (``lift_fresh``: an upload). A copy that is
    asked not to wait does not, where the CPU's side is pinned.
    """

    NAMES: ClassVar[set[str]] = {
        *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"),
        *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "lift_fresh"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if name in self.NAMES:
            # What lies in pinned memory was copied there before, and the device is not asked.
            self.seen[name] += not (isinstance(args[0], Tensor) and args[0].is_pinned())
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            self.seen["index by mask"] += any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in ("_to_copy", "copy_") and isinstance(result, Tensor):
            source = args[1] if name == "copy_" else args[0]
            on_cpu = result if result.device.type == "cpu" else source
            asked_not_to = (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            self.seen["copy between devices"] += source.device != result.device and not (
                asked_not_to and on_cpu.is_pinned()
            )
        return result


LOOPS: list[dict[str, Any]] = [
    {},
    {"method": "mce_bal"},
    {"norm": "l2", "eps": EPS["l2"]},
    {"keep": "best", "restarts": 2},
    {"early_stop": True},
    {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]},
    {"threshold": "exact", "confidence": "top", "within": "class"},
    {"preset": "progressive"},
    {"autocast": torch.bfloat16, "micro_batch": 2},
]


@pytest.mark.parametrize("settings", LOOPS, ids=name_of)
def test_steps_do_not_wait_for_the_device(
    make_net: MakeNet, batch: Batch, backend: str, settings: dict[str, Any]
) -> None:
    if settings.get("early_stop") and batch[0].device.type == "cpu":
        pytest.skip("on the CPU nothing waits, and images leave the batch at once")
    net = make_net(stride=2)
    mask = torch.ones(3, 1, *SIZE, dtype=torch.bool, device=batch[0].device)
    counts = []
    for steps in (2, 7):
        with HostSyncs() as syncs:
            which = backend_for(settings, backend)
            run(net, batch, backend=which, mask=mask, steps=steps, callback=lambda info: None, **settings)
        counts.append(+syncs.seen)
    assert counts[0] == counts[1]
    assert counts[0].total() > 0  # the checks before and after the loop do read values


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks CUDA itself")
@pytest.mark.parametrize("settings", LOOPS, ids=name_of)
def test_cuda_sees_no_synchronisation_in_the_steps(
    make_net: MakeNet, batch: Batch, backend: str, settings: dict[str, Any]
) -> None:
    if batch[0].device.type != "cuda":
        pytest.skip("asks CUDA itself")
    counts = []
    for steps in (2, 2, 7):  # the first run also loads libraries
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                which = backend_for(settings, backend)
                run(make_net(), batch, backend=which, steps=steps, generator=None, **settings)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in seen))
    assert counts[1] == counts[2]


class LiveBytes(TorchDispatchMode):
    """The most bytes that were alive at once in storages of at least ``least`` bytes made under this mode.

    A storage counts from the operation that returns it until its last tensor is gone. What an operation allocates and
    frees inside itself is not seen.
    """

    def __init__(self, least: int) -> None:
        super().__init__()
        self._least = least
        self._known: dict[int, weakref.ref] = {}
        self._live = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if size < self._least or key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self._live -= size

        self._known[key] = weakref.ref(storage, gone)
        self._live += size
        self.peak = max(self.peak, self._live)


@pytest.mark.parametrize("upsampled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"threshold": "exact", "confidence": "top"},
        {"method": "mce_bal", "norm": "l2"},
        {"keep": "best", "restarts": 2, "return_info": True},
        {"labels": None},
        {"labels": None, "micro_batch": 1},
    ],
    ids=name_of,
)
def test_no_step_holds_more_than_one_buffer_of_the_logits_size_beyond_the_models_own(
    make_net: MakeNet, batch: Batch, fused: str, settings: dict[str, Any], dtype: torch.dtype, upsampled: bool
) -> None:
    """The attack's peak against that of the barest loop, counting storages as large as the logits or larger.

    The bare loop is what the user's model costs by itself: a forward pass and a backward pass to the images from a
    gradient that exists before, with the logits dropped in between. The attack may add its gradient buffer, and nothing
    else of that size: not a copy of the logits, not those of the step before. Maps without a class dimension (log-odds)
    and images are smaller, by the number of classes, and left out; so are tensors of a step's own that die inside one
    operation. The reference makes one such tensor per line and is not meant to hold this.
    """
    # So many that even an image's logits in half precision are larger than the whole batch of images in float32.
    classes = 32
    net = make_net(classes, stride=2 if upsampled else 1).eval().to(dtype)
    images, labels = batch[0].to(dtype), batch[1]
    together = settings.get("micro_batch", 3)
    size = (together, classes, *SIZE)
    one = math.prod(size) * dtype.itemsize
    for parameter in net.parameters():
        parameter.requires_grad_(False)

    def forward(x: Tensor) -> Tensor:
        logits = net(x)
        return F.interpolate(logits, size=SIZE, mode="bilinear", align_corners=False) if upsampled else logits

    kept = torch.randn(size, device=images.device).to(dtype)
    with LiveBytes(one) as bare:
        for _ in range(3):
            leaf = images[:together].detach().requires_grad_()
            logits = forward(leaf)
            torch.autograd.grad(logits, leaf, kept)
            del logits
    assert bare.peak >= one
    arguments: dict[str, Any] = {"labels": labels, "steps": 4, "backend": fused} | settings
    with LiveBytes(one) as attacked:
        attack(net, images, **arguments)
    assert attacked.peak <= bare.peak + one


def test_the_gradient_buffer_is_kept_over_the_steps(net: nn.Module, batch: Batch, fused: str) -> None:
    """A fresh buffer costs more in page faults than filling it does."""
    addresses = set()
    original = torch.autograd.grad

    def spy(outputs: Tensor, inputs: Tensor, grad_outputs: Tensor, **keywords: bool) -> tuple[Tensor, ...]:
        addresses.add(grad_outputs.data_ptr())
        return original(outputs, inputs, grad_outputs, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", spy)
        run(net, batch, backend=fused, steps=5, restarts=2)
    assert len(addresses) == 1
