"""The transformer: gpt.py the module and its weights, generate.py sampling, size.py its size without torch.

Nothing is imported here, so that `hvdllm.models.size` costs no import of torch. Blind to text and exchange.
"""
