"""The transformer: gpt.py has the module and its weights, generate.py samples from it, size.py computes its size.

Nothing is imported here, so that importing `hvdllm.models.size` does not import torch. This room knows neither text nor
exchange.
"""
