"""Endpoints that agents call: /v1/responses of OpenAI's clients, /v1/messages of Anthropic's.

    sampling.py   fields that both have beside those of their makers, and errors that name a request's own fields
    blocks.py     an output as a sequence of blocks: reasoning, text, calls
    messages_*    /v1/messages and /v1/messages/count_tokens: fields, input, output, endpoints
    responses_*   /v1/responses, likewise

Each turns its request into one of /v1/chat/completions; prompts, grammars and parsers are those of a chat.
"""
