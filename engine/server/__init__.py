"""The OpenAI-compatible HTTP server: `sempre serve`.

config.py         ServerConfig: every setting of the server
requests.py       bodies of requests (pydantic); unknown fields are refused by name
responses.py      bodies of responses (msgspec), and chunks of them, encoded once per request and then per token
errors.py         OpenAI's error object, and which status an exception is
body.py           from the bytes of a request to a checked model
parameters.py     from a request's fields to SamplingParams
completions.py    /v1/completions
chat.py           /v1/chat/completions
message_parser.py from text to the parts of a chat message: the seam for tool calls and reasoning
generation.py     one HTTP request's way through the engine: admitted, streamed, aborted when its client has gone
logprobs.py       both forms of log-probabilities
admission.py      the bounded queue, and the drain at the end
metrics.py, logs.py, tracing.py, middleware.py, openapi.py, tokenization.py
service.py        what the endpoints share
app.py            the application and its routes
run.py            start, signals, end
"""
