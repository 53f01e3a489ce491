"""Runs the kernels that matter most once each on images of the usual size, for a profiler: see gpu_check.sh.

python bench/large_kernels.py [cpu]
"""

import sys

import torch

from eroseg_ext.ops import backend, fused, reference

# Batch, classes, height, width; dtype; layout.
LOGITS = (
    ((8, 21, 512, 512), torch.bfloat16, torch.contiguous_format),
    ((8, 21, 512, 512), torch.bfloat16, torch.channels_last),
    ((8, 21, 512, 512), torch.float32, torch.contiguous_format),
    ((4, 150, 512, 512), torch.bfloat16, torch.contiguous_format),
)


def main(device: torch.device) -> None:
    if why_not := backend.why_not_fused(device):
        raise SystemExit(why_not)
    for (batch, classes, height, width), dtype, layout in LOGITS:
        logits = (torch.randn(batch, classes, height, width, device=device) * 4).to(dtype, memory_format=layout)
        # Regions of one class, as in real images: a word's pixels mostly have the same label.
        labels = torch.randint(0, classes, (batch, height // 16, width // 16), device=device)
        labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)
        weight = reference.class_balance(labels, classes)
        tau, previous = torch.ones(batch, device=device), torch.randn(labels.shape, device=device)
        _, log_odds, stats = fused.erosion_grad(logits, labels, tau, previous, class_weight=weight)
        fused.next_tau(log_odds, stats, 5)
        fused.pixel_grad(logits, labels, "cospgd")
    x = torch.rand(8, 3, 512, 512, device=device)
    fused.linf_step_(x.clone(), x, torch.randn_like(x), 0.1, 0.1)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"the large kernels have run on {device}")


if __name__ == "__main__":
    main(torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
