"""Text in, token ids out: tokenizers, chat templates, the markers of the prompt, and the encoder."""
