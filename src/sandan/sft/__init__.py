"""Step 2, fine-tuning on prompts and answers."""
