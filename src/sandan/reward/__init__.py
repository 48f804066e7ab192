"""Step 3, the reward model: its trainer, its metrics, its scale, and the gate before PPO."""
