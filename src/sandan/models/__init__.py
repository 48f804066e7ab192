"""Models and tokenizers of transformers: loading, rendering rows, sampling, scoring, memory."""
