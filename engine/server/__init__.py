"""The OpenAI-compatible HTTP server: `sempre serve`.

config.py         ServerConfig: every setting of the server
requests.py       bodies of requests (msgspec); unknown fields are refused by name
responses.py      bodies of responses (msgspec) and stream chunks, encoded once per request and then per token
errors.py         OpenAI's error object, and the status of each exception
body.py           from the bytes of a request to a checked model
parameters.py     from a request's fields to SamplingParams
completions.py    /v1/completions
chat.py           /v1/chat/completions
message_parser.py from text to the parts of a chat message: content, reasoning, tool calls
generation.py     one HTTP request in the engine: admitted, streamed, aborted when its client disconnects
logprobs.py       both forms of log-probabilities
admission.py      the bounded queue, and draining at shutdown
metrics.py, logs.py, tracing.py, middleware.py, openapi.py, tokenization.py
service.py        what the endpoints share
app.py            the application and its routes
run.py            start, signals, shutdown
"""
