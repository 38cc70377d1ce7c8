"""The GPT trainer: a small language model, trained in seconds on one CPU core or on a GPU.

    recipe      every knob of the trainer with its default and its search range
    flops       parameters, FLOPs and planned steps of a recipe, counted, not measured
    data        the corpus, its three splits and the token cache
    tokenizer   byte-pair encoding trained on the train split
    init        initial weights, drawn per (seed, parameter name)
    ops         differentiable pieces with a hand-written backward
    gpt         the model
    optim       Muon for matrices, AdamW for the rest
    schedule    learning rate, momentum and weight decay over a run
    train       one training run under a budget
    weights     the saved model: one safetensors file that carries its recipe
    evaluate    bits per byte of a saved model
    threads     one thread, so that the same seed gives the same bits

`recipe`, `flops`, `data` and `schedule` do not import torch.
"""
