"""What leaves for the Hugging Face Hub: cards, and pushing."""
