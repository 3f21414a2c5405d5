"""Text and tokens: tokenizer, incremental detokenizer with stop strings, chat templates."""
