"""What a job takes before it is launched: memory, FLOPs, traffic, time, and the topology that is fastest.

    job         a rank's part of a job: sizes of the model, topology, batch
    state       bytes that stay between steps
    memory      these, and what a step needs at most
    traffic     collectives of a step, calls and bytes
    parameters  of the base and of the adapters, by kind of module
    devices     GPUs and the constants of the roofline
    time        seconds of a step, tokens per second
    plan        all of it for a run file
    search      every topology, ranked
    remedies    a job that does not fit is refused, with what would
    advice      settings far from what others use
    report      tables, JSON, pictures

Reads the run file and the model's `config.json` only; imports neither torch nor megatron-core.
"""
