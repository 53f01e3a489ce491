"""``python bench/every_kernel.py [cpu]`` runs every kernel once on small tensors, for compute-sanitizer."""

import itertools
import sys

import torch

from eroseg_ext.ops import backend, fused, reference

# A number of classes for each way in which the CUDA kernels share them among threads; rows that are copied in pieces of
# 16 bytes, and of fewer.
CLASSES = (1, 4, 21, 40, 90, 170, 256)
WIDTHS = (72, 75)
INTERPOLATED = (4, 300)  # logits of another size than the labels, a row of which is shared by blocks
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
LABELS = (torch.int64, torch.int32, torch.uint8)


def run(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    # All inputs are made on the CPU, so that a copy is what writes them on the device, and no kernel of torch.
    for number, (classes, dtype, layout) in enumerate(itertools.product(CLASSES, DTYPES, LAYOUTS)):
        width = WIDTHS[number // len(LAYOUTS) % 2]
        labels = torch.randint(0, max(classes, 2), (2, 9, width), generator=generator)
        weight = reference.class_balance(labels, max(classes, 2)).to(device)
        labels = labels.to(LABELS[CLASSES.index(classes) % len(LABELS)]).to(device)
        tau = torch.ones(2).to(device)
        for size in ((9, width), INTERPOLATED):
            logits = torch.randn(2, classes, *size, generator=generator).to(dtype, memory_format=layout).to(device)
            _, log_odds, stats = fused.erosion_grad(logits, labels, tau, class_weight=weight)
            fused.next_tau(log_odds, stats, 5)
            fused.erosion_grad(logits, labels, tau, log_odds, radius=0, direction="ce")
            fused.erosion_grad(logits, labels, tau, log_odds, confidence="top")
            for method in ("pgd", "cospgd"):
                fused.pixel_grad(logits, labels, method)
            fused.confidence(logits, labels, confidence="top")
            fused.confusion(logits, labels, max(classes, 2))
    scores = torch.rand(3, 20_000, generator=generator)
    ranks = torch.tensor([[1, 17, 20_000]] * 3).to(device)
    for valid in (None, (scores > 0.5).to(device)):
        fused.kth_value(scores.to(device), ranks, valid)
    for shape in ((2, 3, 16, 20), (1, 3, 7, 9)):
        x, grad = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator).to(device)
        for mask in (None, (x[:, :1] > 0.5).to(device)):
            fused.linf_step_(x.to(device, copy=True), x.to(device), grad, 0.1, 0.1, mask=mask)


if __name__ == "__main__":
    device = torch.device("cpu" if "cpu" in sys.argv else "cuda")
    if why_not := backend.why_not_fused(device):
        raise SystemExit(why_not)
    run(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"every kernel has run on {device}")
