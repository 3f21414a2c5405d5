"""What `LLM` and `AsyncLLM` share: prompts and parameters in, outputs back.

frontend.py          tokenizer, defaults, builder and processor of one engine
prompts.py           the forms of a prompt
request_builder.py   prompt and SamplingParams → the coordinator's requests, seeds fixed
output_processor.py  deltas of the coordinator → RequestOutput: text, stop strings, n
logprobs.py          packed log-probabilities → dicts
session.py           synchronous communication with the coordinator
progress.py          progress output at a terminal
"""
