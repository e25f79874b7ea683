"""Plug-ins for vLLM: ``pip install engine/remote/vllm_plugin`` where vLLM is. Nothing here imports Slalom."""
