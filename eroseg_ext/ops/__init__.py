"""The operations: their definition, the fused kernels, and which of the two runs."""
