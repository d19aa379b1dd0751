"""megasft's own kernels for CUDA, in Triton. Each is an operator that has its CPU form where it is declared."""
