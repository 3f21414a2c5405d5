"""What `LLM` and `AsyncLLM` share: prompts and parameters in, outputs back.

frontend.py          tokenizer, defaults, builder and processor of one engine
prompts.py           the forms of a prompt
request_builder.py   prompt and SamplingParams → the coordinator's requests, seeds fixed
output_processor.py  the coordinator's deltas → RequestOutput: text, stop strings, n
logprobs.py          packed log-probabilities → dictionaries
session.py           the synchronous conversation with the coordinator
progress.py          what a person at a terminal sees meanwhile
"""
