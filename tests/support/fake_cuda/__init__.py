"""A rank's training step on fake CUDA tensors, in one process without a GPU: executed, checked and counted.

    process   what answers for CUDA, NCCL and Transformer Engine here, and why
    watch     counts kernels, bytes, FLOPs, host syncs, collectives and memory, and checks what kernels are given
    walk      builds a rank's model, optimizer and trainer of any topology, and takes steps

A process that has called `process.install` is good for nothing else.
"""
