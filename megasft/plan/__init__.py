"""What a job takes before it is launched: memory, FLOPs, traffic, time, and the topology that is fastest.

    job        a rank's part of a job: sizes of the model, topology, batch
    state      bytes that stay between steps
    memory     these, and what a step needs at most
    traffic    collectives of a step, calls and bytes
    flops      floating-point operations and bytes moved
    devices    GPUs and the constants of the roofline
    time       seconds of a step, tokens per second
    search     every topology, ranked
    advice     settings far from what others use
    report     tables, JSON, pictures

Reads the run file and the model's `config.json` only; imports neither torch nor megatron-core.
"""
