"""The commands of `hvdllm`, one file for each."""
