"""The user's model during an attack: left as it was found, and its output read whatever its form."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from eroseg_ext.models.modules import depends_on_parameters, modules_behind
from eroseg_ext.models.outputs import DTYPES, Reader
from eroseg_ext.models.see_through import LogitMap, SeeThrough, can_see_through
from eroseg_ext.models.windows import Sides, averaged, places
from eroseg_ext.utils.validate import warn

Model = Callable[[Tensor], Any]
NO_GRADIENT = (
    "the model's logits do not depend on images by autograd, wanted a differentiable model: if a part of it runs under "
    "torch.no_grad, eroseg_ext.models.semantic(model, through_no_grad=True) is one"
)
SETTINGS = (
    *("mean", "std", "autocast", "output", "output_key", "logits", "align_corners", "see_through"),
    *("window", "stride"),
)
"""What :class:`Logits` takes, under the names that the settings of attack, training and evaluation have for it."""


def unwrapped(model: Model) -> Model:
    """The module inside DistributedDataParallel: its reducer must not see the attack's backward passes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_making_locks = threading.Lock()


@contextmanager
def _no_other_thread(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Waits until no other thread is in here with one of the modules; a thread may be in here several times."""
    with _making_locks:
        # Always in one order, or two threads could each wait for a module that the other has.
        locks = [_locks.setdefault(module, threading.RLock()) for module in sorted(modules, key=id)]
    with ExitStack() as held:
        for lock in locks:
            held.enter_context(lock)
        yield


@contextmanager
def frozen(model: Model, mode: str) -> Iterator[None]:
    """Holds a module in ``eval`` or ``train`` mode (or ``keep``) with its parameters frozen, then restores it.

    Restored, also after an exception: the mode of every submodule, requires_grad of every parameter, and, where a
    submodule is in train mode meanwhile, every buffer (BatchNorm statistics). Of a callable that is no nn.Module, the
    modules behind it are held so. Another thread that asks for one of the modules waits.
    """
    roots = modules_behind(model)
    modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
    with _no_other_thread(modules), _out_of_step(modules):
        modes = [(module, module.training) for module in modules]
        trainable = [p for p in dict.fromkeys(p for root in roots for p in root.parameters()) if p.requires_grad]
        buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []

        def restore() -> None:
            for parameter in trainable:
                parameter.requires_grad_(True)
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    buffer.copy_(before)
                    setattr(module, name, buffer)  # a module may have put another tensor in its place
            for module, training in modes:
                module.training = training

        try:
            if mode != "keep":
                for root in roots:
                    root.train(mode == "train")
            if any(module.training for module in modules):
                buffers = [
                    (module, name, buffer, buffer.detach().clone())
                    for module in modules
                    for name, buffer in module.named_buffers(recurse=False)
                ]
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            try:
                _uninterrupted(restore)
            except KeyboardInterrupt:  # it may have come before the first of them was held back
                _uninterrupted(restore)
                raise


def _uninterrupted(work: Callable[[], None]) -> None:
    """Does the work as a whole: Ctrl-C, which Python gives to the main thread, is held back until its end."""
    came: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    if handler is None or threading.current_thread() is not threading.main_thread():
        work()
        return
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        work()
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def _out_of_step(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keeps what distributes the modules over processes from counting passes that belong to no training step."""
    distributed = [module for module in modules if isinstance(module, DistributedDataParallel)]
    before = [(module.require_backward_grad_sync, module.require_forward_param_sync) for module in distributed]
    reshard(modules)
    try:
        for module in distributed:
            module.require_backward_grad_sync = module.require_forward_param_sync = False
        yield
    finally:
        for module, (gradients, parameters) in zip(distributed, before, strict=True):
            module.require_backward_grad_sync, module.require_forward_param_sync = gradients, parameters
        reshard(modules)


def reshard(modules: Iterable[nn.Module]) -> None:
    """Frees the whole parameters that ``fully_shard`` has gathered.

    A forward pass without a backward pass leaves those of the outermost module in place of the sharded ones, with the
    requires_grad that these had then.
    """
    for module in _sharded(modules, "FSDPModule"):
        module.reshard()


def _sharded(modules: Iterable[nn.Module], *kinds: str) -> list[Any]:
    """Those of the kinds of torch.distributed.fsdp."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported for this: that takes as long as half of torch
    types = () if fsdp is None else tuple(getattr(fsdp, kind) for kind in kinds)
    return [module for module in modules if isinstance(module, types)]


class Logits:
    """``images in pixel values -> logits at the labels' resolution``, differentiable with respect to the images.

    Normalises by mean and std if given, runs the model (under autocast if asked) in the dtype of its first parameter,
    takes the logits out of its output, as ``reading`` tells :class:`eroseg_ext.models.outputs.Reader`, and upsamples
    them bilinearly to ``size`` if need be. The model is given a tensor that it may write to.

    Args:
        window, stride: what the model is given of larger images, see :func:`eroseg_ext.models.windows.places`.
        dtype: what a model without parameters is given; None: the images as they are.
    """

    def __init__(
        self,
        model: Model,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        autocast: torch.dtype | None = None,
        see_through: bool = True,
        window: Sides | None = None,
        stride: Sides | None = None,
        dtype: torch.dtype | None = None,
        **reading: Any,
    ) -> None:
        given: Any = model
        if not callable(given):
            inside = callable(getattr(given, "model", None))
            hint = ", as its .model is, with mean= and std= for what it does to images" if inside else ""
            raise TypeError(f"model is a {type(given).__name__}, wanted an nn.Module or another callable{hint}")
        self._model = model
        self._read = Reader(**reading)
        self._window, self._stride = window, stride
        self._modules = modules_behind(model)
        # What shares a model over processes hangs its work onto the backward pass of what the model returned.
        self._sees_through = see_through and not self.is_sharded and can_see_through(self._modules)
        self._dtype = dtype
        self._warned = isinstance(model, nn.Module)
        self._mean = mean
        self._std = std
        self._constants: tuple[Tensor, ...] | None = None
        self._autocast = autocast

    @classmethod
    def under(cls, model: Model, settings: Any, **others: Any) -> Logits:
        """As the settings of an attack, a training or an evaluation say; what they do not have keeps its default."""
        named = {name: getattr(settings, name) for name in SETTINGS if hasattr(settings, name)}
        return cls(model, **(named | others))

    def __call__(self, images: Tensor, size: tuple[int, int]) -> LogitMap:
        """The logits of ``images[B, K, H, W]`` of ``size``; TypeError or ValueError for an output of another form."""
        at = [] if self._window is None else places(size, self._window, self._stride)
        if len(at) <= 1:
            return self._of_one_pass(images, size)
        return LogitMap(averaged(Pass(self._of_window), images, at), self._read.align_corners)

    def with_auxiliary(self, images: Tensor, size: tuple[int, int]) -> list[LogitMap]:
        """The logits, and after them those of auxiliary heads; without windows."""
        output = self._output(images, size)
        return [self._read(output, images.shape[0], size), *self._read.auxiliary(output, images.shape[0])]

    def _of_window(self, images: Tensor) -> LogitMap:
        """At the window's own size."""
        size = (images.shape[-2], images.shape[-1])
        logits = self._of_one_pass(images, size)
        return logits._replace(values=logits.at(size))

    def _of_one_pass(self, images: Tensor, size: tuple[int, int]) -> LogitMap:
        logits = self._read(self._output(images, size), images.shape[0], size)
        if logits.values.requires_grad and not self._warned:
            self._warned = True
            if depends_on_parameters(logits.values):
                warn(
                    "the model is a function and the nn.Module of its parameters was not found: its mode, BatchNorm "
                    "statistics and requires_grad stay as they are during the attack, pass an nn.Module instead"
                )
        return logits

    def _output(self, images: Tensor, size: tuple[int, int]) -> Any:
        if self._mean is not None:
            if self._constants is None:
                # Kept: an upload makes the host wait for the device, which no step may.
                self._constants = tuple(images.new_tensor(v).view(1, -1, 1, 1) for v in (self._mean, self._std))
            mean, std = self._constants
            images = (images - mean) / std
        # Never the tensor given, a leaf of autograd or the caller's own: the model may write to what it gets.
        images = images.to(self._model_dtype() or images.dtype, copy=self._mean is None)
        with ExitStack() as contexts:
            if self._sees_through:
                contexts.enter_context(SeeThrough(size))
            if self._autocast is not None:
                contexts.enter_context(torch.autocast(images.device.type, self._autocast))
            return self._model(images)

    @property
    def is_sharded(self) -> bool:
        """Whether each pass waits for other processes."""
        modules = (module for root in self._modules for module in root.modules())
        return bool(_sharded(modules, "FSDPModule", "FullyShardedDataParallel"))

    def _model_dtype(self) -> torch.dtype | None:
        parameters = (parameter for module in self._modules for parameter in module.parameters())
        return next((parameter.dtype for parameter in parameters if parameter.dtype in DTYPES), self._dtype)


class Pass:
    """The model's forward and backward pass with respect to the images, step after step."""

    def __init__(self, forward: Callable[[Tensor], LogitMap]) -> None:
        self.forward = forward
        self._under_way: tuple[Tensor, GradientEdge] | None = None
        self._has_checkpoints = False

    def logits(self, images: Tensor) -> LogitMap:
        """Of ``images[B, K, H, W]``, detached; ValueError for logits that are cut off from the images."""
        leaf = images.detach().requires_grad_()
        logits = self.forward(leaf)
        if not logits.values.requires_grad:
            raise ValueError(NO_GRADIENT)
        # Not the logits themselves, which need not last through the backward pass.
        self._under_way = leaf, get_gradient_edge(logits.values)
        return logits._replace(values=logits.values.detach())

    def gradient(self, grad_logits: Tensor) -> Tensor:
        """The gradient with respect to the images of the last ``logits``, whose graph is freed."""
        assert self._under_way is not None
        leaf, logits = self._under_way
        self._under_way = None
        if not self._has_checkpoints:
            try:
                # Of a callable's parameters, which nobody froze, the logits may depend where they do not of the images.
                grad: Tensor | None = torch.autograd.grad(logits, leaf, grad_logits, allow_unused=True)[0]
                if grad is None:
                    raise ValueError(NO_GRADIENT)
                return grad
            except RuntimeError as error:
                if ".grad()" not in str(error):
                    raise
                # Checkpoints with use_reentrant=True ask for backward(). What came after the last of them is freed.
                self._has_checkpoints = True
                logits = get_gradient_edge(self.forward(leaf).values)
        torch.autograd.backward(logits, grad_logits)
        if leaf.grad is None:
            raise ValueError(NO_GRADIENT)
        return leaf.grad
