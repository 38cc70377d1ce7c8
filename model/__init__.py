"""The GPT trainer: a small language model, trained in seconds on one CPU core or on a GPU.

    recipe      every knob of the trainer with its default and its search range
    flops       parameters, FLOPs and planned steps of a recipe, counted, not measured
    data        prepared corpora: what a run may see of them, and where it lies
    corpora     documents in, a prepared corpus out
    kjv         the corpus that comes with the project
    texts       a corpus from files of one's own
    shards      corpora that are downloaded, described in YAML
    download    large files: resumed, verified, recorded
    files       files and folders that are whole or absent
    packing     rows from documents, best fit among them
    pipeline    which rows a run sees, and in which order
    tokenizer   byte-pair encoding trained on the train split
    init        initial weights, drawn per (seed, parameter name)
    ops         differentiable pieces with a hand-written backward
    plain       the same in standard operations, for compilers and as their reference
    kernels     attention on accelerators, and which implementation is the fastest there
    gpt         the model
    optim       Muon for matrices, AdamW for the rest
    fused       the optimiser's steps for a compiler
    schedule    learning rate, momentum and weight decay over a run
    train       one training run under a budget
    timeline    when steps end, by the device's own clock
    loader      batches made and sent ahead of time
    advice      which knobs to change when a run fails
    device      names, memory, peak rates and instruction sets of devices
    weights     the saved model: one safetensors file that carries its recipe
    evaluate    bits per byte of a saved model
    guard       the same for a model of unknown code, and whether it answers honestly
    yardstick   what one step takes: processor seconds and FLOPs
    threads     one thread, so that the same seed gives the same bits

`recipe`, `flops`, `data` and `schedule` do not import torch.
"""
