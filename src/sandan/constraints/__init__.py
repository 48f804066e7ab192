"""Prompts with constraints that a program can check, and the reward functions that check them."""
