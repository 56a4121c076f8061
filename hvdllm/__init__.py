"""hvdllm trains transformer language models over Horovod, with the exchange of gradients in plain sight."""

__version__ = "0.1.0"
