"""`sempre.lora.request`, the path that users of vLLM import LoRARequest from."""
