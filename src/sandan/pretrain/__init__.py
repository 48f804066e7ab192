"""Step 1, pre-training: a tokenizer, blocks of text, a model, its trainer."""
