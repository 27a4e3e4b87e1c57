"""Text in, token ids out: tokenizers, chat templates, the prompt's markers, and the encoder."""
