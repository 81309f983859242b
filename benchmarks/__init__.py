"""Measure swin_hf against transformers, timm and torchvision: same weights, same process, taking turns.

    python -m benchmarks                                    # the whole table on this machine, 15 minutes at most
    python -m benchmarks --sections models --modes inference --batch-sizes 1 8 --limit 120
    python -m benchmarks --sections models --presets swinv2_tiny_patch4_window8_256 --dtypes fp32 bf16
    python -m benchmarks --sections trainer --recipes fashion_mnist --limit 3600   # against transformers' Trainer
    python -m benchmarks --sections pipeline epoch --limit 7200    # files to batches; epochs against Trainer and timm
    python -m benchmarks --devices cuda --sections models attention --jobs 16    # compile side by side, time one by one
    python -m benchmarks --render-only --readme README.md   # no measurement: the table from docs/speed.json

A setting is a preset, a device, a dtype, a mode, an execution and a batch size. "graphs" is torch.compile with CUDA
graphs, its mode "reduce-overhead". In each, the outputs of all peers, in
training their gradients, are compared with our definition in fp32 before any is timed, and one that computes something
else is reported and left out. Weights are such that attention is peaked, so that a lost bias, mask or scale would show.
Then they take turns (A B C, A B C, ...), so that a machine that slows down slows all of them. A ratio above 1 means
that we are faster; it divides the fastest rounds, which other programs disturb least. The limit is this machine's own
large matrix product in the same run. A result whose median is far above its minimum was disturbed by other programs: it
is marked and stays out of the README. Training is a whole step: forward, cross-entropy, backward,
AdamW, without stochastic depth; in bf16 and amp it runs under autocast. Inference in bf16 has bf16 weights; amp is
autocast. Settings that fail or that the time limit cuts off are listed.

Results are merged into --json, setting by setting, each with hardware, versions and date.
"""
